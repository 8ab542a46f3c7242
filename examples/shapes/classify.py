"""A simple classifier of the pictures of draw.py: colours by distance, shapes by overlap with templates."""

from __future__ import annotations

import argparse
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from examples.shapes.draw import COLOURS, FINER, NEW_SHAPE, SHAPES, SIDE, Scene, corners, held_out

TEMPLATE = 48  # pixels per side of the box that shapes are compared in
OVERLAP = 0.62  # intersection over union below which a shape is no shape
LEAST = 60  # pixels that a shape has at least
LEAST_CONTRAST = 40.0  # distance of the shape's colour from the background's, levels of 0..255


class Seen(NamedTuple):
    """What a picture shows; None where it is unclear."""

    shape: str | None
    colour: str | None
    background: str
    overlap: float  # of the best template, 0..1


def classify(picture: Image.Image) -> Seen:
    """The shape, its colour and the background's colour."""
    levels = np.asarray(picture.convert("RGB"), dtype=np.float32)
    rim = np.concatenate([levels[:2].reshape(-1, 3), levels[-2:].reshape(-1, 3)])
    rim = np.concatenate([rim, levels[:, :2].reshape(-1, 3), levels[:, -2:].reshape(-1, 3)])
    ground = np.median(rim, axis=0)
    distance = np.linalg.norm(levels - ground, axis=2)
    contrast = float(np.sort(distance, axis=None)[-LEAST])
    if contrast < LEAST_CONTRAST:
        return Seen(None, None, nearest(ground), 0.0)
    mask = largest(distance > contrast / 2)
    if mask.sum() < LEAST:
        return Seen(None, None, nearest(ground), 0.0)
    overlaps = {shape: overlap(boxed(mask), template(shape)) for shape in (*SHAPES, NEW_SHAPE)}
    best = max(overlaps, key=overlaps.__getitem__)
    shape = best if overlaps[best] >= OVERLAP else None
    return Seen(shape, nearest(np.median(levels[mask], axis=0)), nearest(ground), overlaps[best])


def nearest(colour: np.ndarray) -> str:
    """The name of the nearest colour."""
    return min(COLOURS, key=lambda name: float(np.linalg.norm(colour - np.array(COLOURS[name]))))


def largest(mask: np.ndarray) -> np.ndarray:
    """[H, W] bool -> the same with only the largest patch of pixels that touch: specks of noise are no shape."""
    left = {(int(row), int(column)) for row, column in zip(*np.where(mask), strict=True)}
    best: list[tuple[int, int]] = []
    while left:
        patch = [left.pop()]
        for row, column in patch:  # grows while it is read
            beside = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= beside
            patch.extend(beside)
        best = max(best, patch, key=len)
    kept = np.zeros_like(mask)
    kept[tuple(zip(*best, strict=True))] = True
    return kept


def boxed(mask: np.ndarray) -> np.ndarray:
    """[H, W] bool -> [TEMPLATE, TEMPLATE] bool: what its bounding box holds, stretched."""
    rows, columns = np.where(mask.any(1))[0], np.where(mask.any(0))[0]
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    size = (TEMPLATE, TEMPLATE)
    return np.asarray(Image.fromarray(part.astype(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR)) > 127


@lru_cache
def template(shape: str) -> np.ndarray:
    """[TEMPLATE, TEMPLATE] bool: the shape in its bounding box."""
    side = 64 * FINER
    picture = Image.new("L", (side, side))
    points = [(side / 2 + x, side / 2 + y) for x, y in corners(shape, side / 2.5)]
    ImageDraw.Draw(picture).polygon(points, fill=255)
    return boxed(np.asarray(picture) > 127)


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Intersection over union, 0..1."""
    return float((a & b).sum() / (a | b).sum())


def right(seen: Seen, scene: Scene) -> bool:
    """Whether the picture has the scene's shape in the scene's colour."""
    return (seen.shape, seen.colour) == (scene.shape, scene.colour)


def contact_sheet(pictures: list[Image.Image], *, columns: int = 10) -> Image.Image:
    """The pictures in rows, two pixels apart."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + 2), rows * (SIDE + 2)), "white")
    for number, picture in enumerate(pictures):
        sheet.paste(picture, (number % columns * (SIDE + 2), number // columns * (SIDE + 2)))
    return sheet


def draw_captions(checkpoint: Path, captions: list[str]) -> list[Image.Image]:
    """One picture of each caption by a diffusers folder, the number of the caption as its seed."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(checkpoint, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(captions), 25):
        part = captions[start : start + 25]
        seeds = [torch.Generator().manual_seed(start + number) for number in range(len(part))]
        pictures += pipeline(part, guidance_scale=3.0, num_inference_steps=20, generator=seeds).images
    return pictures


def main() -> None:
    parser = argparse.ArgumentParser(description="Count how many of the held-out prompts a checkpoint draws right.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a diffusers folder")
    parser.add_argument("--grid", type=Path, help="a picture of all of them is written here")
    arguments = parser.parse_args()
    scenes = held_out()
    pictures = draw_captions(arguments.checkpoint, [scene.caption() for scene in scenes])
    seen = [classify(picture) for picture in pictures]
    if arguments.grid:
        contact_sheet(pictures).save(arguments.grid)
    for scene, view in zip(scenes, seen, strict=True):
        if not right(view, scene):
            print(f"{scene.caption()}: drawn as {view.colour} {view.shape} on {view.background}")
    print(f"{sum(map(right, seen, scenes))} of {len(scenes)} held-out prompts have the right colour and shape")


if __name__ == "__main__":
    main()
