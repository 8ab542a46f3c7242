"""What encoders made, kept on disk under a key that names all it depends on."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from otl.config import SettingsError
from otl.datamodules import images, shards, uses
from otl.datamodules.entries import Entries, Files, Lookup, packed
from otl.datamodules.shards import Damaged, Entry, Fields, Origin, Shard, fields_of
from otl.datamodules.views import View
from otl.formats.files import existing, size
from otl.types import Size

log = logging.getLogger(__name__)

SHARD_BYTES = 256 * 2**20  # of a shard; as much waits in memory while the cache is filled
SECONDS = 30.0  # of encoding that a crash costs at most
DAMAGED = ".damaged"  # SHARD.ROW.damaged: an empty file that takes one entry out of use
CHUNK = 2**20  # keys looked at at once


class Cache:
    """Shards of many entries, see shards.py. Any number of processes may read and write the folder at once.

    Each process writes shards of its own, under names that no other has: there is nothing to lock.

    Args:
        folder: made when the first shard is written.
        shard_bytes: of a shard, at most one entry more.
        seconds: after which entries are written however few they are.
    """

    def __init__(self, folder: Path, *, shard_bytes: int = SHARD_BYTES, seconds: float = SECONDS) -> None:
        self.folder, self.shard_bytes, self.seconds = folder, shard_bytes, seconds
        self.files = Files()
        self.shards: list[Shard] = []
        self.damaged: dict[str, set[int]] = {}  # stem of a shard -> rows that are out of use
        self.unreadable: dict[str, Exception] = {}  # file -> reason
        self._waiting: dict[tuple[Origin, Fields], list[Entry]] = {}
        self._bytes, self._since = 0, 0.0  # of what waits: how much, and for how long
        self._pulse: uses.Pulse | None = None

    # Writing

    def record(self, dataset: str, keys: Iterable[str]) -> None:
        """Say that a dataset uses entries, before looking which there are: they are not pruned then, see uses.py.

        Raises:
            SettingsError: the folder cannot be made.
            DiskError: the record cannot be written.
        """
        try:
            self._pulse = uses.record(self.folder, dataset, packed(keys))
        except OSError as error:
            raise self._unwritable(error) from error

    def beat(self) -> None:
        """Say it again now and then, for as long as the run goes on."""
        if self._pulse is not None:
            self._pulse.beat()

    def require_room(self, count: int, what: str) -> None:
        """Ask before entries are made, not only before a shard is written.

        Args:
            count: bytes of what is still to be put.
            what: in words.

        Raises:
            SettingsError: the disk has fewer free.
        """
        free = shutil.disk_usage(existing(self.folder)).free
        if free < count:
            raise SettingsError(
                f"data.cache_dir={self.folder}: {what} that it has not yet need {size(count)}, and {size(free)} are "
                "free there: make room, choose another folder, or set data.cache=false"
            )

    def put(self, key: str, tensors: dict[str, Tensor], origin: Origin) -> None:
        """Keep an entry; it is on disk after `seconds`, `shard_bytes` or `flush`.

        Raises:
            SettingsError: the folder cannot be made.
            DiskError: a shard cannot be written.
        """
        fields = fields_of(tensors)
        entry = Entry(bytes.fromhex(key), [_bytes(tensors[field.name]) for field in fields])
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.setdefault((origin, fields), []).append(entry)
        self._bytes += sum(array.nbytes for array in entry.data)
        if time.monotonic() - self._since >= self.seconds:
            self.flush()
        elif self._bytes >= self.shard_bytes:
            self._write(*max(self._waiting, key=self._size))

    def flush(self) -> None:
        """Write what waits.

        Raises:
            SettingsError: the folder cannot be made.
            DiskError: a shard cannot be written.
        """
        while self._waiting:
            self._write(*next(iter(self._waiting)))

    def _size(self, group: tuple[Origin, Fields]) -> int:
        return len(self._waiting[group]) * sum(field.nbytes for field in group[1])

    def _write(self, origin: Origin, fields: Fields) -> None:
        self.beat()
        self._bytes -= self._size((origin, fields))
        entries = self._waiting.pop((origin, fields))
        try:
            shards.write(self.folder, origin, fields, entries)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> SettingsError:
        return SettingsError(
            f"data.cache_dir={self.folder}: cannot be written ({error}); make room, or choose another folder"
        )

    # Reading

    def entries(self, keys: Iterable[str]) -> Entries:
        """What there is under the keys that a run has recorded."""
        return Entries(self, packed(keys))

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those of the keys that have no entry on disk, each once, in their order."""
        unique = list(dict.fromkeys(keys))
        absent = Entries(self, packed(unique), hidden=False).absent()
        return [unique[number] for number in absent]

    def find(self, keys: np.ndarray, *, hidden: bool = False) -> tuple[list[Shard], np.ndarray, np.ndarray]:
        """Where entries lie.

        Args:
            keys: [n, 20] uint8.
            hidden: also in shards that are hidden: what a run has seen after recording that it uses it comes back.

        Returns:
            The shards that there are, which of them has each key [n], and in which row [n]; -1: none has.
        """
        lookup = Lookup(keys)
        while True:
            self.refresh(hidden=hidden)
            shard, row = np.full((2, len(keys)), -1, dtype=np.int32)
            try:
                for numbers, rows, found in self._chunks():
                    place = lookup.positions(found)
                    hit = place >= 0
                    shard[place[hit]], row[place[hit]] = numbers[hit], rows[hit]
            except FileNotFoundError:  # merged with others since the folder was listed
                continue
            same = lookup.positions(keys)  # where a key is there twice
            return self.shards, shard[same], row[same]

    def refresh(self, *, hidden: bool = False) -> None:
        """See which shards there are now, those of other processes among them."""
        names, self.damaged = self._listed(hidden)
        known = {shard.path.name: shard for shard in self.shards}
        for name in sorted(names - known.keys() - self.unreadable.keys()):
            try:
                known[name] = Shard.open(self.folder / name)
            except FileNotFoundError:  # merged with others since the folder was listed
                continue
            except (Damaged, OSError) as error:
                self.unreadable[name] = error
                log.warning(f"{self.folder / name}: {error}; what it held is made again")
        self.shards = [known[name] for name in sorted(names & known.keys())]

    def mark(self, shard: Shard, row: int, reason: Damaged) -> None:
        """Take a damaged entry out of use, in all processes and for good.

        Raises:
            SettingsError: the folder cannot be written.
        """
        log.warning(f"{shard.path}: entry {row} is damaged ({reason}); it is not used any more")
        self.damaged.setdefault(shard.path.stem, set()).add(row)
        try:
            self.mark_of(shard, row).touch()
        except OSError as error:
            raise self._unwritable(error) from error

    def mark_of(self, shard: Shard, row: int) -> Path:
        """The file that says that an entry is damaged."""
        return self.folder / f"{shard.path.stem}.{row}{DAMAGED}"

    def _listed(self, hidden: bool) -> tuple[set[str], dict[str, set[int]]]:
        """Names of the shards, and rows that are out of use."""
        names, damaged = set(), dict[str, set[int]]()
        for name in os.listdir(self.folder) if self.folder.is_dir() else ():
            if hidden and name.endswith(shards.HIDDEN):
                name = name[1 : -len(shards.HIDDEN)]
            if name.startswith("."):
                continue
            if name.endswith(shards.SUFFIX):
                names.add(name)
            elif name.endswith(DAMAGED):
                stem, row, _ = name.split(".")
                damaged.setdefault(stem, set()).add(int(row))
        return names, damaged

    def _chunks(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All entries, many at once: number of the shard, row, key."""
        waiting: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        count = 0
        for number, shard in enumerate(self.shards):
            with shards.opened(shard.path) as file:
                keys = shard.keys(file)
            rows = np.delete(np.arange(shard.count, dtype=np.int32), list(self.damaged.get(shard.path.stem, ())))
            waiting.append((np.full(len(rows), number, dtype=np.int32), rows, keys[rows]))
            count += len(rows)
            if count >= CHUNK:
                yield tuple(map(np.concatenate, zip(*waiting)))
                waiting, count = [], 0
        if waiting:
            yield tuple(map(np.concatenate, zip(*waiting)))


def _bytes(tensor: Tensor) -> shards.Bytes:
    """A copy of its own: a row of a batch would keep the whole batch in memory."""
    return tensor.detach().cpu().contiguous().clone().reshape(-1).view(torch.uint8).numpy()


def image_key(content: str, original: Size, view: View, background: str, identity: str) -> str:
    """The key of an image's latents.

    Args:
        content: `content_hash` of the file.
        original: size of the file, upright, pixels.
        view: what of the image is shown.
        background: colour under transparent pixels.
        identity: `Encoder.image_identity()`.
    """
    return _key("image", images.VERSION, content, original, astuple(view), background, identity)


def masked_key(image: str, mask: str, version: int, fill: float) -> str:
    """The key of the latents of an image with a hole.

    Args:
        image: `image_key` of the image.
        mask: `content_hash` of the mask file.
        version: of how a mask is read.
        fill: value of the masked pixels, -1..1.
    """
    return _key("masked", version, image, mask, fill)


def weights_key(mask: str | None, version: int, seen: View | Size, identity: str) -> str:
    """The key of a mask in the latents' size.

    Args:
        mask: hash of it; None: there is none.
        version: of how a mask is read.
        seen: what of it is shown; of none, the bucket.
        identity: of the image encoder, on which the latents' size depends.
    """
    return _key("weights", version, mask, astuple(seen) if isinstance(seen, View) else seen, identity)


def prompt_key(prompt: str, identity: str) -> str:
    """The key of a caption's conditioning; `identity` is `Encoder.prompt_identity()`."""
    return _key("prompt", prompt, identity)


def _key(*parts: object) -> str:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=20).hexdigest()
