"""A table has whole rows only."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from otl.callbacks.table import Table, rows_until
from otl.formats.files import DiskError


def test_rows_are_appended_where_they_are_said_to_begin(tmp_path: Path) -> None:
    table = Table(tmp_path / "a.csv", ["step", "loss"], [{"step": "1", "loss": "a,b", "other": "x"}])
    begins = table.append([{"step": "2"}, {"step": "3", "loss": "ü"}])
    content = (tmp_path / "a.csv").read_bytes()
    assert content.decode() == 'step,loss\n1,"a,b"\n2,\n3,ü\n'
    assert [content[begin:].decode() for begin in begins] == ["2,\n3,ü\n", "3,ü\n"]
    table.cut(begins[1])
    table.append([{"step": "4", "loss": "c"}])
    assert (tmp_path / "a.csv").read_text() == 'step,loss\n1,"a,b"\n2,\n4,c\n'
    assert [row["step"] for row in rows_until(tmp_path / "a.csv", 2)] == ["1", "2"]


def test_rows_that_find_no_room_leave_no_part_of_one(tmp_path: Path) -> None:
    """By the system's limit for the size of a file."""
    table = Table(tmp_path / "a.csv", ["step", "loss"], [])
    before = (tmp_path / "a.csv").read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(DiskError, match=r"a\.csv cannot be written: File too large"):
            table.append([{"step": "1", "loss": "1234"}, {"step": "2", "loss": "1234"}])
        assert (tmp_path / "a.csv").read_bytes() == before
        table.append([{"step": "3"}])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "a.csv").read_bytes() == before + b"3,\n"
