"""What a concept's path means: the files below a folder, one file, or those that match a pattern."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from otl.config import ARCHIVES, MANIFESTS, TABLES, SettingsError
from otl.datamodules.files import Remote, name_of
from otl.datamodules.sources import folder
from otl.datamodules.sources.columns import Chosen
from otl.urls import hub_hint, is_url

PATTERN = re.compile(r"[*?]")
INSIDE = re.compile(r"(?:zip|tar)://(.*?)::(.+)")  # a folder of an archive, and the archive


@dataclass(frozen=True)
class Wanted:
    """What is asked of a source.

    Args:
        path: folder, file or URL, as it was given.
        setting: that gave it, such as data.concepts.cat.path.
        recursive: whether subfolders are searched.
        columns: those that are set.
        without: folders that are left out.
        may_be_empty: whether a folder without images is no mistake.
    """

    path: str
    setting: str
    recursive: bool = True
    columns: Chosen = field(default_factory=Chosen)
    without: Sequence[Path] = ()
    may_be_empty: bool = False

    @property
    def concept(self) -> str:
        """What the other settings of the source begin with."""
        return self.setting.removesuffix(".path") if self.setting != "data.path" else "data.concepts.NAME"


@dataclass(frozen=True)
class Place:
    """Files below one folder, or one file."""

    where: str  # for messages
    files: Mapping[str, Path | Remote]  # by name
    on_disk: bool
    single: bool = False
    inside: str = ""  # folder of an archive


class OnDisk(Mapping[str, Path]):
    """Paths of files of a folder by their names, made when they are asked for."""

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root, self.names = root, names

    def __getitem__(self, name: str) -> Path:
        return self.root / name

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def located(wanted: Wanted) -> Place:
    """The files that a path means.

    Raises:
        SettingsError: there are none.
    """
    path, inside = wanted.path, INSIDE.fullmatch(wanted.path)
    if inside:
        place = located(Wanted(inside[2], wanted.setting))
        return Place(path, place.files, place.on_disk, place.single, inside[1])
    return _elsewhere(wanted) if is_url(path) else _on_disk(wanted)


def fixed(pattern: str) -> str:
    """The folder in which a pattern begins."""
    start = re.split(r"[*?\[]", pattern, maxsplit=1)[0]
    return start.rpartition("/")[0] or ("/" if start.startswith("/") else ".")


def _on_disk(wanted: Wanted) -> Place:
    path = Path(wanted.path).expanduser()
    if path.is_dir():
        names = folder.on_disk(path, recursive=wanted.recursive, without=wanted.without)
        return Place(str(path), OnDisk(path, names), on_disk=True)
    if path.is_file():
        return Place(str(path), {path.name: path}, on_disk=True, single=True)
    if PATTERN.search(str(path)):
        root = Path(fixed(path.as_posix()))
        found = [Path(each) for each in glob.glob(str(path), recursive=True)]
        names = folder.in_order(each.relative_to(root).as_posix() for each in found if each.is_file())
        if names:
            return Place(str(path), OnDisk(root, names), on_disk=True)
    looked = f"looked for {path.absolute()}"
    raise SettingsError(f"{path} does not exist ({looked}); give a folder of images{hub_hint(wanted.path)}")


def _elsewhere(wanted: Wanted) -> Place:
    url = wanted.path
    if PATTERN.search(url.partition("?")[0] if url.startswith("http") else url):
        files = folder.matching(url, fixed(url))
    elif PurePosixPath(name_of(url)).suffix.lower() in (*TABLES, *MANIFESTS, *ARCHIVES):
        single = folder.single(url)
        if single is not None:
            return Place(url, {single.name: single}, on_disk=False, single=True)
        files = {}
    else:
        files = folder.in_store(url, recursive=wanted.recursive)
    if not files:
        raise SettingsError(f"{url}: there are no files; look at the address and the credentials")
    return Place(url, files, on_disk=False)
