"""What is done with a cache between runs, and beside them: say what is in it, verify, compact, prune."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from otl.datamodules import shards, uses
from otl.datamodules.cache import Cache
from otl.datamodules.entries import Entries, packed
from otl.datamodules.shards import SUFFIX, Damaged, Entry, Fields, Foreign, Origin, Shard
from otl.formats.files import ASIDE
from otl.types import Progress

OWN = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")  # names that shards have
STALE = 3600.0  # seconds after which what is unfinished or hidden was left behind by a process that was killed
SMALL = 0.5  # share of a full shard below which one is merged with others


@dataclass
class Contents:
    """Entries of one origin."""

    origin: Origin
    shards: int = 0
    entries: int = 0
    nbytes: int = 0  # of the files


@dataclass
class Removal:
    """What pruning takes away, or would."""

    entries: int = 0
    files: int = 0  # unfinished and unreadable ones
    nbytes: int = 0
    records: int = 0  # of datasets


def contents(cache: Cache) -> list[Contents]:
    """What is in the cache, the largest first."""
    cache.refresh()
    found: dict[Origin, Contents] = {}
    for shard in cache.shards:
        each = found.setdefault(shard.origin, Contents(shard.origin))
        each.shards += 1
        each.entries += shard.count
        each.nbytes += shard.end
    return sorted(found.values(), key=lambda each: -each.nbytes)


def verify(cache: Cache, progress: Progress | None = None) -> list[str]:
    """Read all entries that are in use; those that are damaged are not in use from then on.

    Returns:
        A line for each damaged entry and each unreadable file.
    """
    cache.refresh()
    lines = [f"{cache.folder / name}: {reason}" for name, reason in sorted(cache.unreadable.items())]
    for shard in shown(cache.shards, "shards verified", progress):
        for _ in intact(cache, shard, in_use(cache, shard), lines):
            pass
    return lines


def compact(cache: Cache, progress: Progress | None = None) -> tuple[int, int]:
    """Merge small shards, and leave out what is damaged. Other processes may read and write meanwhile.

    Returns:
        How many shards became how many.
    """
    restore(cache.folder)
    cache.refresh()
    before, after = 0, 0
    for group in shown(mergeable(cache), "shards merged", progress):
        try:
            entries = {entry.key: entry for shard in group for entry in intact(cache, shard, in_use(cache, shard), [])}
        except FileNotFoundError:  # merged by another process
            continue
        if entries:
            shards.write(cache.folder, group[0].origin, group[0].fields, list(entries.values()))
        for shard in group:  # now that the new one is there: an entry can be found at any moment
            delete(cache, shard)
        before, after = before + len(group), after + bool(entries)
    return before, after


def prune(cache: Cache, *, days: float | None, really: bool, progress: Progress | None = None) -> Removal:
    """Delete entries that no dataset uses, second copies, damaged ones, and what killed processes have left.

    A run records what it uses, and then looks what there is. So a shard is hidden first, then the records are looked at
    again, and only then is it deleted: a run that has seen it before is in the records by then.

    Args:
        cache: other processes may read and write it meanwhile.
        days: after which a dataset does not count that no run has used; None: every dataset counts.
        really: else it is only counted what would be deleted.
        progress: shows how far it is.
    """
    if really:
        restore(cache.folder)
    removal = Removal()
    needed = Needed(cache, days)
    for path, size in leftovers(cache):
        removal.files, removal.nbytes = removal.files + 1, removal.nbytes + size
        if really:
            path.unlink(missing_ok=True)
    for shard in shown(list(cache.shards), "shards looked at", progress):
        while len(rows := needed.rows(shard)) < shard.count:
            if not really or replaced(cache, shard, rows, needed):
                removal.entries += shard.count - len(rows)
                removal.nbytes += (shard.count - len(rows)) * shard.nbytes
                break
    for use in needed.idle:
        removal.records += 1
        if really:
            uses.forget(use)
    return removal


class Needed:
    """The rows that datasets need, of the shards that there were.

    Args:
        cache: is refreshed.
        days: as in `prune`.
    """

    def __init__(self, cache: Cache, days: float | None) -> None:
        self.cache, self.days = cache, days
        self.look()

    def look(self) -> None:
        """Read the records, and then look where their entries are."""
        self.state = uses.state(self.cache.folder)
        records = uses.records(self.cache.folder)
        counting = uses.counting(records, now=time.time(), days=self.days)
        self.idle = [use for use in records if use not in counting]
        entries = Entries(self.cache, np.concatenate([packed(()), *(use.keys() for use in counting)]), hidden=False)
        places = np.unique(np.stack([entries.shard, entries.row], axis=1)[entries.shard >= 0], axis=0)
        self.names = {shard.path: number for number, shard in enumerate(entries.shards)}
        self.first = np.searchsorted(places[:, 0], np.arange(len(entries.shards) + 1))
        self.all_rows = places[:, 1]

    @property
    def outdated(self) -> bool:
        """Whether the records have changed."""
        return uses.state(self.cache.folder) != self.state

    def rows(self, shard: Shard) -> list[int]:
        """Ascending; all where the shard is gone meanwhile."""
        number = self.names.get(shard.path)
        if number is None:
            return list(range(shard.count))
        return self.all_rows[self.first[number] : self.first[number + 1]].tolist()


def replaced(cache: Cache, shard: Shard, rows: Sequence[int], needed: Needed) -> bool:
    """Put another shard with some of the rows in the place of one.

    Returns:
        Whether it is done; else the records have changed, and what is needed was looked up anew.
    """
    entries = list(intact(cache, shard, rows, []))
    written = shards.write(cache.folder, shard.origin, shard.fields, entries) if entries else None
    hidden = shards.hidden(shard.path)
    with contextlib.suppress(FileNotFoundError):  # merged or deleted by another process
        os.replace(shard.path, hidden)
    if needed.outdated:
        with contextlib.suppress(FileNotFoundError):
            os.replace(hidden, shard.path)
        if written is not None:
            written.unlink(missing_ok=True)
        needed.look()
        return False
    hidden.unlink(missing_ok=True)
    delete(cache, shard)
    return True


def restore(folder: Path) -> None:
    """Bring back what was hidden when pruning was cut short."""
    for path in folder.glob(f".*{shards.HIDDEN}"):
        with contextlib.suppress(FileNotFoundError):  # brought back by another process
            if time.time() - path.stat().st_ctime > STALE:
                os.replace(path, path.with_name(path.name[1 : -len(shards.HIDDEN)]))


def delete(cache: Cache, shard: Shard) -> None:
    """Together with the marks of its damaged entries."""
    shard.path.unlink(missing_ok=True)
    for row in cache.damaged.get(shard.path.stem, ()):
        cache.mark_of(shard, row).unlink(missing_ok=True)


def leftovers(cache: Cache) -> list[tuple[Path, int]]:
    """What killed processes have not finished, and shards that are none any more, with their bytes.

    Files of other names, and shards of other versions, are somebody else's.
    """
    found = []
    for entry in os.scandir(cache.folder) if cache.folder.is_dir() else ():
        with contextlib.suppress(FileNotFoundError):  # it has been finished
            about, error = entry.stat(), cache.unreadable.get(entry.name)
            unfinished = ASIDE.fullmatch(entry.name) and time.time() - about.st_mtime > STALE
            broken = OWN.fullmatch(entry.name) and isinstance(error, Damaged) and not isinstance(error, Foreign)
            if unfinished or broken:
                found.append((Path(entry.path), about.st_size))
    return found


def in_use(cache: Cache, shard: Shard) -> list[int]:
    """The rows that are not known as damaged."""
    damaged = cache.damaged.get(shard.path.stem, ())
    return [row for row in range(shard.count) if row not in damaged]


def intact(cache: Cache, shard: Shard, rows: Iterable[int], lines: list[str]) -> Iterator[Entry]:
    """Entries of a shard, verified; those that are damaged are taken out of use, with a line for each in `lines`."""
    with shards.opened(shard.path) as file:
        keys = shard.keys(file)
        for row in rows:
            entry = Entry(keys[row].tobytes(), [np.empty(field.nbytes, dtype=np.uint8) for field in shard.fields])
            try:
                shard.read(file, row, entry.data)
                shard.verify(file, row, entry.key, entry.data)
            except Damaged as error:
                cache.mark(shard, row, error)
                lines.append(f"{shard.path}: entry {row} ({entry.key.hex()}): {error}")
            else:
                yield entry


def mergeable(cache: Cache) -> list[list[Shard]]:
    """Groups of shards that fit into one, and single ones with damaged entries."""
    alike: dict[tuple[Origin, Fields], list[Shard]] = defaultdict(list)
    for shard in cache.shards:
        if shard.end < SMALL * cache.shard_bytes or shard.path.stem in cache.damaged:
            alike[shard.origin, shard.fields].append(shard)
    groups = []
    for members in alike.values():
        size = 0
        for shard in members:
            if not size or size + shard.end > cache.shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(shard)
            size += shard.end
    return [group for group in groups if len(group) > 1 or group[0].path.stem in cache.damaged]


def shown(items: Sequence[Any], what: str, progress: Progress | None) -> Iterator[Any]:
    return iter(items) if progress is None or not items else progress(items, what, len(items))
