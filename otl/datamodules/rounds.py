"""Which images are drawn when: endless rounds, cut into epochs of one length. Functions of groups and seed alone.

In a round every group of images has the draws that its concept asks for, on average; a batch never spans two rounds.
Lightning asks once how long an epoch is, so an epoch is a fixed number of batches. Where every group has a whole number
of draws a round, all rounds have as many batches and each of them is an epoch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import overload

import numpy as np

from otl import rng
from otl.config import Concept, PartialBatches
from otl.datamodules.buckets import Ints
from otl.datamodules.layout import Layout
from otl.types import Size

Draw = tuple[int, int]
"""Sample number, and which of its draws in this round."""

Request = tuple[int | str, list[Draw]]
"""The round and the draws of a batch; the round travels with them, because the random keys depend on it."""

SURVEYED = 100  # rounds, whose mean is the length of an epoch
CHUNK = 4096  # rounds looked through at a time


@dataclass(frozen=True)
class Group:
    """The images of one concept in one bucket, which are drawn in turn."""

    concept: str
    bucket: Size
    members: Ints  # sample numbers, ascending
    share: Fraction  # draws of each of them a round
    seed: int  # of the order of their turns

    @property
    def quota(self) -> Fraction:
        """Draws a round."""
        return self.share * len(self.members)

    def turns(self, start: int, stop: int) -> Ints:
        """A part of the endless sequence of turns, in which all members come before any comes again."""
        count = len(self.members)
        passes = range(start // count, -(-stop // count))
        parts = [self._pass(n, max(start - n * count, 0), min(stop - n * count, count)) for n in passes]
        return np.concatenate([self.members[:0], *parts])

    def _pass(self, number: int, start: int, stop: int) -> Ints:
        if (start, stop) == (0, len(self.members)):
            return self.members  # their order does not matter
        # One order until a pass and a round end together: in a round, two images then differ by one draw at most.
        lap = number // self.share.numerator
        order = rng.permutation(len(self.members), self.seed, "turns", lap, self.concept, *self.bucket)
        return self.members[order[start:stop]]


def groups(layout: Layout, concepts: Mapping[str, Concept], seed: int) -> list[Group]:
    """The groups of a layout, by bucket.

    Args:
        concepts: how often the images of each are drawn; once a round where a name is not among them.
        seed: of the run, for concepts without one of their own.
    """
    names = layout.samples.concepts
    totals = Counter(names.tolist())
    found = []
    for bucket, members in layout.buckets.items():
        for name in dict.fromkeys(names[members].tolist()):
            concept, own = concepts.get(name, Concept()), members[names[members] == name]
            seed_ = seed if concept.seed is None else concept.seed
            found.append(Group(name, bucket, own, share(concept, totals[name]), seed_))
    return found


def share(concept: Concept, images: int) -> Fraction:
    """Draws a round of each of so many images of a concept."""
    if concept.samples is not None:
        return Fraction(concept.samples, images)
    return Fraction(str(concept.repeats))  # by way of the text: 0.1 is a tenth


@dataclass(frozen=True, eq=False)
class Epoch(Sequence[Request]):
    """The batches of one rank in an epoch, in order. Compact: a batch becomes a list when it is asked for."""

    draws: Ints  # [draws, 2] sample number, and which of its draws in its round
    bounds: Ints  # [batches, 2] first draw, and the one behind the last
    rounds: Ints  # [batches]

    def __len__(self) -> int:
        return len(self.bounds)

    @overload
    def __getitem__(self, which: int) -> Request: ...

    @overload
    def __getitem__(self, which: slice) -> Epoch: ...

    def __getitem__(self, which: int | slice) -> Request | Epoch:
        if isinstance(which, slice):
            return Epoch(self.draws, self.bounds[which], self.rounds[which])
        start, stop = self.bounds[which].tolist()
        return int(self.rounds[which]), [(index, draw) for index, draw in self.draws[start:stop].tolist()]

    @property
    def indices(self) -> Ints:
        """The sample number of every draw."""
        return np.concatenate([self.draws[:0, 0], *(self.draws[start:stop, 0] for start, stop in self.bounds.tolist())])


class Rounds:
    """The endless stream of batches.

    Args:
        groups: those of one bucket beside each other.
        batch_size: images.
        partial: what happens to the last draws of a bucket in a round.
        seed: of the run.
    """

    def __init__(self, groups: Sequence[Group], *, batch_size: int, partial: PartialBatches, seed: int) -> None:
        self.groups, self.batch_size, self.partial, self.seed = groups, batch_size, partial, seed
        self.buckets = [list(each) for _, each in groupby(groups, key=lambda group: group.bucket)]
        self._firsts = np.cumsum([0, *map(len, self.buckets)])[:-1]  # number of each bucket's first group
        self._numerators = np.array([group.quota.numerator for group in groups], dtype=np.int64)
        self._denominators = np.array([group.quota.denominator for group in groups], dtype=np.int64)
        self._phases = _phases([group.quota for group in groups])
        mean = float(self.batches(np.arange(SURVEYED)).mean())
        self.length = max(1, round(mean)) if mean else 0  # batches an epoch, of all ranks

    @property
    def pace(self) -> dict[str, int]:
        """Concept -> how often each of its images is drawn in a round at most."""
        return {group.concept: math.ceil(group.share) for group in self.groups}

    def drawn(self, rounds: Ints) -> Ints:
        """[R] -> [R, groups] how often each has been drawn before the round: the quotas' multiples, rounded."""
        return (rounds[:, None] * self._numerators + self._phases) // self._denominators

    def draws(self, rounds: Ints) -> Ints:
        """[R] -> [R, buckets] draws in the round."""
        if not self.buckets:
            return np.zeros((len(rounds), 0), dtype=np.int64)
        return np.add.reduceat(self.drawn(rounds + 1) - self.drawn(rounds), self._firsts, axis=1)

    def batches(self, rounds: Ints) -> Ints:
        """[R] -> [R] batches in the round."""
        rest = self.batch_size - 1 if self.partial != PartialBatches.drop else 0
        return ((self.draws(rounds) + rest) // self.batch_size).sum(1)

    def epoch(self, number: int, *, rank: int = 0, world_size: int = 1) -> Epoch:
        """The batches of one epoch and rank. Their number is the same every epoch and on every rank.

        Args:
            number: counted from 0.
            rank: of this process; where the batches cannot be shared out evenly, the first ones come again, and are
                not to count: see `BucketedDataModule.fills`.
            world_size: number of processes.
        """
        draws, bounds, rounds = [np.zeros((0, 2), np.int32)], [np.zeros((0, 2), np.int64)], [np.zeros(0, np.int64)]
        current, skipped = self._find(number * self.length)
        while (lacking := self.length - sum(map(len, bounds))) > 0:
            of_round, cuts = self.round(current)
            bounds.append(cuts[skipped : skipped + lacking] + sum(map(len, draws)))
            draws.append(of_round)
            rounds.append(np.full(len(bounds[-1]), current))
            current, skipped = current + 1, 0
        order = np.arange(-(-self.length // world_size) * world_size) % max(1, self.length)
        chosen = order[rank::world_size]
        return Epoch(np.concatenate(draws), np.concatenate(bounds)[chosen], np.concatenate(rounds)[chosen])

    def round(self, number: int) -> tuple[Ints, Ints]:
        """All draws of a round [draws, 2], and the bounds of its batches [batches, 2] in their order."""
        start, stop = self.drawn(np.array([number, number + 1])).tolist()
        draws, bounds = [np.zeros((0, 2), np.int32)], [np.zeros((0, 2), np.int64)]
        for first, bucket in zip(self._firsts, self.buckets):
            turns = [group.turns(start[first + k], stop[first + k]) for k, group in enumerate(bucket)]
            size = bucket[0].bucket
            mixed = _numbered(np.concatenate(turns))
            mixed = mixed[rng.permutation(len(mixed), self.seed, number, "bucket", *size)]
            whole = _filled(mixed, self.batch_size, self.partial)
            bounds.append(_cuts(len(whole), self.batch_size) + sum(map(len, draws)))
            draws.append(whole)
        everything = np.concatenate(bounds)
        return np.concatenate(draws), everything[rng.permutation(len(everything), self.seed, number, "batches")]

    def _find(self, position: int) -> tuple[int, int]:
        """A batch of the stream -> its round, and how many batches of the round come before it."""
        if not self.length or (self._denominators == 1).all():
            return divmod(position, max(1, self.length))
        number = 0
        while True:
            ends = np.cumsum(self.batches(np.arange(number, number + CHUNK)))
            inside = int(np.searchsorted(ends, position, side="right"))
            if inside < CHUNK:
                return number + inside, position - int(ends[inside - 1] if inside else 0)
            number, position = number + CHUNK, position - int(ends[-1])


def _phases(quotas: Sequence[Fraction]) -> Ints:
    """What each group begins with, in parts of its denominator: small groups then come up in different rounds."""
    phases, before = [], Fraction(0)
    for quota in quotas:
        phases.append(int(before * quota.denominator))
        before = (before + quota) % 1
    return np.array(phases, dtype=np.int64)


def _numbered(indices: Ints) -> Ints:
    """[draws] sample numbers -> [draws, 2], ascending, each with how often it has come before."""
    ascending = np.sort(indices).astype(np.int32)
    before = np.arange(len(ascending)) - np.searchsorted(ascending, ascending)
    return np.stack([ascending, before.astype(np.int32)], axis=1)


def _filled(draws: Ints, batch_size: int, partial: PartialBatches) -> Ints:
    """The draws of one bucket as its batches need them: some added, or left out."""
    rest = len(draws) % batch_size
    if rest and partial == PartialBatches.pad:
        return np.concatenate([draws, _padding(draws, batch_size - rest)])
    return draws[:-rest] if rest and partial == PartialBatches.drop else draws


def _padding(draws: Ints, count: int) -> Ints:
    """More draws of the same images, with numbers of their own and so with other noise."""
    extra = draws[np.arange(count) % len(draws)]
    times = Counter(draws[np.isin(draws[:, 0], extra[:, 0]), 0].tolist())
    for row in extra:
        row[1] = times[int(row[0])]
        times[int(row[0])] += 1
    return extra


def _cuts(count: int, batch_size: int) -> Ints:
    """[batches, 2] the bounds of batches of so many draws."""
    starts = np.arange(0, count, batch_size)
    return np.stack([starts, np.minimum(starts + batch_size, count)], axis=1)
