"""The run as a table: metrics.csv."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger
from torch import Tensor

from otl.callbacks.table import Table, Values, rows_until
from otl.callbacks.timing import Clocked, Steps, due
from otl.config import SettingsError
from otl.formats.files import FAILING, DiskError, named

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

NAME = "metrics.csv"
SECONDS = 2.0  # between two writings of rows: each waits for the device and for the disk
BEFORE, AFTER = ["step", "epoch", "loss"], ["images_per_second", "steps_per_second", "data_wait", "val_loss", "seconds"]


NOT_LOGGED = {"step", "epoch", "seconds", "val_loss"}


@dataclass
class Row:
    """One optimizer step; its losses stay on the device until rows are written."""

    values: dict[str, str]
    totals: list[Tensor]  # [2] of each of its batches: sum of the losses, number of images


class Metrics(Clocked):
    """Writes `<run>/metrics.csv`; a resumed run goes on in the same table as if it had not stopped.

    Columns: step, epoch, loss (mean over the images of the optimizer step), lr_<group> for each parameter group,
    images_per_second, steps_per_second, data_wait (share of the time, 0..1; all three since the last row, without
    sampling, saving and validation), val_loss (where it was measured), seconds (of wall time since the first step).

    Args:
        every: optimizer steps between rows.
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = every
        self._steps = Steps()
        self._table: Table | None = None
        self._rows: list[Row] = []  # not yet written
        self._held: list[Values] = []  # by the checkpoint, because the disk took them not
        self._resumed: Values | None = None  # of the step that the run goes on from: its validation may be to come
        self._last: Row | None = None  # of the last optimizer step, whether it becomes a row or not
        self._last_at: int | None = None  # where the last step's row begins in the file, once written
        self._totals: list[Tensor] = []  # of the batches since the last optimizer step
        self._rates: dict[str, float] = {}  # of the step being made, before the schedule moves on
        self._row_step = 0
        self._earlier = 0.0  # seconds of the run before it was resumed
        self._start: float | None = None  # of the first step; None: it is to come
        self._flushed = 0.0
        self._loggers: list[Logger] = []
        self._log_every = 1
        self._log_next = 0  # the step from which on a logger gets a whole row again

    def setup(self, trainer: Trainer, pl_module: DiffusionModule, stage: str) -> None:
        """Raises SettingsError: `every` is below 1."""
        if self.every < 1:
            raise SettingsError(f"callbacks.metrics.every={self.every}: give at least 1")

    def on_train_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._steps.start(trainer)
        self._row_step = trainer.global_step
        self._last = self._last_at = None
        groups = dict.fromkeys(f"lr_{name}" for name in group_names(trainer.optimizers[0]))
        self._earlier, self._start = 0.0, None
        if trainer.is_global_zero:
            path = pl_module.run_dir / NAME
            rows = rows_until(path, trainer.global_step) if trainer.global_step else []
            there = {row["step"] for row in rows}
            rows += [row for row in self._held if row["step"] not in there]
            self._earlier = float(rows[-1]["seconds"]) if rows else 0.0
            self._table = Table(path, [*BEFORE, *groups, *AFTER], rows)
            if self._resumed is not None:
                there = bool(rows) and rows[-1]["step"] == self._resumed["step"]
                self._last = Row(rows[-1] if there else self._resumed, [])
                self._last_at = self._table.last_at if there else None
        self._loggers, self._log_every, self._log_next = trainer.loggers, trainer.log_every_n_steps, 0
        self._flushed = time.perf_counter()
        self.clock.look()
        self.clock.resume()

    def on_train_batch_start(self, trainer: Trainer, pl_module: DiffusionModule, batch: Any, batch_idx: int) -> None:
        self.clock.batch_arrived()
        if self._start is None:
            self._start = time.perf_counter() - self._earlier

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: DiffusionModule, optimizer: torch.optim.Optimizer
    ) -> None:
        names = group_names(optimizer)
        self._rates = {
            f"lr_{name}": float(group["lr"]) * float(group.get("d", 1))
            for name, group in zip(names, optimizer.param_groups)
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        self._totals.append(outputs["total"])
        self.clock.batch_trained(outputs["images"] * trainer.world_size)
        if not self._steps.advanced(trainer) or self._table is None:
            return
        step = trainer.global_step
        self._last = Row({"step": str(step), "epoch": str(trainer.current_epoch)}, self._totals)
        self._last.values |= {name: f"{rate:.9g}" for name, rate in self._rates.items()}
        self._last.values["seconds"] = f"{time.perf_counter() - self._start:.2f}"
        self._last_at = None
        self._totals = []
        if due(step, self.every) or step == pl_module.total_steps:
            self._add_row(step)
        if time.perf_counter() - self._flushed > SECONDS:
            self._flush()

    def on_validation_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """The validation loss belongs to the step before it, which may be in the file already."""
        super().on_validation_end(trainer, pl_module)
        if trainer.sanity_checking or self._last is None or "val_loss" not in trainer.callback_metrics:
            return
        self._last.values["val_loss"] = f"{float(trainer.callback_metrics['val_loss']):.9g}"
        if self._last_at is not None:
            self._table.cut(self._last_at)
            self._rows.append(self._last)
        elif not self._rows or self._rows[-1] is not self._last:
            self._add_row(trainer.global_step)
        self._flush()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: DiffusionModule, checkpoint: dict[str, Any]) -> None:
        """A run that goes on from this checkpoint finds every row up to it: in the file, or else in the checkpoint."""
        try:
            self._flush()
        except DiskError as error:
            log.error(f"{error}{'. Meanwhile checkpoints hold its rows' * bool(self._rows)}")
        finish([self._last] if self._last is not None else [])
        checkpoint["metrics"] = [row.values for row in self._rows]
        checkpoint["last_row"] = self._last and self._last.values

    def on_load_checkpoint(self, trainer: Trainer, pl_module: DiffusionModule, checkpoint: dict[str, Any]) -> None:
        self._held, self._resumed = checkpoint.get("metrics", []), checkpoint.get("last_row")

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: DiffusionModule, exception: BaseException) -> None:
        try:
            self._close()
        except DiskError as error:
            log.error(str(error))

    def _add_row(self, step: int) -> None:
        span = self.clock.look()
        rate = (step - self._row_step) / span.seconds if span.seconds else 0.0
        self._row_step = step
        self._last.values |= {
            "images_per_second": f"{span.images_per_second:.4g}",
            "steps_per_second": f"{rate:.4g}",
            "data_wait": f"{span.data_wait:.3f}",
        }
        self._rows.append(self._last)

    def _flush(self) -> None:
        """Raises DiskError: the rows could not be written, and are kept; or a logger could not."""
        self._flushed = time.perf_counter()
        if not self._rows:
            return
        finish(self._rows)
        if self._table is None:
            return
        offsets = self._table.append([row.values for row in self._rows])
        self._last_at = offsets[-1] if self._rows[-1] is self._last else None
        written, self._rows = self._rows, []
        for row in written:
            self._log(row.values)

    def _log(self, values: dict[str, str]) -> None:
        """The losses to TensorBoard, or whichever logger there is, and now and then whole rows: it is slow.

        Lightning logs the validation loss itself.

        Raises:
            DiskError: a logger could not write; the rows are in the table.
        """
        step = int(values["step"])
        numbers = {name: float(value) for name, value in values.items() if name not in NOT_LOGGED and value}
        numbers = {name: number for name, number in numbers.items() if math.isfinite(number)}  # not of a skipped step
        if step < self._log_next:
            numbers = {name: number for name, number in numbers.items() if name == "loss"}
        else:
            self._log_next = step + self._log_every
        for logger in self._loggers:
            with named(Path(logger.log_dir or logger.save_dir or NAME), FAILING):
                logger.log_metrics(numbers, step=step)

    def _close(self) -> None:
        if self._table is not None:
            table = self._table
            try:
                self._flush()
            finally:
                self._table = None
                table.close()


def finish(rows: list[Row]) -> None:
    """Their losses, by one transfer for all: each would wait for the device."""
    totals = iter(torch.stack([total for row in rows for total in row.totals] or [torch.zeros(2)]).tolist())
    for row in rows:
        if row.totals:
            losses, images = map(sum, zip(*[next(totals) for _ in row.totals]))
            row.values["loss"], row.totals = f"{losses / images:.9g}", []


def group_names(optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the parameter groups; their numbers where they have none."""
    return [str(group.get("name", k)) for k, group in enumerate(optimizer.param_groups)]
