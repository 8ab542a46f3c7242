"""Masks of an inpainting model: 1 is to be painted. Read from files, or generated from a key."""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from otl import rng
from otl.config import Inpaint, MaskSource
from otl.datamodules import images
from otl.datamodules.views import View
from otl.types import Problem, Sample, Size

VERSION = 1  # part of the cache's keys: raise it when the same file gives another mask
LABEL = "-masklabel"
EXTENSIONS = (".png", ".webp", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
ASPECT = 2.0  # boxes and ellipses are at most so many times longer than wide, before they meet the picture's edge
STROKES, CORNERS = (1, 3), (2, 5)  # of a brush mask: how many lines, and of how many points each
COARSE = 128  # cells of the longer side of the grid on which the distance to a brush's lines is computed


def find(image: Path, root: Path, folder: Path | None) -> Path | None:
    """The mask file of an image, if there is one.

    Args:
        image: its file.
        root: the folder that was searched for images.
        folder: of masks, with the names and subfolders of `root`; None: beside the image.
    """
    if folder is None:
        stem = image.with_name(image.stem + LABEL)
    else:
        stem = folder / image.relative_to(root).with_suffix("")
    names = [stem.with_name(stem.name + extension) for extension in EXTENSIONS]
    return next((name for name in names if name.is_file()), None)


def folders(options: Inpaint) -> list[Path]:
    """Where there are masks and no images to train on."""
    return [] if options.folder is None else [Path(options.folder).expanduser()]


def attached(samples: list[Sample], root: Path, options: Inpaint) -> tuple[list[Sample], list[Problem]]:
    """The samples with their mask files, and which of these cannot be used. Reads headers only.

    Args:
        root: the folder that was searched for the samples.
    """
    if options.masks == MaskSource.generated:
        return samples, []
    folder = next(iter(folders(options)), None)
    found = [replace(sample, mask=find(sample.path, root, folder)) for sample in samples]
    with ThreadPoolExecutor() as pool:
        unfit = [reason for reason in pool.map(_unfit, found) if reason]
    if not unfit:
        return found, []
    message = (
        f"{len(unfit)} mask files cannot be laid over their images; mend them, or leave them out with "
        "inpaint.masks=generated"
    )
    return found, [Problem("inpaint.masks", message, details=unfit)]


def lacking(samples: list[Sample], options: Inpaint) -> list[Problem]:
    """What there is to say of images without a mask file."""
    bare = [str(sample.path) for sample in samples if sample.mask is None]
    where = options.folder or f"the images' own, as NAME{LABEL}.png"
    if options.masks == MaskSource.files and bare:
        message = (
            f"{len(bare)} of {len(samples)} images have no mask file in the folder {where}; add them, or have "
            "masks generated for these images with inpaint.masks=both"
        )
        return [Problem("inpaint.masks", message, details=bare)]
    if options.masks == MaskSource.both and options.folder is not None and len(bare) == len(samples):
        message = f"{options.folder} has no mask for any image: masks are named as the images, in the same subfolders"
        return [Problem("inpaint.folder", message)]
    return []


def _unfit(sample: Sample) -> str | None:
    """Why the mask of a sample cannot be used, if it has one."""
    if sample.mask is None:
        return None
    try:
        size = images.header_size(sample.mask)
    except images.UNREADABLE as error:
        return f"{sample.mask}: {images.reason(error)}"
    if fits(size, sample.size):
        return None
    return f"{sample.mask}: {size} (height x width) does not have the shape of {sample.name}, {sample.size}"


def mask(sample: Sample, view: View, key: int, options: Inpaint) -> Tensor:
    """[1, H, W] float32 of 0 and 1: the sample's file, else generated.

    Args:
        view: of the image.
        key: of `rng.key`; the same one gives the same mask.
    """
    return read(sample.mask, view) if sample.mask is not None else generated(key, view.bucket, options)


def read(path: Path, view: View) -> Tensor:
    """[1, H, W] float32 of 0 and 1: the part of a mask that lies over what the view shows of its image.

    Raises:
        SettingsError: the file cannot be read.
    """
    grey = torch.from_numpy(np.array(images.load(path, "black").convert("L")))[None, None].float()
    return (images.cut(grey, view, mode="bilinear") > 127.5).float()


def fits(mask: Size, image: Size) -> bool:
    """Whether a mask of that size can lie over the image: the same aspect ratio, up to a pixel of the smaller one."""
    scale = min(mask.h / image.h, mask.w / image.w)
    return abs(mask.h - image.h * scale) <= 1 and abs(mask.w - image.w * scale) <= 1


def generated(key: int, size: Size, options: Inpaint) -> Tensor:
    """[1, H, W] float32 of 0 and 1, a function of the key.

    Each form is a field over the picture that grows outward from the form's middle; the pixels with the smallest values
    are masked, as many as the area asks for. So the area is right also where the form meets the edge.
    """
    generator = rng.generator(key, "mask")
    kind = choose(_uniform(generator), options)
    if kind == "whole":
        return torch.ones(1, *size)
    area = options.min_area + (options.max_area - options.min_area) * _uniform(generator)
    count = round(area * size.area)
    if count == 0:
        return torch.zeros(1, *size)
    field = FIELDS[kind](size, generator).flatten()
    return (field <= field.kthvalue(count).values).float().reshape(1, *size)


def choose(u: float, options: Inpaint) -> str:
    """A form, each as likely as its share.

    Args:
        u: uniform in 0..1.
    """
    shares = {"boxes": options.boxes, "brushes": options.brushes, "ellipses": options.ellipses, "whole": options.whole}
    left = u * sum(shares.values())
    for kind, share in shares.items():
        left -= share
        if left < 0:
            return kind
    return max(shares, key=lambda kind: shares[kind])


def masked(pixels: Tensor, mask: Tensor, fill: float) -> Tensor:
    """[..., 3, H, W] in -1..1 and [..., 1, H, W] of 0 and 1 -> the pixels with `fill` where the mask is 1."""
    return torch.where(mask > 0.5, torch.full_like(pixels, fill), pixels)


def _box(size: Size, generator: torch.Generator) -> Tensor:
    y, x = _around_a_point(size, generator)
    return torch.maximum(y.abs(), x.abs())


def _ellipse(size: Size, generator: torch.Generator) -> Tensor:
    y, x = _around_a_point(size, generator)
    return y.square() + x.square()


def _around_a_point(size: Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """[H, 1] and [1, W]: distances from a random point of the picture, in half axes of a random aspect ratio."""
    stretch = math.sqrt(ASPECT ** (2 * _uniform(generator) - 1))
    top, left = _uniform(generator) * size.h, _uniform(generator) * size.w
    y = (torch.arange(size.h, dtype=torch.float32) + 0.5 - top) / stretch
    x = (torch.arange(size.w, dtype=torch.float32) + 0.5 - left) * stretch
    return y[:, None], x[None, :]


def _brush(size: Size, generator: torch.Generator) -> Tensor:
    """[H, W]: distance to the nearest of a few random lines, in pixels."""
    starts, ends = [], []
    for _ in range(_between(STROKES, generator)):
        points = torch.rand(_between(CORNERS, generator), 2, generator=generator) * torch.tensor([size.h, size.w])
        starts.append(points[:-1])
        ends.append(points[1:])
    cell = max(1.0, max(size) / COARSE)
    h, w = math.ceil(size.h / cell), math.ceil(size.w / cell)
    y = (torch.arange(h) + 0.5) * size.h / h
    x = (torch.arange(w) + 0.5) * size.w / w
    grid = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)
    distance = _to_segments(grid, torch.cat(starts), torch.cat(ends))
    return functional.interpolate(distance[None, None], size=tuple(size), mode="bilinear")[0, 0]


def _to_segments(points: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """[H, W, 2] points, [S, 2] segments from start to end -> [H, W] distance to the nearest segment."""
    along = ends - starts
    offset = points[..., None, :] - starts
    share = (offset * along).sum(-1) / along.square().sum(-1).clamp(min=1e-12)
    return (offset - share.clamp(0, 1)[..., None] * along).norm(dim=-1).amin(-1)


def _uniform(generator: torch.Generator) -> float:
    return torch.rand((), generator=generator, dtype=torch.float64).item()


def _between(range: tuple[int, int], generator: torch.Generator) -> int:
    return int(torch.randint(range[0], range[1] + 1, (), generator=generator))


FIELDS: dict[str, Callable[[Size, torch.Generator], Tensor]] = {"boxes": _box, "ellipses": _ellipse, "brushes": _brush}
