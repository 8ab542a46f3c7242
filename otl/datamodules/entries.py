"""Where the entries of a dataset lie in the cache, as a few arrays, and how they are read."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from functools import cached_property
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from otl.config import SettingsError
from otl.datamodules.shards import DTYPES, KEY, Bytes, Damaged, Shard, opened

if TYPE_CHECKING:
    from otl.datamodules.cache import Cache

OPEN = 256  # files that a process keeps open


def packed(keys: Iterable[str]) -> np.ndarray:
    """Keys of 40 hex digits -> [n, 20] uint8."""
    return np.frombuffer(bytes.fromhex("".join(keys)), dtype=np.uint8).reshape(-1, KEY)


class Lookup:
    """Finds keys among others by their first eight bytes, in which nearly all differ: keys are hashes.

    Args:
        keys: [m, 20] uint8.
    """

    def __init__(self, keys: np.ndarray) -> None:
        firsts = _firsts(keys)
        self.keys, self.order = keys, np.argsort(firsts, kind="stable")
        self.firsts = firsts[self.order]

    def positions(self, others: np.ndarray) -> np.ndarray:
        """[n, 20] keys -> [n] where each lies among the keys of this lookup; -1: it is none of them.

        Of equal keys the first is found.
        """
        firsts, found = _firsts(others), np.full(len(others), -1)
        place = np.empty(len(others), dtype=np.int64)
        order = np.argsort(firsts)  # neighbours are looked for one after the other: that is five times as fast
        place[order] = np.searchsorted(self.firsts, firsts[order])
        left = np.arange(len(others))  # those that are not decided yet
        while len(left):
            left = left[place[left] < len(self.firsts)]
            left = left[self.firsts[place[left]] == firsts[left]]
            at = self.order[place[left]]
            same = (self.keys[at] == others[left]).all(axis=1)
            found[left[same]] = at[same]
            left = left[~same]
            place[left] += 1
        return found


def _firsts(keys: np.ndarray) -> np.ndarray:
    """[n, 20] uint8 -> [n] uint64."""
    return np.ascontiguousarray(keys[:, :8]).view(np.uint64).reshape(-1)


class Entries:
    """What the cache holds under the keys of a dataset. Workers that are forked share its arrays.

    Args:
        cache: where to read.
        keys: [n, 20] uint8.
        hidden: as in `Cache.find`.
    """

    shards: list[Shard]  # of the cache
    shard: np.ndarray  # [n] int32, which of them has the entry; -1: none
    row: np.ndarray  # [n] int32, which of its entries it is
    intact: np.ndarray  # [n] bool, whether this process has compared the checksum

    def __init__(self, cache: Cache, keys: np.ndarray, *, hidden: bool = True) -> None:
        self.cache, self.keys = cache, keys
        self.locate(hidden=hidden)

    def __len__(self) -> int:
        return len(self.keys)

    def locate(self, *, hidden: bool = True) -> None:
        """Look where each entry lies now."""
        self.shards, self.shard, self.row = self.cache.find(self.keys, hidden=hidden)
        self.intact = np.zeros(len(self.keys), dtype=bool)

    @cached_property
    def lookup(self) -> Lookup:
        """From keys to numbers, where they are not known."""
        return Lookup(self.keys)

    def numbers(self, keys: Iterable[str]) -> list[int]:
        """The numbers of keys that are among those of the dataset."""
        return self.lookup.positions(packed(keys)).tolist()

    def absent(self) -> np.ndarray:
        """Numbers of the keys without an entry."""
        return np.flatnonzero(self.shard < 0)

    def shape(self, number: int, name: str) -> tuple[int, ...]:
        """Of one tensor of an entry that is there."""
        return next(tuple(field.shape) for field in self._shard(number).fields if field.name == name)

    def read(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """Entries of one shape by their numbers, stacked: each tensor is [B, ...].

        Raises:
            SettingsError: one is gone or damaged.
        """
        fields = self._shard(numbers[0]).fields
        assert all(self._shard(number).fields == fields for number in numbers)
        stacked = {field.name: torch.empty((len(numbers), *field.shape), dtype=DTYPES[field.dtype]) for field in fields}
        into = [tensor.view(torch.uint8).numpy().reshape(len(numbers), -1) for tensor in stacked.values()]
        for place, number in enumerate(numbers):
            self._read(number, [array[place] for array in into])
        return stacked

    def _read(self, number: int, into: list[Bytes]) -> None:
        """One entry; looked for once more where it has been moved or is damaged meanwhile."""
        while True:
            shard, row = self._shard(number), int(self.row[number])
            try:
                file = self.cache.files.get(shard.path)
                shard.read(file, row, into)
                if not self.intact[number]:
                    shard.verify(file, row, self.keys[number].tobytes(), into)
                    self.intact[number] = True
                return
            except FileNotFoundError:  # merged with others
                self.locate()
            except Damaged as error:
                self.cache.mark(shard, row, error)
                self.locate()

    def _shard(self, number: int) -> Shard:
        if self.shard[number] < 0:
            raise SettingsError(
                f"data.cache_dir={self.cache.folder}: entry {self.keys[number].tobytes().hex()} is gone or damaged; "
                "start again (resume=auto goes on from the last checkpoint): it will be made anew"
            )
        return self.shards[self.shard[number]]


class Files:
    """Files that this process has open, so many of them as were used last."""

    def __init__(self, limit: int = OPEN) -> None:
        self.limit, self.process = limit, os.getpid()
        self.opened: OrderedDict[Path, FileIO] = OrderedDict()

    def get(self, path: Path) -> FileIO:
        """
        Raises:
            FileNotFoundError: there is none.
        """
        if self.process != os.getpid():  # forked: the place in a file is shared with the parent
            self.close()
        if path not in self.opened:
            self.opened[path] = opened(path)
            if len(self.opened) > self.limit:
                self.opened.popitem(last=False)[1].close()
        self.opened.move_to_end(path)
        return self.opened[path]

    def close(self) -> None:
        for file in self.opened.values():
            file.close()
        self.opened.clear()
        self.process = os.getpid()

    def __del__(self) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Files, (self.limit,)
