"""What every kind of source gives: its images, each with what lies beside it."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO, Protocol

from otl.config import PICTURES
from otl.datamodules import mask_files
from otl.datamodules.headers import Header
from otl.trust import public
from otl.types import File, Problem
from otl.urls import is_url

LABELS = (mask_files.LABEL, "-condlabel")  # ends of stems: not images to train on


class Folder(Protocol):
    """What an image elsewhere than on a disk lies in."""

    def beside(self, name: str) -> Beside:
        """Another file of it, with its folders; whether there is one shows when it is opened."""
        ...


class Beside(Protocol):
    """A file beside an image."""

    name: str

    def open(self, mode: str) -> IO[bytes]:
        """Raises FileNotFoundError where there is none."""
        ...


@dataclass(slots=True)
class Item:
    """One image of a source, or what is taken for one."""

    file: File
    key: str  # its name in the source, with folders
    folder: Folder | None = None  # where its neighbours are; None: on its disk, or it has none
    header: Header | None = None  # None: not read yet
    flaw: str = ""  # why it cannot be read, where that is known already
    given: tuple[str, ...] = ()  # captions that a table has for it
    mask: File | None = None  # that a table has for it

    def __post_init__(self) -> None:
        if is_url(self.key):  # as a table has it
            self.key = public(self.key)

    @property
    def name(self) -> str:
        return self.key.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return PurePosixPath(self.key).stem

    def with_name(self, name: str) -> Beside:
        """The file of that name beside it; whether there is one shows when it is opened."""
        if isinstance(self.file, Path):
            return self.file.with_name(name)
        if self.folder is None:
            return Nothing(name)
        return self.folder.beside(PurePosixPath(self.key).with_name(name).as_posix())


@dataclass(frozen=True)
class Nothing:
    """A file that is not there."""

    name: str

    def open(self, mode: str) -> IO[bytes]:
        raise FileNotFoundError(self.name)


@dataclass
class Found:
    """The images of one source, and what there is to say of the rest."""

    items: list[Item] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    masks: int = 0  # files that are masks of others by their name


def pictures(names: Iterable[str]) -> list[str]:
    """Those that are taken for images to train on."""
    return [name for name in names if is_picture(name)]


def masks(names: Iterable[str]) -> int:
    """How many are masks of others by their name."""
    return sum(map(is_mask, names))


def is_mask(name: str) -> bool:
    return mask_files.LABEL in name and PurePosixPath(name).stem.endswith(mask_files.LABEL)


def mask_of(image: str, names: Container[str]) -> str | None:
    """The name of the mask beside an image, if there is one."""
    stem = f"{image.rpartition('.')[0]}{mask_files.LABEL}"
    return next((name for extension in mask_files.EXTENSIONS if (name := stem + extension) in names), None)


def is_picture(name: str) -> bool:
    lowered = name.lower()
    return lowered.endswith(PICTURES) and not PurePosixPath(lowered).stem.endswith(LABELS)
