"""The jobs of a sweep, before Hydra's sweeper makes them. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, IntervalSweep

from otl.config import Problem, SettingsError, conf_dir
from otl.registry import plugin_conf_dirs


def groups_in(*folders: str | None) -> list[Path]:
    """The folders that have groups of options: those given, OTL's own and those of plugins."""
    return [*(Path(folder) for folder in folders if folder), conf_dir(), *map(Path, plugin_conf_dirs())]


def options(group: str, folders: Sequence[Path]) -> list[str]:
    """The names of a group's options."""
    return sorted({path.stem for folder in folders for path in (folder / group).glob("*.yaml")})


def jobs(overrides: Sequence[str], folders: Sequence[Path] = ()) -> Iterator[list[str]]:
    """The overrides of each job of a sweep; of an interval, in which only the sweeper knows the values, the two ends.

    Args:
        folders: in which `glob` looks for options.
    """
    choices = []
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        value, key = override.value(), override.get_key_element()
        if isinstance(value, Glob):
            choices.append([f"{key}={option}" for option in value.filter(options(override.key_or_group, folders))])
        elif not override.is_sweep_override():
            choices.append([str(override.input_line)])
        elif isinstance(value, IntervalSweep):
            choices.append([f"{key}={end}" for end in (value.start, value.end)])
        else:
            choices.append([f"{key}={each}" for each in override.sweep_string_iterator()])
    yield from map(list, product(*choices))


def unswept(overrides: Sequence[str], sweeper: str) -> Iterator[Problem]:
    """Intervals, where Hydra's usual sweeper makes the jobs: it takes lists of values alone.

    Args:
        sweeper: dotted name of its class.
    """
    if not sweeper.endswith(".BasicSweeper"):
        return
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if override.is_interval_sweep():
            message = f"{str(override.input_line).partition('=')[2]} needs a sweeper that searches, such as Optuna's"
            ways = "give values, such as 1e-4,5e-5, choice(8,16) or range(1,5)"
            yield Problem(
                override.key_or_group, f"{message} (hydra/sweeper=optuna, of hydra-optuna-sweeper); or {ways}"
            )


def parted(overrides: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """What is the same in all jobs of a sweep; and by its name what is not, as it was typed."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    same = [str(each.input_line) for each in parsed if not each.is_sweep_override()]
    return same, {each.key_or_group: str(each.input_line) for each in parsed if each.is_sweep_override()}


def queued(setting: str, folders: Sequence[Path]) -> str:
    """`experiment=FOLDER/` as the list of the presets in that folder; any other setting as it is.

    Args:
        folders: that have groups of options.

    Raises:
        SettingsError: there are none.
    """
    found = re.fullmatch(r"\+?experiment=(.+)/", setting)
    if found is None:
        return setting
    presets = options(f"experiment/{found[1]}", folders)
    if not presets:
        looked = folders[0] / "experiment" / found[1]
        raise SettingsError(f"experiment: {found[1]}/ holds no presets: looked for .yaml files in {looked}")
    return "experiment=" + ",".join(f"{found[1]}/{name}" for name in presets)
