"""What was read of files elsewhere, kept on disk: a later start asks only for what has changed since."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from threading import Lock
from typing import Any

from otl.config import SettingsError

VERSION = 4  # raise it when other things are read of the same file
FOLDER = "sources"  # inside of data.cache_dir
WAITING = 1000  # lines in memory before they are written


class Index:
    """One line of JSON for each file: [name, stamp, what was found]. Any number of processes may add to it.

    Of several lines of a name the last one counts; one that was cut off counts as none.

    Args:
        cache_dir: the setting.
        place: of what is indexed, such as a URL.
        options: settings that change what is found.
    """

    def __init__(self, cache_dir: Path, place: str, *options: object) -> None:
        named = hashlib.blake2b(json.dumps([VERSION, place, *options]).encode(), digest_size=16).hexdigest()
        self.path = cache_dir / FOLDER / f"{named}.jsonl"
        self._found = _read(self.path)
        self._waiting: list[str] = []
        self._lock = Lock()

    def get(self, name: str, stamp: str) -> Any:
        """What was found in the file of that name while it had that stamp; None: not known, as without a stamp."""
        known, found = self._found.get(name, ("", None))
        return found if known == stamp and stamp else None

    def put(self, name: str, stamp: str, found: Any) -> None:
        """Keep what was found; it is on disk after `flush` at the latest.

        Args:
            name: of the file.
            stamp: that it had before it was read; empty: nothing would tell that it has changed, so nothing is kept.
            found: what JSON can hold.

        Raises:
            SettingsError: it cannot be written.
        """
        if not stamp:
            return
        with self._lock:
            self._found[name] = (stamp, found)
            self._waiting.append(json.dumps([name, stamp, found]))
            if len(self._waiting) >= WAITING:
                self._write()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            SettingsError: it cannot be written.
        """
        with self._lock:
            self._write()

    def _write(self) -> None:
        if not self._waiting:
            return
        content = "".join(f"\n{line}" for line in self._waiting).encode()  # the last line there may be cut off
        self._waiting = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                while content:  # appended whole where the disk has room: lines of two processes do not mix
                    content = content[os.write(file, content) :]
            finally:
                os.close(file)
        except OSError as error:
            raise SettingsError(
                f"data.cache_dir={self.path.parent.parent}: cannot be written ({error}); make room, or choose another"
            ) from error


def _read(path: Path) -> dict[str, tuple[str, Any]]:
    """Name -> its stamp and what was found."""
    found = {}
    if path.is_file():
        with path.open("rb") as file:
            for line in file:
                try:
                    name, stamp, value = json.loads(line)
                except ValueError:  # cut off by a crash
                    continue
                found[name] = (stamp, value)
    return found
