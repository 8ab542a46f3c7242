"""What a dataset's source does not have, and where captions cannot be written, as far as names of files tell."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from otl.config import MANIFESTS, PICTURES, TABLES, Problem, SettingsError, as_problem
from otl.conflicts.data import all_captions
from otl.datamodules.sources.columns import Chosen, require_table
from otl.wording import show

CAPTION = "otl.tasks.caption.caption"


def of_sources(settings: dict[str, Any]) -> Iterator[Problem]:
    """Columns of what has none, and captions that training would not read."""
    data, task = settings.get("data") or {}, settings.get("task") or {}
    concepts = {name: each for name, each in (data.get("concepts") or {}).items() if each.get("enabled", True)}
    for name, concept in concepts.items():
        yield from of_columns(f"data.concepts.{name}", concept)
    if task.get("_target_") == CAPTION:
        groups = all_captions(data | {"concepts": concepts})
        found = {each.key: each for key, options in groups.items() for each in of_written(key, options, concepts)}
        yield from found.values()  # of what concepts share once


def of_columns(key: str, concept: dict[str, Any]) -> Iterator[Problem]:
    """Columns of a folder or file on a disk without a table."""
    columns = {role: concept.get(f"{role}_column") for role in ("image", "caption", "mask")}
    place = Path(str(concept.get("path"))).expanduser()
    if not any(columns.values()) or not place.exists() or holds_table(place):
        return
    try:
        require_table(Chosen(**columns), setting=key, where=str(place))
    except SettingsError as error:
        yield as_problem(error)


def holds_table(place: Path) -> bool:
    """Whether a file is a table, or a folder has one anywhere below it."""
    names = (name for _, _, files in os.walk(place) for name in files) if place.is_dir() else [place.name]
    return any(name.lower().endswith((*TABLES, *MANIFESTS)) for name in names)


def of_written(key: str, options: dict[str, Any], concepts: dict[str, Any]) -> Iterator[Problem]:
    """Captions go into text files, which have to be among what training reads, and no images.

    Args:
        key: of the options, such as data.concepts.NAME.captions.
        options: complete.
        concepts: by name, with what they say themselves.
    """

    def setting(name: str) -> str:
        own = concepts[key.split(".")[2]].get("captions") if key != "data.captions" else None
        return f"{key if (own or {}).get(name) is not None else 'data.captions'}.{name}"

    suffix = options["suffix"]
    if "file" not in options["sources"]:
        message = f"{show(options['sources'])}: file is not one of them, but captions are written into files"
        yield Problem(setting("sources"), f"{message}; add it")
    elif suffix and (f"name{suffix}".lower().endswith(PICTURES) or not Path(f"name{suffix}").suffix):
        yield Problem(setting("suffix"), f"{suffix}: give that of a text file, such as .txt")
