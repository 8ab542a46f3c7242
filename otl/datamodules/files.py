"""Files of a dataset that lie elsewhere than on a disk, and what any file holds."""

from __future__ import annotations

import hashlib
import io
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.parse import unquote, urlsplit

from otl.config import SettingsError
from otl.trust import public
from otl.types import File
from otl.urls import is_url, unreadable

BUFFER = 65536  # bytes; holds most headers of images, and is one request
ATTEMPTS = 5  # of a request, before a run ends for it
LARGEST = 256 * 2**20  # bytes that a packed file may unpack to; what is not packed is as large as its archive shows
PATIENCE = 0.5  # seconds before the second attempt, doubled before each further one


class Named:
    """The parts of a name that a class has as `name`."""

    __slots__ = ()

    @property
    def stem(self) -> str:
        return PurePosixPath(self.name).stem  # type: ignore[attr-defined]

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.name).suffix  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Remote(Named):
    """A file of any file system that fsspec knows. Reads what it is asked for and keeps nothing."""

    url: str
    bytes: int | None = None  # None: not known
    stamp: str = ""  # is another one when the content is; empty: not known

    @property
    def name(self) -> str:
        return name_of(str(self))

    def __str__(self) -> str:
        return public(self.url)  # what has its name has no password: plan, manifest, log, index

    def identity(self) -> str:
        return f"{self} {self.stamp or self.bytes}"

    def read_bytes(self) -> bytes:
        content = fetched(self.url)
        if self.bytes is not None and len(content) != self.bytes:
            raise SettingsError(
                f"{self}: has {len(content)} bytes, and had {self.bytes} when the dataset was indexed; start again"
            )
        return content

    def read_range(self, start: int, count: int) -> bytes:
        return fetched(self.url, start, start + count)

    def open(self, mode: str = "rb", buffering: int = BUFFER) -> IO[bytes]:
        size = self.bytes if self.bytes is not None else size_of(self.url)
        return io.BufferedReader(Window(self.read_range, size), buffering)


@dataclass(frozen=True, slots=True)
class Part(Named):
    """A stretch of bytes of another file: a member of an archive."""

    archive: Path | Remote
    name: str  # with the folders inside of the archive
    start: int  # bytes
    bytes: int  # as they lie there
    unpacked: int | None = None  # bytes that it says it has where it is deflated, as zip does; None: it is not
    content: str = ""  # `hash_of` what it holds, from when the archive was gone through; empty: it is broken

    def __str__(self) -> str:
        return f"{self.archive}/{self.name}"

    def identity(self) -> str:
        return self.content

    def read_bytes(self) -> bytes:
        content = read_range(self.archive, self.start, self.bytes)
        if len(content) != self.bytes:
            raise SettingsError(f"{self.archive}: is shorter than when the dataset was indexed; start again")
        if self.unpacked is None:
            return content
        try:
            return inflate(content, self.unpacked)
        except ValueError as error:
            raise SettingsError(f"{self}: {error}") from error

    def open(self, mode: str = "rb") -> IO[bytes]:
        return io.BytesIO(self.read_bytes())


class Window(io.RawIOBase):
    """Reads a file by ranges: one request for each read.

    Args:
        read: start and count -> bytes.
        size: of the file, bytes.
    """

    def __init__(self, read: Callable[[int, int], bytes], size: int) -> None:
        super().__init__()
        self._read, self._size, self._at = read, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(0, base + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        content = self._read(self._at, count)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)


