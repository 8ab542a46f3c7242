"""Writes the file that the run is for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from otl.callbacks import randomness
from otl.callbacks.backups import goes_on
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
        """What the disk did not take on the way is written when the run goes on."""
        self._steps.start(trainer)
        if self._is_due(trainer, pl_module) and goes_on(trainer, pl_module.run_dir):
            path = pl_module.run_dir / self._name(trainer, pl_module)
            if not results(path):
                self._export(trainer, pl_module, path.name)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        if self._steps.advanced(trainer) and self._is_due(trainer, pl_module):
            self._export(trainer, pl_module, self._name(trainer, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._export(trainer, pl_module, pl_module.output_options.name)

    def complete(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Where the run was killed after its last step, and before the export."""
        if not results(module.run_dir / module.output_options.name):
            self.on_train_end(trainer, module)

    def _is_due(self, trainer: Trainer, module: DiffusionModule) -> bool:
        return due(trainer.global_step, self.every) and 0 < trainer.global_step < module.total_steps

    def _name(self, trainer: Trainer, module: DiffusionModule) -> str:
        return f"{module.output_options.name}-step-{trainer.global_step:06d}"

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
