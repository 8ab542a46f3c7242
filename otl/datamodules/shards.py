"""A shard of the cache: one file with many entries of the same shapes, written once and never changed.

A safetensors file that any reader of the format opens. Each of its tensors has a row for each entry: the fields that
the encoder gave (`latents`; `hidden`, `pooled`), `otl.crc32` [n] int64 and `otl.key` [n, 20] uint8. The header's
metadata says what made them. A row's checksum covers names, dtypes and shapes of the fields, the key and the data.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from otl.formats.files import whole

FORMAT, VERSION = "otl cache", "1"  # in the header of each shard; raise the version when older readers would err
SUFFIX = ".safetensors"
HIDDEN = ".pruned"  # .NAME.pruned: a shard that is deleted in a moment, or comes back
KEY = 20  # bytes
CHECKSUM = 8  # bytes
OWN = ("otl.crc32", "otl.key")  # tensors of every shard, behind the fields
LENGTH = struct.Struct("<Q")  # a safetensors file begins with the length of its header, bytes
HEADER = 4096  # bytes read at first, which usually hold the whole header
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Bytes = np.ndarray
"""[n] uint8."""


class Damaged(ValueError):
    """A file or a row that cannot be what was written; says why."""


class Foreign(Damaged):
    """A whole file of something else, or of another version."""


class Origin(NamedTuple):
    """What made the entries of a shard."""

    kind: str  # "image", "masked", "weights" or "prompt"
    family: str  # the class that encoded them
    encoder: str  # its identity: a hash of the weights and all else that they depend on


class Field(NamedTuple):
    """One tensor of an entry."""

    name: str
    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of an entry."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Field:
        return cls(name, NAMES[tensor.dtype], tuple(tensor.shape))


Fields = tuple[Field, ...]
"""Of an entry, in the order in which they lie in the file."""


def fields_of(tensors: dict[str, Tensor]) -> Fields:
    """What an entry is made of; the widest numbers first, so that all are aligned."""
    found = [Field.of(name, tensor) for name, tensor in tensors.items()]
    return tuple(sorted(found, key=lambda field: (-DTYPES[field.dtype].itemsize, field.name)))


class Entry(NamedTuple):
    """One row, as bytes."""

    key: bytes
    data: list[Bytes]  # of each field


@dataclass(frozen=True)
class Shard:
    """An open shard: what its header says. Its file is opened where it is read."""

    path: Path
    origin: Origin
    fields: Fields
    count: int  # entries
    start: int  # of the data in the file, bytes

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read the header.

        Raises:
            Damaged: the file is not whole.
            Foreign: it is no shard, or one of another version.
            OSError: it is gone or cannot be read.
        """
        with opened(path) as file:
            header, start, size = _header(file)
        try:
            shard = cls(path, *_parsed(header), start)
        except Damaged:
            raise
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise Damaged(f"its header makes no sense ({error!r})") from error
        if shard.end != size:
            raise Damaged(f"{size} bytes in the place of {shard.end}")
        return shard

    @cached_property
    def columns(self) -> list[int]:
        """Where each field begins in the file, then the checksums, then the keys; bytes."""
        starts = [self.start]
        for width in [field.nbytes for field in self.fields] + [CHECKSUM]:
            starts.append(starts[-1] + width * self.count)
        return starts

    @property
    def end(self) -> int:
        """Bytes of the whole file."""
        return self.columns[-1] + KEY * self.count

    @cached_property
    def nbytes(self) -> int:
        """Of one entry's data."""
        return sum(field.nbytes for field in self.fields)

    @cached_property
    def seed(self) -> int:
        """Where the checksum of every row begins."""
        return _seed(self.fields)

    def keys(self, file: FileIO) -> np.ndarray:
        """[n, 20] uint8. `file` is the open file, here and below."""
        keys = np.empty((self.count, KEY), dtype=np.uint8)
        _read(file, keys.reshape(-1), self.columns[-1])
        return keys

    def read(self, file: FileIO, row: int, into: Sequence[Bytes]) -> None:
        """Fill one array of bytes for each field.

        Raises:
            Damaged: the file is too short.
        """
        for field, column, array in zip(self.fields, self.columns, into):
            _read(file, array, column + row * field.nbytes)

    def verify(self, file: FileIO, row: int, key: bytes, data: Sequence[Bytes]) -> None:
        """Whether what was read is what was written.

        Raises:
            Damaged: it is not.
        """
        written = np.empty(CHECKSUM, dtype=np.uint8)
        _read(file, written, self.columns[-2] + CHECKSUM * row)
        if int(written.view("<i8")[0]) != checksum(self.seed, key, data):
            raise Damaged("the checksum is another one")


