"""What a run needs on the disk for checkpoints and results: counted from its plan, before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from otl.callbacks.backups import FOLDER
from otl.callbacks.export import megabytes
from otl.formats.files import size
from otl.formats.folder import DTYPES
from otl.modules.base import DiffusionModule
from otl.tasks.folder import exported
from otl.types import Problem


def estimate(made: dict[str, Any], module: DiffusionModule, settings: DictConfig) -> dict[str, Any]:
    """Bytes of a checkpoint and of a result, and how many of each there are at once.

    Args:
        made: the plan: weights, memory and total_steps are read.
    """
    trained = sum(row["trained"] for row in made["weights"])
    checkpoints, exports = settings.callbacks.get("checkpoint"), settings.callbacks.get("export")
    averaged = (settings.callbacks.get("ema") or {}).get("decay") is not None
    assert module.method is not None
    written = sum(row["parameters"] for row in made["weights"]) if module.method.whole_parts else trained
    found = {
        "checkpoint": 4 * trained * (1 + averaged) + made["memory"]["optimizer"],
        "checkpoints": checkpoints.keep + checkpoints.best + 1 if checkpoints else 0,  # one is being written
        "result": written * DTYPES[settings.output.dtype].itemsize,
        "results": 1 + made["total_steps"] // exports.every if exports and exports.every else 1,
    }
    total = found["checkpoint"] * found["checkpoints"] + found["result"] * found["results"]
    return found | {"total": total, "estimate": True}


def problems(needs: dict[str, Any], settings: DictConfig, folder: Path) -> list[Problem]:
    """That there is no room; what the run has there already counts as room.

    Args:
        needs: what `estimate` gave.
        folder: of the run.
    """
    there = [*exported(settings, folder), *(folder / FOLDER).glob("*.ckpt")]
    free = shutil.disk_usage(folder).free + sum(map(megabytes, there)) * 1e6
    if needs["total"] <= free:
        return []
    message = (
        f"{folder} has {size(free)} free, and the run needs about {size(needs['total'])} there, for "
        f"{needs['checkpoints']} checkpoints of {size(needs['checkpoint'])} and {needs['results']} results of "
        f"{size(needs['result'])}: make room, choose another folder, or lower callbacks.checkpoint.keep"
    )
    return [Problem("hydra.run.dir", message)]
