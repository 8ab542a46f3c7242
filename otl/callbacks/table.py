"""A CSV file that grows by whole rows."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

from otl.formats.files import named, whole

Values = dict[str, str]


class Table:
    """Rows are on the disk once `append` returns, and there is never a part of one.

    Args:
        path: the file, which is written anew.
        columns: names, in order; what a row lacks is left empty.
        rows: to begin with.
    """

    def __init__(self, path: Path, columns: list[str], rows: list[Values]) -> None:
        self.path, self.columns = path, columns
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as aside:
            aside.write_bytes(self._encoded([dict(zip(columns, columns)), *rows]))
        self._file = path.open("r+b", buffering=0)
        self.last_at = path.stat().st_size - len(self._encoded(rows[-1:]))  # where the last of them begins in the file

    def append(self, rows: list[Values]) -> list[int]:
        """Write rows, and return where each begins in the file.

        Raises:
            DiskError: none of them could be written.
        """
        end = self._file.seek(0, os.SEEK_END)
        lines = [self._encoded([row]) for row in rows]
        with named(self.path):
            try:
                rest = memoryview(b"".join(lines))
                while rest:
                    rest = rest[self._file.write(rest) :]
                os.fsync(self._file.fileno())
            except OSError:
                self._file.truncate(end)
                raise
        return [end + sum(map(len, lines[:number])) for number in range(len(lines))]

    def cut(self, end: int) -> None:
        """Drop what lies behind the first `end` bytes."""
        self._file.truncate(end)

    def close(self) -> None:
        self._file.close()

    def _encoded(self, rows: list[Values]) -> bytes:
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", extrasaction="ignore", lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


def rows_until(path: Path, step: int) -> list[Values]:
    """The rows of an earlier part of the run, up to `step`; a line that was cut off by a crash is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    rows = csv.DictReader(line for line in lines if line.endswith("\n"))
    return [row for row in rows if None not in row.values() and int(row["step"]) <= step]
