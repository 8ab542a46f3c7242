"""The images of a concept, wherever its path leads."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from otl.config import ARCHIVES, MANIFESTS, PICTURES, TABLES, SettingsError
from otl.datamodules.files import Remote
from otl.datamodules.headers import Header, Limits, examined
from otl.datamodules.index import Index
from otl.datamodules.sources import archive, manifest, table
from otl.datamodules.sources.columns import Kind, chosen, require_table
from otl.datamodules.sources.folder import Store
from otl.datamodules.sources.items import Found, Item, mask_of, masks, pictures
from otl.datamodules.sources.listed import outside
from otl.datamodules.sources.places import Place, Wanted, located
from otl.types import Problem
from otl.wording import counted

UNSUPPORTED = (".heic", ".heif", ".jxl", ".svg", ".eps", ".pdf", ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2")
UNREAD = "it is of a kind that is not read"
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # of Hugging Face's imagefolder
SPLIT = re.compile(r"(?:^|[/._-])(train|test|validation|valid|val|dev)(?=[/._-])", re.IGNORECASE)
LARGE_GROUP = 512 * 2**20  # bytes
THREADS = 8  # archives and tables that are gone through at once

Examine = Callable[[IO[bytes]], Header]


def find(wanted: Wanted, index: Index, limits: Limits) -> Found:
    """The images of a source.

    Args:
        wanted: the source.
        index: of what lies elsewhere or in archives.
        limits: that its images have to keep to.

    Raises:
        SettingsError: there are none, or they cannot be told apart from other things.
    """
    place = located(wanted)
    examine = partial(examined, limits=limits)
    names = list(place.files)
    images, archives = pictures(names), _ending(names, ARCHIVES)
    tables = [name for name in _ending(names, TABLES) if not _last(name).startswith(("metadata.", "cache-"))]
    _refuse_useless(wanted, place, tabular=bool(_ending(names, (*TABLES, *MANIFESTS))))
    if place.single:
        return _of_file(wanted, place, names[0], index, examine)
    if images:
        found = _of_folder(wanted, place, images, index)
    elif archives and tables:
        raise SettingsError(f"{place.where} holds {archives[0]} and {tables[0]}: give one kind, with a pattern")
    elif archives or tables:
        found = _of_files(wanted, place, archives or tables, index, examine)
    else:
        found = Found(problems=_empty(wanted, place, names))
    return Found(found.items, _unsupported(wanted, place) + _unnamed(wanted, names) + found.problems, masks(names))


def _of_file(wanted: Wanted, place: Place, name: str, index: Index, examine: Examine) -> Found:
    """The images of one archive, table or manifest."""
    file = place.files[name]
    if _ending([name], ARCHIVES):
        return Found(archive.items(file, index, examine, inside=place.inside))
    if _ending([name], (*TABLES, *MANIFESTS)):
        return _of_table(wanted, file, index, examine)
    accepted = ", ".join((*TABLES, *MANIFESTS, *ARCHIVES))
    raise SettingsError(f"{place.where} is a file; give the folder it is in, or a file of images: {accepted}")


def _of_files(wanted: Wanted, place: Place, names: Sequence[str], index: Index, examine: Examine) -> Found:
    """The images of several archives or tables."""
    _one_split(place, names)
    with ThreadPoolExecutor(THREADS) as pool:
        each = list(pool.map(lambda name: _of_file(wanted, place, name, index, examine), names))
    return Found([item for one in each for item in one.items], [problem for one in each for problem in one.problems])


def _of_table(wanted: Wanted, file: Path | Remote, index: Index, examine: Examine) -> Found:
    """The images inside of a table, or those that it lists."""
    kinds = manifest.kinds(file)
    columns = chosen(kinds, wanted.columns, place=str(file), setting=wanted.concept)
    if kinds[columns.image] != Kind.image:
        if columns.mask and kinds[columns.mask] == Kind.image:
            raise SettingsError(
                f"{file}: the images of {columns.image} are paths, and the masks of {columns.mask} are images "
                f"themselves: set {wanted.concept}.mask_column to a column of paths"
            )
        items = manifest.items(file, columns)
        return Found(items, outside(file, items, wanted.setting))
    items, largest = table.items(file, columns, index, examine)
    problems = outside(file, items, wanted.setting)
    if largest <= LARGE_GROUP:
        return Found(items, problems)
    message = (
        f"{file} has row groups of up to {largest / 2**20:.0f} MiB, and an image is read with its whole group: "
        "write it with smaller ones, such as row_group_size=100"
    )
    return Found(items, [*problems, Problem(wanted.setting, message, fatal=False)])


def _of_folder(wanted: Wanted, place: Place, images: Sequence[str], index: Index) -> Found:
    """The images of a folder, with what its metadata says of them."""
    store = None if place.on_disk else Store(place.files, index)  # type: ignore[arg-type]
    items = {name: Item(place.files[name], name, store) for name in images}
    if store is not None:  # on a disk it is looked for where the settings say
        for name, item in items.items():
            item.mask = store.files.get(mask_of(name, store.files) or "")
    metadata = [name for name in place.files if _last(name) in METADATA]
    _one_split(place, metadata)
    extra, strange = [], []
    for name in metadata:
        rows = _metadata(wanted, place, name)
        strange += outside(place.files[name], [row for row in rows if row.key in items], wanted.setting)
        for listed in rows:
            item = items.get(listed.key)
            if item is None:
                flaw = listed.flaw or f"it names {listed.key}, which is not there"
                extra.append(Item(place.files[name], listed.key, flaw=flaw))
            else:
                item.given, item.mask = item.given + listed.given, item.mask or listed.mask
    others = [name for name in _ending(place.files, (*ARCHIVES, *TABLES, *MANIFESTS)) if _last(name) not in METADATA]
    return Found([*items.values(), *extra], strange + _left_out(wanted, others))


def _metadata(wanted: Wanted, place: Place, name: str) -> list[Item]:
    """What one file of metadata lists, by the names in the whole folder."""
    file = place.files[name]
    columns = chosen(manifest.kinds(file), wanted.columns, place=str(file), setting=wanted.concept)
    items, parent = manifest.items(file, columns), name.rpartition("/")[0]
    for item in items:
        item.key = PurePosixPath(parent, item.key).as_posix()
    return items


def _one_split(place: Place, names: Sequence[str]) -> None:
    """Refuse what would train on the images that a dataset holds back for tests."""
    found = {match[1].casefold(): match for name in names if (match := SPLIT.search(name))}
    if len(found) < 2:
        return
    match = found.get("train") or next(iter(found.values()))
    folder, name = place.where.rstrip("/"), match.string
    rest = "" if name[match.end(1)] == "/" else f"*{PurePosixPath(name).suffix}"
    listed = ", ".join(sorted(found))
    raise SettingsError(
        f"{place.where} holds several splits ({listed}): give one, such as {folder}/{name[: match.end(1)]}{rest}"
    )


def _refuse_useless(wanted: Wanted, place: Place, *, tabular: bool) -> None:
    """What is set and would change nothing."""
    if not tabular:
        require_table(wanted.columns, setting=wanted.concept, where=place.where)
    if not wanted.recursive and place.single:
        raise SettingsError(f"{wanted.concept}.recursive=false would have no effect: {place.where} is a file")


def _empty(wanted: Wanted, place: Place, names: Sequence[str]) -> list[Problem]:
    if wanted.may_be_empty:
        return []
    listed = _ending(names, MANIFESTS)
    hint = f"; if {listed[0]} lists them, give that file" if listed else ""
    accepted = ", ".join(extension[1:] for extension in PICTURES)
    return [Problem(wanted.setting, f"{place.where} holds no images{hint}; accepted are {accepted}")]


def _left_out(wanted: Wanted, names: Sequence[str]) -> list[Problem]:
    if not names:
        return []
    message = "these are left out, since there are images beside them; to read one, give it as a path of its own"
    return [Problem(wanted.setting, message, False, list(names))]


def _unsupported(wanted: Wanted, place: Place) -> list[Problem]:
    others = [str(place.files[name]) for name in _ending(place.files, UNSUPPORTED)]
    if not others:
        return []
    message = f"{counted(len(others), 'file')} of a kind that is not read, and left out; convert to png or jpg"
    return [Problem(wanted.setting, message, False, others, [(file, UNREAD) for file in others])]


def _unnamed(wanted: Wanted, names: Sequence[str]) -> list[Problem]:
    """Files that may be images, for all that their names say: of downloads, such as `photo` and `photo.jpg_large`."""
    odd = [name for name in names if _odd(name)]
    if not odd:
        return []
    message = f"{counted(len(odd), 'file')} without the extension of an image, and left out; rename what is an image"
    return [Problem(wanted.setting, message, False, odd)]


def _odd(name: str) -> bool:
    """Whether it has no extension, or one that only begins as that of an image."""
    _, dot, end = _last(name).lower().rpartition(".")
    return not dot or (f".{end}".startswith(PICTURES) and f".{end}" not in PICTURES)


def _ending(names: Iterable[str], suffixes: Sequence[str]) -> list[str]:
    return [name for name in names if name.lower().endswith(tuple(suffixes))]


def _last(name: str) -> str:
    return name.rpartition("/")[2]
