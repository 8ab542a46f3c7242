"""The sizes of a resolution's aspect buckets. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable

from otl.sizes import Size

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


def _rounded(h: float, w: float, resolution: int, step: int) -> Size:
    """A ratio -> the size of the resolution's area; Python's rounding, halves to even, as OneTrainer does."""
    side = math.sqrt(h * w)
    return Size(*(max(step, round(each / side * resolution / step) * step) for each in (h, w)))