def hidden(path: Path) -> Path:
    """Where a shard lies while it is decided whether it is deleted."""
    return path.with_name(f".{path.name}{HIDDEN}")


def opened(path: Path) -> FileIO:
    """A shard, also while it is hidden.

    Raises:
        FileNotFoundError: it is gone.
    """
    for name in (path, hidden(path), path):  # it may have come back meanwhile
        with contextlib.suppress(FileNotFoundError):
            return name.open("rb", buffering=0)
    raise FileNotFoundError(path)


def write(folder: Path, origin: Origin, fields: Fields, entries: Sequence[Entry]) -> Path:
    """A new shard, which appears whole or not at all.

    Raises:
        OSError: the folder cannot be made.
        DiskError: the file cannot be written.
    """
    path = folder / f"{uuid.uuid4().hex}{SUFFIX}"
    folder.mkdir(parents=True, exist_ok=True)
    needs = len(entries) * sum(field.nbytes for field in fields)
    with whole(path, needs=needs) as aside, aside.open("wb") as file:
        file.writelines(_content(origin, fields, entries))
    return path


def _content(origin: Origin, fields: Fields, entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    """A shard's bytes in their order."""
    about = {"format": FORMAT, "version": VERSION, "count": str(len(entries)), **origin._asdict()}
    header = json.dumps({"__metadata__": about, **_tensors(fields, len(entries))}).encode()
    header += b" " * (-len(header) % 8)
    yield LENGTH.pack(len(header)) + header
    for number in range(len(fields)):
        for entry in entries:
            yield entry.data[number].data
    seed = _seed(fields)
    yield np.array([checksum(seed, entry.key, entry.data) for entry in entries], dtype="<i8").tobytes()
    yield b"".join(entry.key for entry in entries)


def _tensors(fields: Fields, count: int) -> dict[str, dict[str, Any]]:
    """The header's part on the tensors."""
    rows = [(field.name, field.dtype, field.shape, field.nbytes) for field in fields]
    rows += [(OWN[0], "I64", (), CHECKSUM), (OWN[1], "U8", (KEY,), KEY)]
    found, place = {}, 0
    for name, dtype, shape, nbytes in rows:
        end = place + nbytes * count
        found[name] = {"dtype": dtype, "shape": [count, *shape], "data_offsets": [place, end]}
        place = end
    return found


def _parsed(header: dict[str, Any]) -> tuple[Origin, Fields, int]:
    """What a header says of its entries; raises whatever a damaged one leads to."""
    about = header.pop("__metadata__", {})
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise Foreign(f"no shard of the cache's version {VERSION}")
    origin = Origin(*(about[name] for name in Origin._fields))
    count = int(about["count"])
    tensors = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    fields = tuple(Field(name, each["dtype"], tuple(each["shape"][1:])) for name, each in tensors if name not in OWN)
    if header != _tensors(fields, count):
        raise ValueError("it contradicts itself")
    return origin, fields, count


def _seed(fields: Fields) -> int:
    return zlib.crc32(json.dumps(fields).encode())


def checksum(seed: int, key: bytes, data: Iterable[Bytes]) -> int:
    """CRC-32 of a row."""
    found = zlib.crc32(key, seed)
    for array in data:
        found = zlib.crc32(array, found)
    return found


def _header(file: FileIO) -> tuple[dict[str, Any], int, int]:
    """The header, where it ends, and the size of the file."""
    size = os.fstat(file.fileno()).st_size
    first = file.read(HEADER)
    end = LENGTH.size + LENGTH.unpack_from(first)[0] if len(first) >= LENGTH.size else size + 1
    if end > size:
        raise Damaged("it is cut off")
    text = first[LENGTH.size : end] + (file.read(end - len(first)) if end > len(first) else b"")
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"its header is no JSON ({error})") from error
    if not isinstance(header, dict):
        raise Damaged("its header makes no sense")
    return header, end, size


def _read(file: FileIO, into: Bytes, offset: int) -> None:
    file.seek(offset)
    if file.readinto(into) != into.nbytes:
        raise Damaged("the file is cut off")
