"""The files of a folder: on a disk, or of any file system that fsspec knows."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from otl.config import SettingsError
from otl.datamodules.files import Remote, file_system, patiently
from otl.datamodules.index import Index

STAMPS = ("ETag", "etag", "blob_id", "md5Hash", "Content-MD5")  # what a store says of a file's content
THREADS = 16  # requests at once
TIMES = ("LastModified", "last_modified", "updated", "mtime", "created")  # where it says nothing of it


def on_disk(root: Path, *, recursive: bool, without: Sequence[Path] = ()) -> list[str]:
    """The names of a folder's files, hidden ones left out, in an order that no file system decides.

    Args:
        root: the folder.
        recursive: whether its subfolders are searched too.
        without: folders that are left out.

    Raises:
        SettingsError: a folder cannot be searched.
    """
    found: list[str] = []
    seen = {os.path.realpath(each) for each in without}  # a link may lead back up
    for parent, folders, names in os.walk(root, followlinks=True, onerror=_unsearchable):
        real = os.path.realpath(parent)
        deeper = recursive and real not in seen
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if deeper else []
        if real not in seen:
            inside = os.path.relpath(parent, root)
            prefix = "" if inside == "." else f"{inside.replace(os.sep, '/')}/"
            found += [prefix + name for name in names if not name.startswith(".")]
        seen.add(real)
    return in_order(found)


def in_store(url: str, *, recursive: bool) -> dict[str, Remote]:
    """The files below a URL by their names; empty where there are none.

    Raises:
        SettingsError: the store cannot be asked.
    """
    fs, path = file_system(url)
    depth = None if recursive else 1
    try:
        listed = patiently(url, lambda: fs.find(path, maxdepth=depth, detail=True))
    except FileNotFoundError:
        return {}
    names = {_inside(each, path): info for each, info in listed.items()}
    kept = in_order(name for name in names if name and not any(part.startswith(".") for part in name.split("/")))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(kept, pool.map(lambda name: remote(fs, names[name]), kept)))


def matching(url: str, root: str) -> dict[str, Remote]:
    """The files that match a URL with * or ? in it, by their names below its root."""
    fs, path = file_system(url)
    try:
        listed = patiently(url, lambda: fs.glob(path, detail=True))
    except FileNotFoundError:  # some say so of the folder in which the pattern begins
        return {}
    start = fs._strip_protocol(root)
    names = {_inside(each, start): info for each, info in listed.items() if info["type"] == "file"}
    return {name: remote(fs, names[name]) for name in in_order(names)}


def single(url: str) -> Remote | None:
    """The file of a URL; None where there is none."""
    fs, path = file_system(url)
    try:
        info = patiently(url, lambda: fs.info(path))
    except FileNotFoundError:
        return None
    return remote(fs, info) if info["type"] == "file" else None


def remote(fs: Any, info: dict[str, Any]) -> Remote:
    """A file as a store describes it."""
    if info.get("size") is None:  # a list of links says nothing but names
        try:
            info = patiently(info["name"], lambda: fs.info(info["name"]))
        except FileNotFoundError:
            return Remote(info["name"])  # a dead link: said when it is opened
    said = next((info[key] for key in STAMPS if info.get(key)), None)
    stamp = said or next((info[key] for key in TIMES if info.get(key)), "")
    return Remote(fs.unstrip_protocol(info["name"]), info.get("size"), str(stamp).strip('"'))


@dataclass(frozen=True)
class Store:
    """The files below a URL, and the small ones among them that have been read."""

    files: dict[str, Remote]  # by name
    index: Index

    def beside(self, name: str) -> Text:
        return Text(name, self.files.get(name), self.index)


@dataclass(frozen=True)
class Text:
    """A small file of a store: what the index has of it is not fetched again."""

    name: str
    file: Remote | None  # None: there is none
    index: Index

    def open(self, mode: str) -> IO[bytes]:
        if self.file is None:
            raise FileNotFoundError(self.name)
        kept = self.index.get(str(self.file), self.file.identity())
        if kept is None:
            kept = as_text(self.file.read_bytes())
            self.index.put(str(self.file), self.file.identity(), kept)
        return io.BytesIO(as_bytes(kept))


def as_text(content: bytes) -> str:
    """Any bytes as a string that JSON can hold."""
    return content.decode("utf-8", "surrogateescape")


def as_bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def in_order(names: Iterable[str]) -> list[str]:
    """img2 before img10."""
    return sorted(names, key=_natural)


def _natural(name: str) -> tuple[list[str | int], str]:
    parts = re.split(r"([0-9]+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _inside(path: str, folder: str) -> str:
    """A path relative to a folder of the same file system."""
    return path.removeprefix(folder.rstrip("/")).lstrip("/")


def _unsearchable(error: OSError) -> None:
    raise SettingsError(f"{error.filename}: cannot be searched for images ({error.strerror}); mend it or move it away")
