"""The samples of a dataset in a few arrays: a million of them take a third of the room, and forked workers share it."""

from __future__ import annotations

import copy
import pickle
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import overload

import numpy as np

from otl.datamodules.buckets import Ints
from otl.types import Sample, Size

FIELDS = [each.name for each in fields(Sample)]
KEPT = 2**14  # samples that are kept as objects


class Samples(Sequence[Sample]):
    """Each becomes an object when it is asked for; those asked for last are kept. To change one changes nothing here.

    Python's own objects cost more than twice as much, and a worker that only looks at one copies the page it lies on.
    """

    content: Ints  # [bytes] uint8, the pickled samples in a row
    ends: Ints  # [rows + 1] int64, where each begins, and the last ends
    names: list[str]  # of the concepts
    rows: Ints  # [samples] int32, which of the rows each is
    _sizes: Ints  # [rows, 2] int32
    _concepts: Ints  # [rows] int32, which of the names
    _made: dict[int, Sample]  # by row

    def __init__(self, samples: Iterable[Sample]) -> None:
        content, ends, sizes, concepts = bytearray(), array("q", [0]), array("i"), array("i")
        names: dict[str, int] = {}
        for sample in samples:
            content += pickle.dumps([getattr(sample, name) for name in FIELDS], pickle.HIGHEST_PROTOCOL)
            ends.append(len(content))
            sizes.extend(sample.size)
            concepts.append(names.setdefault(sample.concept, len(names)))
        self.content, self.ends = np.frombuffer(content, dtype=np.uint8), np.array(ends)
        self._sizes, self._concepts = np.array(sizes).reshape(-1, 2), np.array(concepts)
        self.names, self.rows, self._made = list(names), np.arange(len(concepts), dtype=np.int32), {}

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Samples:
        """The same samples, as they are if they are of this kind already."""
        return samples if isinstance(samples, cls) else cls(samples)

    def take(self, numbers: Ints) -> Samples:
        """Some of them, in that order, some maybe several times; nothing is copied."""
        taken = copy.copy(self)
        taken.rows = self.rows[numbers]
        return taken

    @property
    def sizes(self) -> Ints:
        """[samples, 2] height, width of the files, pixels."""
        return self._sizes[self.rows]

    @property
    def concepts(self) -> Ints:
        """[samples] the name of the concept of each."""
        return np.array(self.names, dtype=str)[self._concepts[self.rows]]

    def concept(self, number: int) -> str:
        """Of one sample; faster than by way of the sample, as is the next."""
        return self.names[self._concepts[self.rows[number]]]

    def size(self, number: int) -> Size:
        """Of its file, pixels."""
        return Size(*self._sizes[self.rows[number]].tolist())

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, which: int) -> Sample: ...

    @overload
    def __getitem__(self, which: slice) -> Samples: ...

    def __getitem__(self, which: int | slice) -> Sample | Samples:
        if isinstance(which, slice):
            return self.take(np.arange(len(self))[which])
        row = int(self.rows[which])
        if row not in self._made:
            if len(self._made) >= KEPT:
                self._made.clear()
            self._made[row] = self._sample(row)
        return self._made[row]

    def __iter__(self) -> Iterator[Sample]:
        return map(self._sample, self.rows.tolist())

    def _sample(self, row: int) -> Sample:
        return Sample(*pickle.loads(self.content[self.ends[row] : self.ends[row + 1]]))
