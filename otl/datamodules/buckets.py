"""Aspect buckets: the nearest of the sizes, and the cut that fills it. Pure geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from otl.sizes import Crop, Size

Ints = NDArray[Any]


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
