"""What Hydra would take from a command line in silence, and is not what it says. Imports no torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import BooleanNode

from otl.config import Problem
from otl.wording import show

GROUPS = {"task", "model", "method", "optimizer", "scheduler", "data", "trainer", "logger", "experiment"}
GROUPS |= {"captioner", "masker"}
SHARED = {f"otl.tasks.{name}.{name}" for name in ("train", "repeat", "cache")}  # tasks that several processes share


def misread(overrides: Sequence[str], settings: DictConfig) -> Iterator[Problem]:
    """Options of a group of which only the last would count, and numbers where true or false is meant.

    Args:
        overrides: of one job.
        settings: what they compose.
    """
    chosen: dict[str, str] = {}
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        key, value = override.key_or_group, override.value()
        if key in GROUPS:
            first = chosen.setdefault(key, show(value))
            if first != show(value):
                yield Problem(key, f"{first} and {show(value)}: one of them at a time; leave one out")
        elif isinstance(value, int | float) and not isinstance(value, bool) and _is_switch(settings, key):
            yield Problem(key, f"{show(value)} is not accepted: must be true or false")


def of_hydra(hydra: dict[str, Any]) -> Iterator[Problem]:
    """What Hydra takes of its own settings and fails with, without a word of which.

    Args:
        hydra: the node `hydra` as plain dicts and lists.
    """
    for name in ("launcher", "sweeper"):
        if not isinstance(hydra.get(name), dict):
            message = f"{show(hydra.get(name))} is not accepted: choose one with hydra/{name}=NAME"
            yield Problem(f"hydra.{name}", message)
    if not isinstance(hydra.get("verbose"), bool | str | list):
        yield Problem("hydra.verbose", f"{show(hydra.get('verbose'))} is not accepted: must be true, false or a list")
    if hydra["run"]["dir"] == "":
        yield Problem("hydra.run.dir", "nothing is given: give the run's folder")


def of_ranks(hydra: dict[str, Any], task: Any, *, sweeps: bool) -> Iterator[Problem]:
    """Processes that were started together, of which each would name the run's folder by its own clock.

    Args:
        hydra: the node `hydra` as plain dicts and lists.
        task: its `_target_`.
        sweeps: whether there are several jobs.
    """
    kind = "sweep" if sweeps else "run"
    started_outside = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if started_outside and task in SHARED and "${now:" in str(hydra[kind]["dir"]):
        key = f"hydra.{kind}.dir"
        message = "processes that are started from outside, by torchrun or a cluster, need one folder for all"
        yield Problem(key, f"is not set: {message}; add {key}=FOLDER")


def _is_switch(settings: DictConfig, key: str) -> bool:
    """Whether a setting is typed as true or false: OmegaConf would take any number for one of them."""
    group, _, name = key.rpartition(".")
    try:
        parent = OmegaConf.select(settings, group) if group else settings
    except OmegaConfBaseException:
        return False  # check.py says why it cannot be resolved
    return isinstance(parent, DictConfig) and isinstance(parent._get_node(name), BooleanNode)
