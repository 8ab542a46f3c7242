"""Which families and methods exist, from entry points, and where plugins keep their YAML; nothing is imported."""

from __future__ import annotations

import logging
import sys
import tomllib
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path

from otl.config import PACKAGE, SettingsError, conf_dir

log = logging.getLogger(__name__)

GROUPS = ("otl.models", "otl.methods")


def families() -> dict[str, EntryPoint]:
    """Name of a model family -> its class, not loaded."""
    return _declared("otl.models")


def methods() -> dict[str, EntryPoint]:
    """Name of a training method -> its class, not loaded."""
    return _declared("otl.methods")


def plugin_packages() -> dict[str, str]:
    """Top-level package of every plugin -> the distribution that declares it."""
    declared = [entry for group in GROUPS for entry in _declared(group).values()]
    return {_top_level(entry): _distribution(entry) for entry in declared if _top_level(entry) != "otl"}


def plugin_conf_dirs() -> list[Path]:
    """The `conf/` folders inside the packages of plugins.

    Raises:
        SettingsError: two packages declare one name, or bring a YAML of the same group and name as OTL or each other.
    """
    folders = {}
    for package, distribution in sorted(plugin_packages().items()):
        for location in _locations(package, distribution):
            if (location / "conf").is_dir():
                folders[location / "conf"] = distribution
    owners = dict.fromkeys(_yaml_names(conf_dir()), "otl")
    for folder, distribution in folders.items():
        for name in _yaml_names(folder):
            if name in owners:
                raise SettingsError(
                    f"the plugin {distribution} shadows {name}, which {owners[name]} has: rename {folder / name}"
                )
            owners[name] = distribution
    return list(folders)


def _declared(group: str) -> dict[str, EntryPoint]:
    return _declared_on(tuple(sys.path), group)


@lru_cache
def _declared_on(path: tuple[str, ...], group: str) -> dict[str, EntryPoint]:
    """The entry points found on `path`; OTL's own from a pyproject.toml beside it, which is newer than its metadata."""
    found: dict[str, EntryPoint] = {}
    pyproject = PACKAGE.parent / "pyproject.toml"
    if pyproject.is_file():
        own = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]["entry-points"][group]
        found = {name: EntryPoint(name, value, group) for name, value in own.items()}
    for entry in entry_points(group=group):
        if _distribution(entry) == "otl" and pyproject.is_file():
            continue
        if entry.name in found:
            both = " and ".join(sorted({_distribution(found[entry.name]), _distribution(entry)}))
            raise SettingsError(f"two packages declare {entry.name} in {group}: {both}; uninstall one of them")
        found[entry.name] = entry
    return found


def _distribution(entry: EntryPoint) -> str:
    return entry.dist.name if entry.dist else "otl"


def _top_level(entry: EntryPoint) -> str:
    return entry.value.partition(":")[0].partition(".")[0].strip()


def _locations(package: str, distribution: str) -> list[Path]:
    """The folders of a package, found without importing it."""
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None:
        log.warning("the plugin %s declares the package %r, which is not installed", distribution, package)
        return []
    return [Path(location) for location in spec.submodule_search_locations or []]


def _yaml_names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*.yaml"))]
