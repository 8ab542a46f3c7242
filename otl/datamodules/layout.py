"""Where every image is cut: a function of sizes and settings. Compact: a place is worked out when it is asked for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from otl import rng
from otl.config import Data
from otl.datamodules import buckets as geometry
from otl.datamodules import grid, shapes
from otl.datamodules.buckets import Ints
from otl.datamodules.samples import Samples
from otl.types import Crop, Problem, Sample, Size


@dataclass(frozen=True)
class Place:
    """What of an image is shown to the model."""

    bucket: Size
    scaled: Size  # of the whole image, before the bucket is cut out
    crop: Crop
    scale: float  # scaled / file; above 1 the image is enlarged
    cropped_fraction: float  # share of the area that is cut off, 0..1


@dataclass(frozen=True)
class Layout:
    """A bucket for every sample: an image that is shown at several resolutions is there as several samples."""

    samples: Samples
    images: Ints  # [samples] number of the image among those that were to be laid out
    sizes: list[Size]  # the buckets that have samples, from wide to tall
    numbers: Ints  # [samples] which of them
    problems: list[Problem]  # which images have no place, and why

    @property
    def places(self) -> Places:
        """One for each sample."""
        return Places(self)

    @cached_property
    def buckets(self) -> dict[Size, Ints]:
        """Bucket -> numbers of its samples, ascending; from wide to tall."""
        order = np.argsort(self.numbers, kind="stable").astype(np.int32)
        ends = np.cumsum(np.bincount(self.numbers, minlength=len(self.sizes)))
        return dict(zip(self.sizes, np.split(order, ends[:-1])))


@dataclass(frozen=True)
class Places:
    """The place of each sample of a layout."""

    layout: Layout

    def __len__(self) -> int:
        return len(self.layout.samples)

    def __getitem__(self, index: int) -> Place:
        return place(self.layout.samples.size(index), self.layout.sizes[self.layout.numbers[index]])

    def __iter__(self) -> Iterator[Place]:
        return map(self.__getitem__, range(len(self)))


def layout(images: Sequence[Sample], data: Data, *, resolution: int, step: int, seed: int = 0) -> Layout:
    """Give every image its buckets.

    Args:
        images: of one dataset.
        data: the settings.
        resolution: pixels per side of the square with a bucket's area, where the settings name none.
        step: sides are multiples of it, pixels.
        seed: of the run.

    Raises:
        SettingsError: the settings ask for buckets that there cannot be.
    """
    images = Samples.of(images)
    sizes = images.sizes.astype(np.int64)
    fit, problems = _within_limits(images, sizes, data)
    asked = _by_resolution(images, fit, data, shapes.by_concept(data, resolution, step), seed)
    ladders = {each: shapes.ladder(data, each, step) for each in asked}
    buckets = grid.ordered(size for rungs in ladders.values() for rung in rungs for size in rung)
    found = [
        _descended(sizes, np.array(numbers), ladders[each], buckets, enlarge=not data.no_upscale)
        for each, numbers in asked.items()
    ]
    chosen, bucket = np.divmod(np.unique(np.concatenate([np.zeros(0, np.int64), *found])), max(1, len(buckets)))
    problems += _unplaced(images, np.setdiff1d(fit, chosen))
    used, numbers = np.unique(bucket, return_inverse=True)
    return Layout(
        images.take(chosen),
        chosen.astype(np.int32),
        [buckets[number] for number in used],
        numbers.astype(np.int32),
        problems,
    )


def _by_resolution(
    images: Samples, fit: Ints, data: Data, among: dict[str, list[int]], seed: int
) -> dict[int, list[int]]:
    """Resolution -> numbers of the images that are shown at it.

    Args:
        fit: numbers of the images to be shown.
        among: the resolutions of each concept.
    """
    found: dict[int, list[int]] = {}
    for number in fit.tolist():
        asked = among[images.concept(number)]
        for resolution in asked if data.each_resolution else [chosen(images[number], asked, seed)]:
            found.setdefault(resolution, []).append(number)
    return found


def chosen(image: Sample, among: list[int], seed: int) -> int:
    """One of several resolutions, by the image's name: other images do not matter."""
    return among[int(rng.uniform(seed, "resolution", image.name) * len(among))]


def _descended(sizes: Ints, asked: Ints, rungs: list[list[Size]], buckets: list[Size], *, enlarge: bool) -> Ints:
    """Pairs of an image and its bucket, on the first rung that has one for it, as image * len(buckets) + bucket.

    Args:
        sizes: [images, 2].
        asked: numbers of the images to be placed.
        rungs: buckets of smaller and smaller resolutions.
        buckets: all that there are.
    """
    found = [np.zeros(0, dtype=np.int64)]
    for rung in rungs:
        chosen = geometry.assigned(sizes[asked], rung, enlarge=enlarge)
        placed = chosen >= 0
        numbers = np.array([buckets.index(size) for size in rung])
        found.append(asked[placed] * len(buckets) + numbers[chosen[placed]])
        asked = asked[~placed]
    return np.concatenate(found)


def _within_limits(images: Sequence[Sample], sizes: Ints, data: Data) -> tuple[Ints, list[Problem]]:
    """The numbers of the images that the settings accept, and what is said of the others."""
    short, long = sizes.min(1), sizes.max(1)
    small = short < (data.min_side or 0)
    thin = (long > short * (data.max_aspect or math.inf)) & ~small
    problems = _left_out(
        "data.min_side",
        f"a side below {data.min_side} pixels",
        [(images[n], f"its shorter side has {int(short[n])} pixels") for n in np.flatnonzero(small)],
    )
    problems += _left_out(
        "data.max_aspect",
        f"a side more than {data.max_aspect} times the other",
        [(images[n], f"its longer side is {long[n] / short[n]:.2f} times the other") for n in np.flatnonzero(thin)],
    )
    return np.flatnonzero(~small & ~thin), problems


def _unplaced(images: Sequence[Sample], numbers: Ints) -> list[Problem]:
    """What is said of images that every bucket would enlarge."""
    files = [(images[n], f"{images[n].size} (height x width) is smaller than every bucket") for n in numbers]
    return _left_out("data.no_upscale", "fewer pixels than every bucket", files)


def _left_out(key: str, what: str, images: list[tuple[Sample, str]]) -> list[Problem]:
    if not images:
        return []
    files = [(str(image.path), why) for image, why in images]
    message = f"{len(images)} images with {what} are left out"
    return [Problem(key, message, False, [f"{path}: {why}" for path, why in files], files)]


def place(size: Size, bucket: Size) -> Place:
    """Where an image of that size is cut."""
    scaled, crop = geometry.fit(size, bucket)
    return Place(
        bucket,
        scaled,
        crop,
        scale=geometry.scale(size, bucket),
        cropped_fraction=geometry.cropped_fraction(size, bucket),
    )
