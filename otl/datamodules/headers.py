"""What is known of an image without decoding it: its size, and whether it is whole."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

from PIL import Image

from otl.config import SettingsError
from otl.datamodules.images import UNREADABLE, opened, reason, upright_size
from otl.trust import public
from otl.types import File, Size

TAIL = 4096  # bytes
ENDS = {"JPEG": b"\xff\xd9", "MPO": b"\xff\xd9", "PNG": b"IEND"}  # what the last bytes of a whole file contain
BOX = struct.Struct(">I4x")  # an AVIF is a row of boxes, each of which begins with its length
STRIPS, TILES = (273, 279), (324, 325)  # TIFF's tags of offsets and lengths
MILLION = 1_000_000


@dataclass(frozen=True)
class Limits:
    """What an image has to keep to."""

    max_megapixels: float = 200.0  # larger ones have a flaw
    decodes: bool = False  # whether all of its pixels are looked at


@dataclass(frozen=True, slots=True)
class Header:
    """What an image's file says of itself."""

    size: Size  # upright; 0x0 where it cannot be read
    bytes: int  # of the file
    format: str  # as Pillow calls it
    mark: int  # of the last bytes: files that differ in it differ
    flaw: str = ""  # why it cannot be trained on; empty: it can


def read(file: File, limits: Limits) -> Header:
    """The header of what may be an image.

    Raises:
        SettingsError: it lies elsewhere and cannot be fetched.
    """
    try:
        if isinstance(file, Path) and not S_ISREG(file.stat().st_mode):  # a pipe would be waited for
            return Header(Size(0, 0), 0, "", 0, "it is no regular file")
        # What is elsewhere is fetched in one request where all of it is needed.
        whole = limits.decodes and not isinstance(file, Path)
        with io.BytesIO(file.read_bytes()) if whole else file.open("rb") as opened_file:
            return examined(opened_file, limits)
    except OSError as error:  # it cannot even be opened
        gone = isinstance(error, FileNotFoundError)  # of which a store says no more than the address, secrets and all
        said = error.strerror or ("there is no such file" if gone else public(str(error)))
        lost = isinstance(file, Path) and file.is_symlink()
        return Header(Size(0, 0), 0, "", 0, f"it is a link that leads nowhere ({said})" if lost else said)


def examined(file: IO[bytes], limits: Limits) -> Header:
    """The same for one that is open."""
    size, format, flaw = Size(0, 0), "", ""
    bytes = file.seek(0, io.SEEK_END)
    file.seek(max(0, bytes - TAIL))
    tail = file.read()
    file.seek(0)
    try:
        with opened(file) as image:
            size, format = upright_size(image), image.format or ""
            flaw = _unfit(size, limits.max_megapixels)
            if not flaw and (limits.decodes or _ends_early(image, file, tail, bytes)):
                image.load()  # raises if pixels are missing
    except SettingsError:  # it could not be fetched, which says nothing of it
        raise
    except UNREADABLE as error:
        size, flaw = Size(0, 0), "it is empty" if bytes == 0 else reason(error)
    return Header(size, bytes, format, zlib.crc32(tail), flaw)


def as_json(header: Header) -> list[Any]:
    return [*header.size, header.bytes, header.format, header.mark, header.flaw]


def from_json(row: Sequence[Any]) -> Header:
    return Header(Size(*row[:2]), *row[2:])


def _unfit(size: Size, max_megapixels: float) -> str:
    """Why nothing can be trained on an image of that size."""
    if min(size) < 2:
        return f"it is {size} pixels (height x width): there is nothing to see"
    if size.area > max_megapixels * MILLION:
        megapixels = f"{size.area / MILLION:.0f} megapixels"
        return f"{size} (height x width) are {megapixels}, more than data.max_megapixels={max_megapixels:g}"
    return ""


def _ends_early(image: Image.Image, file: IO[bytes], tail: bytes, bytes: int) -> bool:
    """Whether the file may have been cut off, as an interrupted copy is: only its pixels can tell."""
    if image.format == "WEBP":
        return False  # Pillow has read all of it
    if image.format == "AVIF":
        return _end_of_boxes(file, bytes) > bytes
    if image.format == "TIFF":
        return _end_of_strips(image) > bytes
    if image.format == "GIF":
        return not tail.rstrip(b"\0").endswith(b";")
    return image.format not in ENDS or ENDS[image.format] not in tail


def _end_of_boxes(file: IO[bytes], bytes: int) -> int:
    """Where an AVIF ends by what it says itself."""
    end = 0
    while end + BOX.size <= bytes:
        file.seek(end)
        (length,) = BOX.unpack(file.read(BOX.size))
        if length < BOX.size:  # to the end of the file, or 64 bits long
            return bytes
        end += length
    return end


def _end_of_strips(image: Image.Image) -> float:
    """Where the pixels of a TIFF end in its file."""
    for offsets, counts in (STRIPS, TILES):
        if offsets in image.tag_v2 and counts in image.tag_v2:  # type: ignore[attr-defined]
            return max(a + b for a, b in zip(image.tag_v2[offsets], image.tag_v2[counts]))  # type: ignore[attr-defined]
    return float("inf")
