"""Writes the file that the run is for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from otl.callbacks import randomness
from otl.callbacks.timing import Steps, due, paused

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)


class Export(Callback):
    """Exports at the end of training, of the average where one is kept.

    Args:
        every: optimizer steps between exports on the way, named `final-step-000500`; None: at the end only.
    """

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self._steps = Steps()

    def on_train_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._steps.start(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._steps.advanced(trainer) and due(step, self.every) and step < pl_module.total_steps:
            self._export(trainer, pl_module, f"{pl_module.output_options.name}-step-{step:06d}")

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._export(trainer, pl_module, pl_module.output_options.name)

    def complete(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Where the run was killed after its last step, and before the export."""
        if not results(module.run_dir / module.output_options.name):
            self.on_train_end(trainer, module)

    def _export(self, trainer: Trainer, module: DiffusionModule, name: str) -> None:
        if not trainer.is_global_zero:
            return
        with paused(trainer), randomness.kept(), module.averaged():
            path = module.export(module.run_dir / name)
        log.info(f"exported {path} ({megabytes(path):.1f} MB{', average' if module.average is not None else ''})")


def results(path: Path) -> list[Path]:
    """What is there of the result `path`, without suffix: a file or a folder, as the method writes it."""
    return [each for each in (path.with_name(f"{path.name}.safetensors"), path) if each.exists()]


def megabytes(path: Path) -> float:
    """Of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file()) / 1e6
