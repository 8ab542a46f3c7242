"""Which entries of the cache datasets use: a record for each, which its runs keep fresh, so that the rest can be told.

A record is a safetensors file in the cache's folder `uses`, with the keys [n, 20] of all that a run reads. Its time of
change is when a run last said so. A dataset that has changed gets a new record, and then only the newest one counts,
and those so fresh that a run may still be going on.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from otl.config import Data, SettingsError
from otl.datamodules.shards import KEY, OWN, SUFFIX
from otl.formats.files import whole

FOLDER = "uses"
FORMAT = {"format": "otl cache use", "version": "1"}
DAY = 86400.0  # seconds
PAUSE = 3600.0  # seconds between two times that a run says it


@dataclass(frozen=True)
class Use:
    """A record: its header."""

    path: Path
    dataset: str  # which images, at which resolution, for which family
    count: int  # keys
    last: float  # when a run last said that it uses them, seconds since 1970

    def keys(self) -> np.ndarray:
        """[n, 20] uint8."""
        with safe_open(self.path, "pt") as file:
            return file.get_tensor(OWN[1]).numpy()


class Pulse:
    """A run's word that it still uses what its record lists."""

    def __init__(self, path: Path) -> None:
        self.path, self.said = path, time.monotonic()

    def beat(self) -> None:
        """Say it again, if it was long ago."""
        if time.monotonic() - self.said >= PAUSE:
            self.said = time.monotonic()
            with contextlib.suppress(FileNotFoundError):  # someone has emptied the cache: the next read will say so
                os.utime(self.path)


def described(data: Data, resolutions: Iterable[int], family: str) -> str:
    """Which dataset it is: the same text as long as its images come from the same places."""
    paths = [concept.path for concept in data.concepts.values() if concept.enabled] + [data.path] * bool(data.path)
    places = sorted(path if "://" in path else str(Path(path).expanduser().absolute()) for path in paths)
    return f"{', '.join(places)} at {', '.join(map(str, resolutions))} px for {family}"


def record(folder: Path, dataset: str, keys: np.ndarray) -> Pulse:
    """Say that a dataset uses entries, before looking which there are.

    Args:
        folder: of the cache.
        dataset: which images, at which resolution, for which family; the same text for the same dataset.
        keys: [n, 20] uint8.
    """
    name = hashlib.blake2b(dataset.encode() + keys.tobytes(), digest_size=16).hexdigest()
    path = folder / FOLDER / f"{name}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.utime(path)
    except FileNotFoundError:
        own = path.with_suffix(f".{uuid.uuid4().hex}")  # ranks on several machines write the same record at once
        with whole(own) as aside:
            save_file({OWN[1]: keys}, aside, {**FORMAT, "dataset": dataset})
        os.replace(own, path)
    return Pulse(path)


def records(folder: Path) -> list[Use]:
    """All records of a cache, the newest first.

    Raises:
        SettingsError: one cannot be read: what it lists would count as unused.
    """
    found = []
    for path in (folder / FOLDER).glob(f"*{SUFFIX}"):
        try:
            with safe_open(path, "pt") as file:
                about = file.metadata()
                count, width = file.get_slice(OWN[1]).get_shape()
            if {name: about[name] for name in FORMAT} != FORMAT or width != KEY:
                raise KeyError(f"{FORMAT}")
            found.append(Use(path, about["dataset"], count, path.stat().st_mtime))
        except FileNotFoundError:
            continue
        except (SafetensorError, OSError, KeyError, TypeError) as error:
            raise SettingsError(
                f"{path}: cannot be read ({error!r}), so that nobody knows what its dataset uses; delete it if that "
                "need not be kept"
            ) from error
    return sorted(found, key=lambda use: (-use.last, use.path))


def state(folder: Path) -> dict[str, float]:
    """Changes whenever a run records or refreshes something: file -> time of change."""
    there = os.scandir(folder / FOLDER) if (folder / FOLDER).is_dir() else ()
    return {entry.name: entry.stat().st_mtime for entry in there if entry.name.endswith(SUFFIX)}


def forget(use: Use) -> None:
    """Delete a record, unless a run has just refreshed it."""
    aside = use.path.with_suffix(".forgotten")
    try:
        os.replace(use.path, aside)
    except FileNotFoundError:  # forgotten by another process
        return
    if aside.stat().st_mtime != use.last:
        os.replace(aside, use.path)
    aside.unlink(missing_ok=True)


def counting(uses: Iterable[Use], *, now: float, days: float | None) -> list[Use]:
    """Those whose entries are to be kept: the newest of each dataset, and all of the last day.

    Args:
        uses: the newest first.
        now: seconds since 1970.
        days: after which a dataset that no run has used does not count any more; None: never.
    """
    kept, seen = [], set()
    for use in uses:
        age = (now - use.last) / DAY
        newest = use.dataset not in seen
        seen.add(use.dataset)
        if age < 1 or (newest and (days is None or age < days)):
            kept.append(use)
    return kept