def content_hash(file: File) -> str:
    """What a file holds, as 32 hex digits: a hash of its bytes; of a part of another file, from when that was read.

    Of a single file elsewhere, a hash of what names the content for certain: nothing is fetched for it.
    """
    if isinstance(file, Remote):
        return hash_of(file.identity().encode())
    if not isinstance(file, Path):
        return file.identity()
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def hash_of(content: bytes) -> str:
    """As `content_hash`."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def inflate(content: bytes, size: int) -> bytes:
    """Deflated bytes unpacked, and not a byte further than the `size` that their archive says.

    Raises:
        ValueError: that is too large, or not true.
    """
    if size > LARGEST:
        raise ValueError(f"it unpacks to {size / 1e6:.0f} MB, more than {LARGEST / 1e6:.0f} MB: store it unpacked")
    try:
        found = zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
    except zlib.error as error:
        raise ValueError(f"it cannot be unpacked ({error})") from error
    if len(found) != size:
        raise ValueError(f"it does not unpack to the {size} bytes that its archive says")
    return found


def named(text: str, by: Path | Remote) -> Path | Remote:
    """The file that a table or manifest means by a path or URL; relative ones begin at its own folder."""
    if is_url(text):
        return Remote(text)
    if isinstance(by, Path):
        return by.parent / text
    return Remote(f"{by.url.rpartition('/')[0]}/{text}")


def read_range(file: Path | Remote, start: int, count: int) -> bytes:
    """`count` bytes from `start` on, or as many as there are."""
    if isinstance(file, Remote):
        return file.read_range(start, count)
    with file.open("rb") as opened:
        opened.seek(start)
        return opened.read(count)


def stamp(file: Path | Remote) -> str:
    """What is another one once the content is, without reading it; empty where nothing says so for certain.

    Of a file on this disk its length, its times and its number there. The time of change cannot be put back, as that
    of modification can; but what has just changed may do so again within the same tick, and git's index does not trust
    it either.
    """
    if isinstance(file, Remote):
        return file.identity()
    found = file.stat()
    if time.time_ns() - found.st_ctime_ns <= tick(found.st_ctime_ns):
        return ""
    return f"{found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_ino}"


def tick(changed: int) -> int:
    """Within how many nanoseconds a file can have changed twice at one time of change.

    A time without a fraction comes from a disk that counts in seconds, or in twos of them, as FAT does.
    """
    return 20_000_000 if changed % 10**9 else 2 * 10**9


def place(file: Path | Remote) -> str:
    """Names what a process has open of a file."""
    if isinstance(file, Remote):
        return file.identity()
    found = file.stat()
    return f"{file.absolute()} {found.st_size} {found.st_mtime_ns}"


def name_of(url: str) -> str:
    """The last part of a URL's path."""
    first = url.partition("::")[0]
    path = unquote(urlsplit(first).path) if first.startswith(("http://", "https://")) else first
    return path.rstrip("/").rpartition("/")[2]


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system for a URL, and the path there.

    Raises:
        SettingsError: fsspec knows no such protocol, or a package for it is not installed.
    """
    import fsspec

    try:
        return fsspec.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise SettingsError(f"{public(url)}: {unreadable(url) or error}") from error


def fetched(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """A file's bytes, or those from `start` to before `end`."""
    fs, path = file_system(url)
    # What is no asynchronous file system would read megabytes ahead.
    options = {} if fs.async_impl else {"cache_type": "none"}
    return patiently(url, lambda: fs.cat_file(path, start=start, end=end, **options))


def size_of(url: str) -> int:
    fs, path = file_system(url)
    return int(patiently(url, lambda: fs.size(path)))


def patiently(url: str, request: Callable[[], Any]) -> Any:
    """What a request gives, which may fail a few times.

    Raises:
        FileNotFoundError: there is no such file.
        SettingsError: it cannot be read.
    """
    for attempt in range(ATTEMPTS):
        try:
            return request()
        except FileNotFoundError:
            raise
        except Exception as error:  # each file system has errors of its own
            last = error
            if isinstance(error, PermissionError):
                break
        if attempt + 1 < ATTEMPTS:
            time.sleep(PATIENCE * 2**attempt)
    said = public(f"{type(last).__name__}: {last}")
    raise SettingsError(
        f"{public(url)}: cannot be read ({said}); look at the address, the network and the credentials"
    ) from last
