"""Pictures with a hole in them, and how many of these an inpainting model fills with what the prompt says."""

from __future__ import annotations

import argparse
import zipfile
from io import BytesIO
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionPipeline
from PIL import Image

from examples.shapes.classify import classify
from examples.shapes.draw import COLOURS, RADII, SHAPES, SIDE, Scene, draw, held_out, training_scenes
from otl.callbacks.sheet import sheet
from otl.config import assets_dir
from otl.methods.inpaint import widen

MARGIN = 3  # pixels between the largest shape of a size and the rim of its hole
KEPT = 20.0  # mean difference outside of the hole, levels of 0..255, below which the surroundings are kept
PACKED = 300  # pictures of the preset's archive
SHOWN = 6  # rows of the sheet


class Hole(NamedTuple):
    """A picture, the part of it to be painted, and what is to be seen then."""

    picture: Image.Image
    mask: Image.Image  # white is painted
    scene: Scene

    @property
    def prompt(self) -> str:
        """The scene without its background: that is in the picture."""
        return self.scene.caption().split(" on a")[0]

    def shown(self) -> Image.Image:
        """The picture with its hole in grey."""
        return Image.composite(Image.new("RGB", self.picture.size, "gray"), self.picture, self.mask)


def around(picture: Image.Image, size: str) -> Image.Image:
    """A square mask with the picture's shape in its middle: it says where and how large the shape is, not which."""
    levels = np.asarray(picture).astype(int)
    rows, columns = np.nonzero(np.abs(levels - levels[0, 0]).sum(2) > 0)
    half = round(RADII[size][1]) + MARGIN
    mask = Image.new("L", picture.size)
    y, x = ((int(each.min()) + int(each.max()) + 1) // 2 for each in (rows, columns))
    mask.paste(255, (max(0, x - half), max(0, y - half), min(SIDE, x + half), min(SIDE, y + half)))
    return mask


def holes(count: int) -> list[Hole]:
    """Pictures of one shape, which is to become another one in another colour: combinations that are held out."""
    random = Random(0)
    made = []
    for scene in held_out()[:count]:
        shape = random.choice([each for each in SHAPES if each != scene.shape])
        colour = random.choice([each for each in COLOURS if each not in (scene.colour, scene.background)])
        picture = draw(scene._replace(shape=shape, colour=colour), random)
        made.append(Hole(picture, around(picture, scene.size), scene))
    return made


def pasted(hole: Hole, drawn: Image.Image) -> Image.Image:
    """The picture with what was drawn in its hole, as programs that paint in pictures give it back."""
    return Image.composite(drawn, hole.picture, hole.mask)


def filled(hole: Hole, drawn: Image.Image) -> bool:
    """Whether the pasted picture shows what it is to show, and what was drawn goes on beyond the hole as the picture.

    The shape, its colour and the background's, which the prompt does not say. A shape that leaves the hole is cut off
    where it is pasted, and is a difference outside of it.
    """
    seen, scene = classify(pasted(hole, drawn)), hole.scene
    right = (seen.shape, seen.colour, seen.background) == (scene.shape, scene.colour, scene.background)
    return right and difference(hole, drawn) < KEPT


def difference(hole: Hole, drawn: Image.Image) -> float:
    """How far what was drawn is from the picture outside of the hole: mean of levels, 0..255."""
    outside = np.asarray(hole.mask) == 0
    return float(np.abs(np.asarray(drawn).astype(int) - np.asarray(hole.picture).astype(int))[outside].mean())


def painted(pipeline: Any, cases: list[Hole]) -> list[Image.Image]:
    """What diffusers' pipeline draws for each hole, its number as its seed."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        [hole.prompt for hole in cases],
        image=[hole.picture for hole in cases],
        mask_image=[hole.mask for hole in cases],
        strength=1.0,
        guidance_scale=3.0,
        num_inference_steps=20,
        generator=[torch.Generator().manual_seed(number) for number in range(len(cases))],
        height=SIDE,
        width=SIDE,
    ).images


def untrained() -> StableDiffusionInpaintPipeline:
    """The small checkpoint as a run of method=inpaint begins: widened, and with nothing learned."""
    parts = dict(StableDiffusionPipeline.from_pretrained(assets_dir() / "shapes", dtype=torch.float32).components)
    widen(parts["unet"])
    return StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)


def pack(path: Path) -> None:
    """An archive of pictures with captions and masks to learn from; nothing of it is held out."""
    random = Random(11)
    with zipfile.ZipFile(path, "w") as archive:
        for number, scene in enumerate(training_scenes(PACKED, random)):
            picture = draw(scene, random)
            hole = Hole(picture, around(picture, scene.size), scene)
            files = {".png": encoded(picture), "-masklabel.png": encoded(hole.mask.convert("1")), ".txt": hole.prompt}
            for ending, content in files.items():
                archive.writestr(
                    zipfile.ZipInfo(f"{number:03d}{ending}"), content
                )  # of no date: the same bytes each time


def encoded(picture: Image.Image) -> bytes:
    """As a PNG file."""
    file = BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pack", type=Path, help="write the archive of the preset, and nothing else")
    parser.add_argument("--checkpoint", type=Path, help="the folder that a run of method=inpaint wrote")
    parser.add_argument("--count", type=int, default=40, help="holes")
    parser.add_argument("--sheet", type=Path, help="where the first ones are shown, before and after")
    arguments = parser.parse_args()
    if arguments.pack:
        return pack(arguments.pack)
    cases = holes(arguments.count)
    trained = StableDiffusionInpaintPipeline.from_pretrained(arguments.checkpoint, dtype=torch.float32)
    drawn = {"before": painted(untrained(), cases), "after": painted(trained, cases)}
    for when, pictures in drawn.items():
        print(f"{when}: {sum(map(filled, cases, pictures))} of {len(cases)} holes are filled with what the prompt says")
    if arguments.sheet:
        columns = zip(cases[:SHOWN], drawn["before"], drawn["after"])
        rows = [(hole.prompt, [hole.picture, hole.shown(), *pair]) for hole, *pair in columns]
        sheet(rows, ["picture", "hole", *drawn]).quantize(dither=Image.Dither.NONE).save(arguments.sheet)


if __name__ == "__main__":
    main()
