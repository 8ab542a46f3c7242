"""Tables with the images inside of them: parquet, and the arrow files of Hugging Face's `save_to_disk`."""

from __future__ import annotations

import io
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from threading import Lock
from typing import IO, TYPE_CHECKING, Any

from otl.config import SettingsError
from otl.datamodules import headers
from otl.datamodules.files import Named, Remote, hash_of, named, place, stamp
from otl.datamodules.headers import Header
from otl.datamodules.index import Index
from otl.datamodules.sources.columns import Columns, Kind
from otl.datamodules.sources.items import Item
from otl.datamodules.sources.listed import refused
from otl.trust import public

if TYPE_CHECKING:
    import pyarrow

KEPT = 256 * 2**20  # bytes of row groups that each process keeps: an image is read with its whole group
MAPPED = 1000  # arrow files that each process keeps open
AT_ONCE = 16  # images in memory while a table is gone through
IPC_MAGIC = b"ARROW1"  # of arrow's file format; its stream format has none


class RowGroups:
    """The images of the row groups that were read last.

    Args:
        room: bytes; the newest group is kept however large it is.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.kept: OrderedDict[tuple[Path | Remote, str, str, int], Any] = OrderedDict()
        self._reading = Lock()  # several threads want images of one group, which is read once

    def column(self, file: Path | Remote, name: str, group: int) -> Any:
        """The images of one row group."""
        key = (file, place(file), name, group)
        with self._reading:
            if key not in self.kept:
                self.kept[key] = _parquet(file).read_row_group(group, columns=[name], use_threads=False).column(0)
            self.kept.move_to_end(key)
            while len(self.kept) > 1 and sum(column.nbytes for column in self.kept.values()) > self.room:
                self.kept.popitem(last=False)
            return self.kept[key]


ROW_GROUPS = RowGroups(KEPT)


@dataclass(frozen=True, slots=True)
class Cell(Named):
    """An image in a row of a table."""

    table: Path | Remote
    column: str
    group: int  # row group
    row: int  # in its group
    number: int  # row in the table
    called: str  # the path that the table has for it; empty: none
    content: str  # `hash_of` what it holds, from when the table was gone through

    @property
    def name(self) -> str:
        return self.called.rpartition("/")[2] or f"row-{self.number}"

    def __str__(self) -> str:
        return f"{self.table}, row {self.number}" + (f" ({self.called})" if self.called else "")

    def identity(self) -> str:
        return self.content

    def read_bytes(self) -> bytes:
        if self.table.suffix == ".arrow":
            column = _mapped(self.table, place(self.table)).column(self.column)
        else:
            column = ROW_GROUPS.column(self.table, self.column, self.group)
        return bytes_of(column[self.row].as_py()) or b""

    def open(self, mode: str = "rb") -> IO[bytes]:
        return io.BytesIO(self.read_bytes())


def kinds(file: Path | Remote) -> dict[str, Kind]:
    """What each column holds.

    Raises:
        SettingsError: the table cannot be read.
    """
    return {field.name: _kind(field.type) for field in _schema(file)}


def items(
    file: Path | Remote, columns: Columns, index: Index, examine: Callable[[IO[bytes]], Header]
) -> tuple[list[Item], int]:
    """The images of a table in its order, and the bytes of its largest row group.

    Args:
        file: the table.
        columns: of which that of the images holds bytes.
        index: what is known of it already.
        examine: an open image -> its header.
    """
    key, before = f"{file} {columns}", stamp(file)
    known = index.get(key, before)
    if known is None:
        known = [_examined(*row, examine) for row in _rows(file, columns)]
        if not any(public(text) != text for row in known for text in (row[2], row[4]) if isinstance(text, str)):
            index.put(key, before, known)  # else addresses with passwords would be written down
    found, largest = [], dict.fromkeys((row[0] for row in known), 0)
    for number, (group, row, called, texts, masked, *rest) in enumerate(known):
        if strange := refused(file, None if rest else called, masked):
            found.append(strange)
            continue
        of_mask = masked[0] if isinstance(masked, list) else ""
        mask = _mask(file, masked, Cell(file, columns.mask or "", group, row, number, columns.mask or "", of_mask))
        if not rest:
            found.append(Item(named(called, file), called, given=tuple(texts), mask=mask))
            continue
        content, header = rest[0], headers.from_json(rest[1:])
        largest[group] += header.bytes
        cell = Cell(file, columns.image, group, row, number, public(called), content)
        key = f"{file.name}/{number:09d}/{cell.name}"
        found.append(Item(cell, key, header=header, given=tuple(texts), mask=mask))
    return found, max(largest.values(), default=0)


def _mask(file: Path | Remote, masked: str | list[str] | None, cell: Cell) -> Path | Remote | Cell | None:
    """The mask of a row.

    Args:
        masked: its path or URL; or a list with the hash of its bytes, which are in `cell`.
    """
    if isinstance(masked, str):
        return named(masked, file) if masked else None
    return cell if masked else None


def _examined(
    group: int, row: int, value: Any, texts: list[str], mask: Any, examine: Callable[[IO[bytes]], Header]
) -> list[Any]:
    """One row as the index keeps it; without a header where the table has the path of its image alone."""
    called, content = (value.get("path") if isinstance(value, dict) else None) or "", bytes_of(value)
    inside = None if isinstance(mask, str) else bytes_of(mask)
    kept = [group, row, called, texts, mask if isinstance(mask, str) else [hash_of(inside)] if inside else None]
    if called and not content:
        return kept
    return [*kept, hash_of(content or b""), *headers.as_json(examine(io.BytesIO(content or b"")))]


def bytes_of(value: Any) -> bytes | None:
    return value.get("bytes") if isinstance(value, dict) else value


def texts_of(value: Any) -> list[str]:
    """The captions in a cell: a string, a list of strings, or nothing."""
    if value is None:
        return []
    return [value] if isinstance(value, str) else [text for text in value if text is not None]


def values(file: Path | Remote, columns: Columns) -> Iterator[dict[str, Any]]:
    """The rows of a table without images inside of it."""
    names = [name for name in (columns.image, columns.caption, columns.mask) if name is not None]
    for batch in _batches(file, names):
        yield from batch.to_pylist()


def _rows(file: Path | Remote, columns: Columns) -> Iterator[tuple[int, int, Any, list[str], Any]]:
    """Row group, row in it, image, captions and mask."""
    names = [name for name in (columns.image, columns.caption, columns.mask) if name is not None]
    group, row = 0, 0
    for number, batch in _groups(file, names):
        group, row = number, row if number == group else 0
        for values in batch.to_pylist():
            texts = texts_of(values[columns.caption] if columns.caption else None)
            yield group, row, values[columns.image], texts, values[columns.mask] if columns.mask else None
            row += 1


def _groups(file: Path | Remote, names: list[str]) -> Iterator[tuple[int, pyarrow.RecordBatch]]:
    """A few rows at a time, each time with the number of their row group."""
    if file.suffix == ".arrow":
        for batch in _mapped(file, place(file)).select(names).to_batches(max_chunksize=AT_ONCE):
            yield 0, batch
        return
    table = _parquet(file)
    for group in range(table.num_row_groups):
        for batch in table.iter_batches(AT_ONCE, row_groups=[group], columns=names, use_threads=False):
            yield group, batch


def _batches(file: Path | Remote, names: list[str]) -> Iterator[pyarrow.RecordBatch]:
    yield from (batch for _, batch in _groups(file, names))


def _schema(file: Path | Remote) -> pyarrow.Schema:
    return _mapped(file, place(file)).schema if file.suffix == ".arrow" else _parquet(file).schema_arrow


def _parquet(file: Path | Remote) -> Any:
    _require_pyarrow(file)
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        source = str(file) if isinstance(file, Path) else file.open("rb")
        return ParquetFile(source, memory_map=isinstance(file, Path))
    except (ArrowException, OSError) as error:
        raise SettingsError(f"{file}: is no parquet file that can be read ({error})") from error


@lru_cache(maxsize=MAPPED)
def _mapped(file: Path | Remote, stamp: str) -> pyarrow.Table:
    """A table on the disk, of which only what is looked at comes into memory."""
    _require_pyarrow(file)
    import pyarrow

    if not isinstance(file, Path):
        raise SettingsError(f"{file}: arrow files are read on a disk only; copy it there, or write it as parquet")
    try:
        with file.open("rb") as opened:
            is_file = opened.read(len(IPC_MAGIC)) == IPC_MAGIC
        source = pyarrow.memory_map(str(file))
        return (pyarrow.ipc.open_file if is_file else pyarrow.ipc.open_stream)(source).read_all()
    except (pyarrow.ArrowException, OSError) as error:
        raise SettingsError(f"{file}: is no arrow file that can be read ({error})") from error


def _require_pyarrow(file: Path | Remote) -> None:
    if find_spec("pyarrow") is None:
        raise SettingsError(f"{file}: reading it needs pyarrow; pip install 'otl[data]'")


def _kind(type: pyarrow.DataType) -> Kind:
    """What a column of that type holds."""
    from pyarrow import types

    if types.is_struct(type) and type.get_field_index("bytes") >= 0:
        return Kind.image
    if types.is_binary(type) or types.is_large_binary(type):
        return Kind.image
    inner = type.value_type if types.is_list(type) or types.is_large_list(type) or types.is_dictionary(type) else type
    return Kind.text if types.is_string(inner) or types.is_large_string(inner) else Kind.other
