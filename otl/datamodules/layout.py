"""Where every image is cut: a function of sizes alone. Compact: a place is worked out when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from otl.datamodules import buckets as geometry
from otl.datamodules.buckets import Ints
from otl.types import Crop, Sample, Size


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
    """A bucket for every sample."""

    samples: list[Sample]
    sizes: list[Size]  # the buckets that have samples, from wide to tall
    numbers: Ints  # [samples] which of them

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
        return place(self.layout.samples[index], self.layout.sizes[self.layout.numbers[index]])

    def __iter__(self) -> Iterator[Place]:
        return map(self.__getitem__, range(len(self)))


def layout(samples: Sequence[Sample], *, resolution: int, step: int, buckets: bool) -> Layout:
    """Give every sample its bucket.

    Args:
        samples: of one dataset.
        resolution: pixels per side of the square with a bucket's area.
        step: sides are multiples of it, pixels.
        buckets: whether there are aspect buckets; else all images become one square.
    """
    sizes = geometry.grid(resolution, step) if buckets else geometry.square(resolution, step)
    found = geometry.assigned(np.array([sample.size for sample in samples]).reshape(-1, 2), sizes)
    used, numbers = np.unique(found, return_inverse=True)
    return Layout(list(samples), [sizes[number] for number in used], numbers.astype(np.int32))


def place(sample: Sample, bucket: Size) -> Place:
    """Where an image is cut."""
    scaled, crop = geometry.fit(sample.size, bucket)
    return Place(
        bucket,
        scaled,
        crop,
        scale=geometry.scale(sample.size, bucket),
        cropped_fraction=geometry.cropped_fraction(sample.size, bucket),
    )
