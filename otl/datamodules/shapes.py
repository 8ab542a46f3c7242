"""Which buckets the settings ask for, and at which resolutions images are shown. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from otl.config import Data, SettingsError
from otl.datamodules import grid
from otl.sizes import Size

RUNG = 64  # pixels that images go down by where none is enlarged, and the shortest side of what they go down to


def resolutions(asked: Any, default: int) -> list[int]:
    """`data.resolution`, or a concept's: a number, a list of them, or null."""
    if asked is None:
        return [default]
    return [asked] if isinstance(asked, int) else list(asked)


def side(data: Data, default: int, step: int) -> int:
    """Pixels per side of the square that stands for all buckets: what is drawn and exported has it."""
    areas = [size.area for size in custom(data.bucket_sizes, step)]
    if areas:
        return round(math.sqrt(max(areas)) / step) * step
    return max(grid.square(each, step)[0].h for each in resolutions(data.resolution, default))


def by_concept(data: Data, default: int, step: int) -> dict[str, list[int]]:
    """The resolutions of each concept's images; those of `data.path` are under "data".

    Args:
        default: where neither the concept nor the dataset names any.
        step: sides are multiples of it, pixels.

    Raises:
        SettingsError: two resolutions of one concept have the same buckets.
    """
    common = resolutions(data.resolution, default)
    named = {
        name: resolutions(concept.resolution, default)
        for name, concept in data.concepts.items()
        if concept.resolution is not None
    }
    for key, asked in {"data": common, **{f"data.concepts.{name}": asked for name, asked in named.items()}}.items():
        _require_different(f"{key}.resolution", asked, data, step)
    return {"data": common, **dict.fromkeys(data.concepts, common), **named}


def shown_at(data: Data, default: int, step: int) -> list[int]:
    """All resolutions of the dataset, from small to large."""
    return sorted({each for asked in by_concept(data, default, step).values() for each in asked})


def ladder(data: Data, resolution: int, step: int) -> list[list[Size]]:
    """The buckets of a resolution; where no image is enlarged, then those of smaller and smaller ones.

    Raises:
        SettingsError: no bucket is left, or a size is none of the family's.
    """
    if data.bucket_sizes:
        return [custom(data.bucket_sizes, step)]
    rung = max(RUNG, step)
    below = range((resolution - 1) // rung * rung, 0, -rung) if data.no_upscale else ()
    make = grid.grid if data.buckets else grid.square
    rungs = [_within(make(each, step), data) for each in (resolution, *below)]
    if not rungs[0]:
        raise SettingsError(
            f"data.resolution={resolution} has no bucket with sides of {data.min_bucket_side or 0} to "
            f"{data.max_bucket_side or 'any number of'} pixels: change data.min_bucket_side or data.max_bucket_side"
        )
    return [rung for rung in rungs if rung]


def custom(texts: Sequence[str], step: int) -> list[Size]:
    """`data.bucket_sizes`, from wide to tall.

    Raises:
        SettingsError: a side is no multiple of the family's step.
    """
    sizes = [Size(*map(int, text.split("x"))) for text in texts]
    for size in sizes:
        fitting = Size(*(max(step, round(each / step) * step) for each in size))
        if size != fitting:
            raise SettingsError(
                f"data.bucket_sizes={size} (height x width): sides must be multiples of {step} pixels for this family; "
                f"the nearest is {fitting}"
            )
    return grid.ordered(sizes)


def _require_different(key: str, asked: Sequence[int], data: Data, step: int) -> None:
    seen: dict[tuple[Size, ...], int] = {}
    for resolution in asked if len(asked) > 1 else ():
        other = seen.setdefault(tuple(ladder(data, resolution, step)[0]), resolution)
        if other != resolution:
            raise SettingsError(
                f"{key}: {other} and {resolution} have the same buckets, whose sides are multiples of {step} pixels: "
                "leave one out"
            )


def _within(sizes: list[Size], data: Data) -> list[Size]:
    low = max(data.min_bucket_side or 0, RUNG if data.no_upscale else 0)
    high = data.max_bucket_side or math.inf
    return [size for size in sizes if low <= min(size) and max(size) <= high]
