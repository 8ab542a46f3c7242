"""Which columns of a table hold what: by what is set, else by the names that people give them. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum

from otl.config import MANIFESTS, TABLES, SettingsError

IMAGES = "image img picture photo jpg jpeg png webp file_name filename file image_path image_file path filepath".split()
IMAGES += "url image_url".split()
CAPTIONS = "caption captions text texts prompt prompts description sentence sentences".split()
MASKS = "mask mask_file_name mask_file mask_path".split()


class Kind(Enum):
    """What a column's values are."""

    image = "image"  # the bytes of an image
    text = "text"  # a string, or a list of them
    other = "other"


@dataclass(frozen=True)
class Chosen:
    """What is set of a source's columns; None: by their names."""

    image: str | None = None
    caption: str | None = None
    mask: str | None = None


def require_table(wanted: Chosen, *, setting: str, where: str) -> None:
    """Raises SettingsError: columns are set of a place that holds no table."""
    for role, name in asdict(wanted).items():
        if name is not None:
            raise SettingsError(
                f"{setting}.{role}_column={name}: would have no effect: {where} has no table; leave it out, or give a "
                f"folder or file with one: {', '.join((*TABLES, *MANIFESTS))}"
            )


@dataclass(frozen=True)
class Columns:
    """The columns that are read."""

    image: str
    caption: str | None  # None: there is none
    mask: str | None


def chosen(kinds: Mapping[str, Kind], wanted: Chosen, *, place: str, setting: str) -> Columns:
    """The columns to read.

    Args:
        kinds: of all columns, by name.
        wanted: those that are set.
        place: of the table, for messages.
        setting: the concept's, such as data.concepts.cat.

    Raises:
        SettingsError: a column that is set is not there or holds something else, or there is none with images.
    """
    readable = [name for name, kind in kinds.items() if kind != Kind.other]
    of_masks = {wanted.mask, *MASKS}
    embedded = [name for name, kind in kinds.items() if kind == Kind.image and not {name, name.casefold()} & of_masks]
    for role, name in (("image", wanted.image), ("caption", wanted.caption), ("mask", wanted.mask)):
        if name is not None and name not in readable:
            what = "holds neither text nor images" if name in kinds else "is no column"
            raise SettingsError(f"{setting}.{role}_column={name}: {what} of {place}; there are {_listed(kinds)}")
    image = wanted.image or named(IMAGES, embedded) or (embedded[0] if len(embedded) == 1 else named(IMAGES, readable))
    if image is None:
        raise SettingsError(
            f"{place}: no column is taken for the images; set {setting}.image_column to one of {_listed(kinds)}"
        )
    texts = [name for name, kind in kinds.items() if kind == Kind.text and name != image]
    masks = [name for name in readable if name != image]
    return Columns(image, wanted.caption or named(CAPTIONS, texts), wanted.mask or named(MASKS, masks))


def named(known: Sequence[str], names: Sequence[str]) -> str | None:
    """The first of the known names that a column has, in whatever case."""
    by_name = {name.casefold(): name for name in reversed(names)}
    return next((by_name[name] for name in known if name in by_name), None)


def _listed(kinds: Mapping[str, Kind]) -> str:
    said = {Kind.image: "images", Kind.text: "text", Kind.other: "neither text nor images"}
    return ", ".join(f"{name} ({said[kind]})" for name, kind in kinds.items())
