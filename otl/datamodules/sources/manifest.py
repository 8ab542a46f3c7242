"""Lists of images: JSON lines, CSV or a table, with a path or URL a row and a caption beside it."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from otl.config import SettingsError
from otl.datamodules.files import Remote, named
from otl.datamodules.sources import table
from otl.datamodules.sources.columns import Columns, Kind
from otl.datamodules.sources.items import Item
from otl.datamodules.sources.listed import refused

LINES = (".jsonl", ".ndjson", ".csv", ".tsv")
LOOKED_AT = 1000  # rows that say which columns there are


def items(file: Path | Remote, columns: Columns) -> list[Item]:
    """The images that a manifest lists, in its order.

    Args:
        file: the manifest; what it lists is relative to its folder.
        columns: of which that of the images holds paths or URLs.
    """
    return [_item(number, row, columns, file) for number, row in enumerate(rows(file, columns))]


def kinds(file: Path | Remote) -> dict[str, Kind]:
    """What each column holds.

    Raises:
        SettingsError: the manifest cannot be read.
    """
    if file.suffix.lower() not in LINES:
        return table.kinds(file)
    found: dict[str, Kind] = {}
    for row in islice(_rows(file), LOOKED_AT):
        for name, value in row.items():
            if value is not None:
                found[name] = _kind(value) if found.get(name, Kind.text) == Kind.text else Kind.other
    return found


def rows(file: Path | Remote, columns: Columns) -> Iterable[Mapping[str, Any]]:
    return _rows(file) if file.suffix.lower() in LINES else table.values(file, columns)


def _item(number: int, row: Mapping[str, Any], columns: Columns, manifest: Path | Remote) -> Item:
    text = row.get(columns.image)
    given = tuple(table.texts_of(row.get(columns.caption))) if columns.caption else ()
    if not text or not isinstance(text, str):
        return Item(manifest, f"{manifest.name}/{number}", flaw=f"row {number} has no {columns.image}")
    mask = row.get(columns.mask) if columns.mask else None
    item = Item(named(text, manifest), text, given=given, mask=named(mask, manifest) if mask else None)
    return refused(manifest, text, mask) or item


def _rows(file: Path | Remote) -> Iterator[dict[str, Any]]:
    """The rows of a text file; what is empty in a CSV is None."""
    with _text(file) as text:
        try:
            if file.suffix.lower() in (".csv", ".tsv"):
                reader = csv.DictReader(text, delimiter="\t" if file.suffix.lower() == ".tsv" else ",")
                yield from ({name: value or None for name, value in row.items() if name} for row in reader)
            else:
                yield from _objects(file, text)
        except (UnicodeDecodeError, csv.Error) as error:
            raise SettingsError(f"{file}: cannot be read ({error}); write it as UTF-8") from error


def _objects(file: Path | Remote, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise SettingsError(f"{file}, line {number}: is not JSON ({error})") from error
        if not isinstance(row, dict):
            raise SettingsError(
                f'{file}, line {number}: is no object such as {{"file_name": "a.jpg", "text": "a cat"}}'
            )
        yield row


def _text(file: Path | Remote) -> io.TextIOWrapper:
    opened = file.open("rb") if isinstance(file, Path) else io.BytesIO(file.read_bytes())
    return io.TextIOWrapper(opened, encoding="utf-8-sig", newline="")


def _kind(value: Any) -> Kind:
    listed = value if isinstance(value, list) else [value]
    return Kind.text if all(isinstance(each, str) for each in listed) else Kind.other
