"""Aspect buckets: the sizes of a resolution, the nearest of them, and the cut that fills it. Pure geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence

from otl.types import Crop, Size

ASPECTS = (1, 1.25, 1.5, 1.75, 2, 2.5, 3, 3.5, 4)  # long side / short side


def grid(resolution: int, step: int) -> list[Size]:
    """The buckets of a resolution, from wide to tall.

    Args:
        resolution: pixels per side of the square whose area all buckets have, nearly.
        step: every side is a multiple of it, pixels.
    """
    sizes = {_rounded(1, aspect, resolution, step) for aspect in ASPECTS}
    sizes |= {_rounded(aspect, 1, resolution, step) for aspect in ASPECTS}
    return sorted(sizes, key=lambda size: (size.h / size.w, size))


def square(resolution: int, step: int) -> list[Size]:
    """The one bucket of a run without aspect buckets."""
    return [_rounded(1, 1, resolution, step)]


def nearest(size: Size, sizes: Sequence[Size]) -> Size:
    """The bucket whose ratio is nearest, as much too wide counting like as much too tall.

    Of equally near ones, the one nearer to the square, then the larger, then the taller.
    """
    wanted = math.log(size.h / size.w)

    def order(bucket: Size) -> tuple[float, float, int, int]:
        ratio = math.log(bucket.h / bucket.w)
        return round(abs(ratio - wanted), 9), round(abs(ratio), 9), -bucket.area, -bucket.h

    return min(sizes, key=order)


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
