"""Archives: .tar, as WebDataset's shards are, and .zip. Gone through once; then each image is a range of bytes."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

from otl.datamodules import headers
from otl.datamodules.files import Part, Remote, hash_of, inflate, stamp
from otl.datamodules.headers import Header
from otl.datamodules.index import Index
from otl.datamodules.sources.folder import as_bytes, as_text
from otl.datamodules.sources.items import Item, is_mask, is_picture, mask_of
from otl.types import Size

SMALL = 65536  # bytes; what is no image and no larger may be a caption
AHEAD = 4 * 2**20  # bytes of an archive elsewhere that are read at once
ZIP_HEADER = struct.Struct("<26xHH")  # before each member: at its end the lengths of name and extra field
# What the libraries raise of archives that are damaged, or made to do damage.
DAMAGED = (
    tarfile.TarError,
    zipfile.BadZipFile,
    EOFError,
    struct.error,
    UnicodeDecodeError,
    NotImplementedError,
    IndexError,
    OverflowError,
)
LINK = "it is no file but a link or the like, which is not followed inside of an archive"
LEAVES = "its name leads out of the archive"
TWICE = "there are several of its name in the archive, and nothing says which is meant"


@dataclass(frozen=True)
class Member:
    """A file of an archive."""

    name: str
    start: int  # bytes
    bytes: int  # as they lie there
    unpacked: int | None = None  # bytes that it says it has where it is deflated; None: it is not
    content: str = ""  # `hash_of` it, of images and masks that can be read

    @property
    def size(self) -> int:
        return self.bytes if self.unpacked is None else self.unpacked


@dataclass(frozen=True)
class Archive:
    """What is in one archive."""

    images: list[tuple[Member, Header]]
    masks: dict[str, Member]  # by name
    texts: dict[str, str]  # name -> content of what is small and no image
    flaw: str = ""  # why there may be more

    def beside(self, name: str) -> Kept:
        return Kept(name, self.texts.get(name))


@dataclass(frozen=True)
class Kept:
    """A small file of an archive."""

    name: str
    content: str | None  # None: there is none

    def open(self, mode: str) -> IO[bytes]:
        if self.content is None:
            raise FileNotFoundError(self.name)
        return io.BytesIO(as_bytes(self.content))


class Bounded:
    """An archive as the libraries may read it: no further than it reaches, however much a header says is to come."""

    def __init__(self, file: IO[bytes], size: int) -> None:
        self._file, self._size, self.tell = file, size, file.tell

    def read(self, count: int = -1) -> bytes:
        left = max(0, self._size - self.tell())
        return self._file.read(left if count < 0 else min(count, left))

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Raises EOFError: the place is outside of the archive."""
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        if not 0 <= place <= self._size:
            raise EOFError("a part of it is said to lie outside of it")
        return self._file.seek(place)


def items(file: Path | Remote, index: Index, examine: Callable[[IO[bytes]], Header], *, inside: str = "") -> list[Item]:
    """The images of an archive, in its order.

    Args:
        file: the archive.
        index: what is known of it already.
        examine: an open image -> its header.
        inside: folder of the archive; the others are left out.
    """
    name, before = str(file), stamp(file)
    known = index.get(name, before)
    if known is None:
        archive = gone_through(file, examine)
        index.put(name, before, as_json(archive))
    else:
        archive = from_json(known)
    found = [
        Item(_part(file, member), member.name, archive, header, mask=_mask(file, member, archive))
        for member, header in archive.images
        if member.name.startswith(inside)
    ]
    return found + ([Item(file, file.name, flaw=archive.flaw)] if archive.flaw else [])  # type: ignore[list-item]


def _part(file: Path | Remote, member: Member) -> Part:
    return Part(file, *astuple(member))


def _mask(file: Path | Remote, image: Member, archive: Archive) -> Part | None:
    name = mask_of(image.name, archive.masks)
    return None if name is None else _part(file, archive.masks[name])


