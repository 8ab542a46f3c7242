"""A checkpoint that is a folder of diffusers, maybe a stranger's: what it must have, and what it must not name."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from otl.config import SettingsError
from otl.formats.files import refuse_packed
from otl.formats.objects import parsed
from otl.formats.stored import shards
from otl.registry import plugin_packages
from otl.trust import below

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

INDEX = "model_index.json"
HOW = "Give a local one with model.checkpoint=PATH: a diffusers folder (with model_index.json) or a .safetensors file"
LIBRARIES = ("diffusers", "transformers")
AUTOMATIC = re.compile(r"Auto(?!encoder)")  # classes of transformers that take the part's own word for what it is


def check_index(family: DiffusionModule, folder: Path) -> None:
    """Refuse a folder that is not a diffusers pipeline, lacks parts of this family, or names what is not to be loaded.

    Raises:
        SettingsError: any of these.
    """
    has = read_json(folder / INDEX)
    lacking = [part for part in family.part_names if not isinstance(has.get(part), list) or not any(has[part][:1])]
    if lacking:
        raise SettingsError(
            f"model.checkpoint={folder}: a {has.get('_class_name')} without {', '.join(lacking)}, "
            f"which {type(family).__name__} needs: choose the model= that the checkpoint belongs to"
        )
    if len(family.text_encoders) == 1 and has.get("text_encoder_2", [None])[0]:
        raise SettingsError(
            f"model.checkpoint={folder}: a {has.get('_class_name')} with two text encoders is not a "
            f"{type(family).__name__}: choose the model= that the checkpoint belongs to"
        )
    for part, named in has.items():
        if isinstance(named, list) and any(named):
            check_class(folder, part, named)
    for index in sorted(folder.glob("*/*.index.json")):
        shards(index)
    for weights in sorted(folder.glob("*/*.bin")):
        refuse_packed(weights)


def check_class(folder: Path, part: str, named: list[Any]) -> None:
    """Refuse code that comes with the checkpoint: diffusers would run it, or ask whether it may."""
    library, name = named if len(named) == 2 else (None, None)
    if not isinstance(library, str) or not isinstance(name, str) or not known(library) or AUTOMATIC.match(name):
        said = ".".join(map(str, named))
        raise SettingsError(
            f"model.checkpoint={folder}: in {INDEX} {part} is {said}: only classes of diffusers, transformers and "
            "installed plugins are loaded, and no code that a checkpoint brings along"
        )


def known(library: str) -> bool:
    """Whether it is a library that parts come from, or a module with a pipeline of diffusers, as older ones name it."""
    if library in LIBRARIES or below(library, plugin_packages()):
        return True
    return library.isidentifier() and find_spec(f"diffusers.pipelines.{library}") is not None


def read_json(path: Path) -> dict[str, Any]:
    """A config of a checkpoint.

    Raises:
        SettingsError: it is not there or no such.
    """
    if not path.is_file():
        raise SettingsError(f"model.checkpoint={path.parent}: the folder has no {path.name}. {HOW}")
    return parsed(path.read_bytes(), f"model.checkpoint={path.parent}: {path.name}")


def said(error: Exception) -> str:
    """The kind and the first line of an error of a library's."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}"
