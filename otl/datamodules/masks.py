"""Masks: 1 is to be painted, or counts in the loss. Read from files, or generated from a key."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from otl import rng
from otl.config import Inpaint
from otl.datamodules import images
from otl.datamodules.views import View
from otl.types import File, Sample, Size

VERSION = 2  # part of the cache's keys: raise it when the same file gives another mask
ASPECT = 2.0  # boxes and ellipses are at most so many times longer than wide, before they meet the picture's edge
STROKES, CORNERS = (1, 3), (2, 5)  # of a brush mask: how many lines, and of how many points each
COARSE = 128  # cells of the longer side of the grid on which the distance to a brush's lines is computed


def mask(sample: Sample, view: View, key: int, options: Inpaint, *, soft: bool = False) -> Tensor:
    """[1, H, W] float32: the sample's own mask, else a generated one.

    Args:
        view: of the image.
        key: of `rng.key`; the same one gives the same mask.
        options: how masks are generated.
        soft: whether greys stay; else there are only 0 and 1.
    """
    if sample.mask is None:
        return generated(key, view.bucket, options)
    return read(sample.mask, view, alpha=sample.mask == sample.path, soft=soft)


def read(path: File, view: View, *, alpha: bool = False, soft: bool = False) -> Tensor:
    """[1, H, W] float32 in 0..1: the part of a mask that lies over what the view shows of its image.

    Args:
        path: of the mask.
        alpha: whether it is the file's alpha channel; else its brightness, what is transparent being black.
        soft: whether greys stay; else there are only 0 and 1.

    Raises:
        SettingsError: the file cannot be read.
    """
    grey = images.alpha(path) if alpha else images.grey(path)
    levels = images.cut(torch.from_numpy(np.array(grey))[None, None].float(), view, mode="bilinear")
    return levels / 255 if soft else (levels > 127.5).float()


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