def gone_through(file: Path | Remote, examine: Callable[[IO[bytes]], Header]) -> Archive:
    """Everything that is in an archive."""
    images, masks, texts, flaw, names = [], {}, {}, "", set()
    with file.open("rb", buffering=AHEAD if isinstance(file, Remote) else -1) as opened:
        size = opened.seek(0, io.SEEK_END)
        try:
            for bare, content in _members(opened, size, zipped=file.suffix.lower() == ".zip"):
                member = replace(bare, content=hash_of(content)) if isinstance(content, bytes) else bare
                shown = is_picture(member.name) or is_mask(member.name)
                if strange := _strange(member.name, names) or LINK * (content is None and shown):
                    images.append((member, _flawed(strange)))
                elif is_picture(member.name):
                    images.append((member, content if isinstance(content, Header) else examine(io.BytesIO(content))))
                elif is_mask(member.name):
                    masks[member.name] = member
                elif isinstance(content, bytes):
                    texts[member.name] = as_text(content)
        except DAMAGED as error:
            flaw = f"the archive cannot be read to its end, after {len(images)} images ({error})"
    return Archive(images, masks, texts, flaw)


def _flawed(why: str) -> Header:
    return Header(Size(0, 0), 0, "", 0, why)


def _strange(name: str, names: set[str]) -> str:
    """Why a member of that name is not taken; empty: it is, and its name is among `names` from now on."""
    if name in names:
        return TWICE
    names.add(name)
    return LEAVES if name.startswith("/") or ".." in name.split("/") else ""


def _members(file: IO[bytes], size: int, *, zipped: bool) -> Iterator[tuple[Member, bytes | Header | None]]:
    """The files of an archive that may be needed, with their content or what is wrong; None: of a link."""
    bounded: Any = Bounded(file, size)
    for member, read in _of_zip(bounded) if zipped else _of_tar(bounded, size):
        hidden = any(part.startswith(".") and part != ".." for part in member.name.split("/"))
        if not hidden and (is_picture(member.name) or is_mask(member.name) or member.size <= SMALL):
            yield member, read()


def _of_tar(file: IO[bytes], size: int) -> Iterator[tuple[Member, Callable[[], bytes | None]]]:
    file.seek(0)
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for info in archive:
            archive.members = []  # of a million it would keep them all
            if info.offset_data + info.size > size:
                raise EOFError(f"{info.name} is cut off")
            member = Member(info.name.removeprefix("./"), info.offset_data, info.size)
            if info.isreg():
                yield member, partial(_read, file, member)
            elif not info.isdir():
                yield member, lambda: None
    if size % tarfile.BLOCKSIZE:
        raise EOFError("its last block is cut off")


def _read(file: IO[bytes], member: Member) -> bytes:
    file.seek(member.start)
    content = file.read(member.bytes)
    if len(content) != member.bytes:
        raise EOFError(f"{member.name} is said to reach beyond the archive's end")
    return content


def _unpacked(file: IO[bytes], member: Member, checksum: int) -> bytes | Header:
    """A member's content; what is wrong with it where it is not what the archive says."""
    try:
        content = _read(file, member) if member.unpacked is None else inflate(_read(file, member), member.unpacked)
    except ValueError as error:
        return _flawed(str(error))
    if zlib.crc32(content) != checksum:
        raise zipfile.BadZipFile(f"{member.name} has not the checksum that the archive says")
    return content


def _of_zip(file: IO[bytes]) -> Iterator[tuple[Member, Callable[[], bytes | Header]]]:
    with zipfile.ZipFile(file) as archive:
        for info in archive.infolist():
            if info.is_dir():
                continue
            if info.flag_bits & 1:
                raise zipfile.BadZipFile(f"{info.filename} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise zipfile.BadZipFile(f"{info.filename} is neither stored nor deflated")
            file.seek(info.header_offset)
            start = info.header_offset + ZIP_HEADER.size + sum(ZIP_HEADER.unpack(file.read(ZIP_HEADER.size)))
            unpacked = info.file_size if info.compress_type == zipfile.ZIP_DEFLATED else None
            member = Member(info.filename, start, info.compress_size, unpacked)
            yield member, partial(_unpacked, file, member, info.CRC)


def as_json(archive: Archive) -> dict[str, Any]:
    images = [[*astuple(member), *headers.as_json(header)] for member, header in archive.images]
    masks = [astuple(member) for member in archive.masks.values()]
    return {"images": images, "masks": masks, "texts": archive.texts, "flaw": archive.flaw}


def from_json(known: dict[str, Any]) -> Archive:
    images = [(Member(*row[:5]), headers.from_json(row[5:])) for row in known["images"]]
    return Archive(images, {row[0]: Member(*row) for row in known["masks"]}, known["texts"], known["flaw"])
