"""Several processes that train one run: how many they are, and how Lightning starts the others."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, read_write

from otl.tasks.precision import device_kind

SET_BY_LIGHTNING = ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE")
OWN_TO_A_JOB = ("hydra.mode", "hydra.run.dir", "hydra.sweep", "hydra.sweeper", "hydra.launcher")
FLAGS = ("config_path", "config_name", "config_dir")


def count(trainer: DictConfig) -> int:
    """Processes that train together, by the settings of the Trainer; each has a device of its own."""
    return devices(trainer) * int(trainer.get("num_nodes") or 1)


def devices(trainer: DictConfig) -> int:
    asked = trainer.devices
    if isinstance(asked, ListConfig):
        return len(asked)
    if isinstance(asked, str) and "," in asked:
        return len([number for number in asked.split(",") if number.strip()])
    if asked in {"auto", -1, "-1"}:
        return torch.cuda.device_count() if device_kind(trainer.accelerator) == "cuda" else 1
    return int(asked)


@contextmanager
def started(folder: Path) -> Iterator[None]:
    """What Lightning starts in here is a further rank of this very job, in its folder.

    Lightning repeats the command line, and so a whole sweep where the job belongs to one; and it leaves marks by which
    the next job of a sweep would take itself for a process that was started from outside.
    """
    line, before = sys.argv, {name: os.environ.get(name) for name in SET_BY_LIGHTNING}
    if HydraConfig.initialized():
        sys.argv = [line[0], *job_line(line[1:])]
        run: Any = HydraConfig.get().run
        with read_write(run):
            run.dir = str(folder.absolute())
    try:
        yield
    finally:
        sys.argv = line
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def job_line(line: list[str]) -> list[str]:
    """The command line of the one job that is running, as typed or as the sweep made it."""
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return line
    typed = get_args_parser().parse_known_args(line)[0]
    flags = [f"--{name.replace('_', '-')}={getattr(typed, name)}" for name in FLAGS if getattr(typed, name)]
    shared = [text for text in hydra.overrides.hydra if not text.lstrip("+").startswith(OWN_TO_A_JOB)]
    return [*flags, *shared, *hydra.overrides.task]
