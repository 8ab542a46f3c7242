"""Where every image is cut, and the batches of an epoch: functions of sizes, seed and epoch alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from otl import rng
from otl.config import PartialBatches
from otl.datamodules import buckets as geometry
from otl.types import Crop, Sample, Size


@dataclass(frozen=True)
class Place:
    """What of an image is shown to the model."""

    bucket: Size
    scaled: Size  # of the whole image, before the bucket is cut out
    crop: Crop
    scale: float  # scaled / file; above 1 the image is enlarged
    cropped_fraction: float  # share of the area that is cut off, 0..1
    repeats: int  # times an epoch


@dataclass(frozen=True)
class Layout:
    """A place for every sample, in the samples' order."""

    places: list[Place]

    @property
    def buckets(self) -> dict[Size, list[int]]:
        """Bucket -> numbers of its samples, ascending; the buckets from wide to tall, empty ones left out."""
        members = defaultdict(list)
        for index, place in enumerate(self.places):
            members[place.bucket].append(index)
        return {bucket: members[bucket] for bucket in sorted(members, key=lambda size: (size.h / size.w, size))}


Draw = tuple[int, int]
"""Sample number, and which of its repeats."""


def layout(samples: Sequence[Sample], *, resolution: int, step: int, buckets: bool) -> Layout:
    """Give every sample its bucket.

    Args:
        samples: of one dataset.
        resolution: pixels per side of the square with a bucket's area.
        step: sides are multiples of it, pixels.
        buckets: whether there are aspect buckets; else all images become one square.
    """
    sizes = geometry.grid(resolution, step) if buckets else geometry.square(resolution, step)
    return Layout([place(sample, geometry.nearest(sample.size, sizes)) for sample in samples])


def place(sample: Sample, bucket: Size) -> Place:
    scaled, crop = geometry.fit(sample.size, bucket)
    return Place(
        bucket,
        scaled,
        crop,
        scale=geometry.scale(sample.size, bucket),
        cropped_fraction=geometry.cropped_fraction(sample.size, bucket),
        repeats=sample.repeats,
    )


def batches(
    layout: Layout,
    *,
    batch_size: int,
    partial: PartialBatches,
    seed: int,
    epoch: int,
    rank: int = 0,
    world_size: int = 1,
) -> list[list[Draw]]:
    """The batches of one epoch and rank, in order. Their number is the same every epoch and on every rank.

    Args:
        layout: of the samples to train on.
        batch_size: images.
        partial: what happens to the last images of a bucket.
        seed: of the run.
        epoch: counted from 0.
        rank: of this process; where the batches cannot be shared out evenly, the first ones are seen twice.
        world_size: number of processes.
    """
    everything: list[list[Draw]] = []
    for bucket, members in layout.buckets.items():
        draws = [(index, repeat) for index in members for repeat in range(layout.places[index].repeats)]
        order = rng.permutation(len(draws), seed, epoch, "bucket", bucket.h, bucket.w)
        everything += _cut([draws[number] for number in order], batch_size, partial)
    shuffled = [everything[number] for number in rng.permutation(len(everything), seed, epoch, "batches")]
    shuffled += [shuffled[number % len(everything)] for number in range(-len(everything) % world_size)]
    return shuffled[rank::world_size]


def _cut(draws: list[Draw], batch_size: int, partial: PartialBatches) -> list[list[Draw]]:
    """One bucket's draws -> its batches."""
    rest = len(draws) % batch_size
    if rest and partial == PartialBatches.pad:
        draws = draws + _padding(draws, batch_size - rest)
    elif rest and partial == PartialBatches.drop:
        draws = draws[:-rest]
    return [draws[start : start + batch_size] for start in range(0, len(draws), batch_size)]


def _padding(draws: list[Draw], count: int) -> list[Draw]:
    """More draws of the same images, with repeat numbers of their own and so with other noise."""
    repeats = dict.fromkeys((index for index, _ in draws), 0)
    for index, repeat in draws:
        repeats[index] = max(repeats[index], repeat + 1)
    extra = []
    for number in range(count):
        index = draws[number % len(draws)][0]
        extra.append((index, repeats[index]))
        repeats[index] += 1
    return extra
