"""Aspect buckets: the sizes of a resolution, the nearest of them, and the cut that fills it. Pure geometry."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otl.types import Crop, Size

Ints = NDArray[Any]

ASPECTS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4)  # long side / short side


def grid(resolution: int, step: int) -> list[Size]:
    """The buckets of a resolution, from wide to tall.

    Args:
        resolution: pixels per side of the square whose area all buckets have, nearly.
        step: every side is a multiple of it, pixels.
    """
    sizes = {_rounded(1, aspect, resolution, step) for aspect in ASPECTS}
    sizes |= {_rounded(aspect, 1, resolution, step) for aspect in ASPECTS}
    return ordered(sizes)


def square(resolution: int, step: int) -> list[Size]:
    """The one bucket of a run without aspect buckets."""
    return [_rounded(1, 1, resolution, step)]


def ordered(sizes: Iterable[Size]) -> list[Size]:
    """From wide to tall, each once."""
    return sorted(set(sizes), key=lambda size: (size.h / size.w, size))


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose ratio is nearest: see `assigned`."""
    return sizes[int(assigned(np.array([size]), sizes)[0])]


def assigned(images: Ints, sizes: Sequence[Size], *, enlarge: bool = True) -> Ints:
    """[N, 2] heights and widths -> [N] number of the bucket whose ratio is nearest; -1 where there is none.

    As much too wide counts like as much too tall. Of equally near ones, the one that enlarges the image least is taken,
    then the one nearer to the square, then the larger, then the taller.

    Args:
        images: pixels.
        sizes: of the buckets.
        enlarge: whether an image may be made larger than it is.
    """
    wanted = np.log(images[:, 0] / images[:, 1])
    ratios = [math.log(size.h / size.w) for size in sizes]
    best, least, growth = (np.full(len(images), each) for each in (-1, np.inf, np.inf))
    for number in sorted(range(len(sizes)), key=lambda n: (round(abs(ratios[n]), 9), -sizes[n].area, -sizes[n].h)):
        distance = np.abs(ratios[number] - wanted).round(9)
        grown = np.maximum(np.array(sizes[number]) / images, 1).max(1)
        better = (distance < least) | ((distance == least) & (grown < growth))
        if not enlarge:
            better &= grown == 1
        best[better], least[better], growth[better] = number, distance[better], grown[better]
    return best


def scale(size: Size, bucket: Size) -> float:
    """The factor by which an image is resized so that it just covers the bucket; above 1 it is enlarged."""
    return max(bucket.h / size.h, bucket.w / size.w)


def fit(size: Size, bucket: Size) -> tuple[Size, Crop]:
    """An image's size -> the size it is scaled to, and where the bucket is cut out of its centre."""
    factor = scale(size, bucket)
    scaled = Size(max(bucket.h, round(size.h * factor)), max(bucket.w, round(size.w * factor)))
    return scaled, Crop((scaled.h - bucket.h) // 2, (scaled.w - bucket.w) // 2)


def cropped_fraction(size: Size, bucket: Size) -> float:
    """The share of the image's area that the bucket does not show, 0..1."""
    factor = scale(size, bucket)
    return max(0.0, 1 - bucket.area / (size.area * factor * factor))


def _rounded(h: float, w: float, resolution: int, step: int) -> Size:
    """A ratio -> the size of the resolution's area; Python's rounding, halves to even, as OneTrainer does."""
    side = math.sqrt(h * w)
    return Size(*(max(step, round(each / side * resolution / step) * step) for each in (h, w)))
