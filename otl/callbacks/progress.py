"""One bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_only
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from torch import Tensor

from otl.callbacks.timing import Clocked, Steps

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

LINES = 10  # lines of a whole run where there is no terminal
REFRESH = 0.5  # seconds between looks at the loss, each of which waits for the device
PAUSE = 5.0  # seconds between two lines of `track`
HELD = 1000  # losses that wait for a look: each is a tensor on the device
SMOOTHING = 0.05  # weight of the newest loss in the one that is shown

T = TypeVar("T")


class Progress(Clocked):
    """Step, loss (smoothed), steps and images per second, time left, and the share of time spent waiting for data."""

    def __init__(self) -> None:
        super().__init__()
        self._steps = Steps()
        self._bar: Bar | None = None
        self._totals: list[Tensor] = []  # of the batches since the last look, on the device
        self._loss = math.nan  # smoothed
        self._from_step = 0  # where this process began
        self._seconds = self._waiting = 0.0  # of training in this process
        self._images = 0
        self._shown = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._steps.start(trainer)
        self._from_step = trainer.global_step
        self._seconds = self._waiting = self._shown = 0.0
        self._images, self._totals, self._loss = 0, [], math.nan
        self.clock.look()
        self.clock.resume()
        console = Console()
        if console.is_terminal and trainer.is_global_zero:
            self._bar = start_bar(console)
            self._bar.add_task("", total=pl_module.total_steps, completed=self._from_step, status="")

    def on_train_batch_start(self, trainer: Trainer, pl_module: DiffusionModule, batch: Any, batch_idx: int) -> None:
        self.clock.batch_arrived()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        self.clock.batch_trained(outputs["images"] * trainer.world_size)
        if trainer.is_global_zero:  # the others show nothing
            self._totals.append(outputs["total"])
            if len(self._totals) == HELD:
                self._fold()
        if not self._steps.advanced(trainer) or not trainer.is_global_zero:
            return
        step, total = trainer.global_step, pl_module.total_steps
        if self._bar is not None:
            if time.perf_counter() - self._shown > REFRESH or step == total:
                self._shown = time.perf_counter()
                self._bar.update(self._bar.task_ids[0], completed=step, status=self._status(step, total))
        elif step * LINES // total > (step - 1) * LINES // total:
            log.info(f"step {step}/{total}  {self._status(step, total)}")

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: DiffusionModule, exception: BaseException) -> None:
        self._stop()

    def _status(self, step: int, total: int) -> str:
        self._fold()
        span = self.clock.look()
        self._seconds += span.seconds
        self._waiting += span.waiting
        self._images += span.images
        rate = (step - self._from_step) / self._seconds
        return (
            f"loss {self._loss:.4f}  {rate:.3g} it/s  {self._images / self._seconds:.3g} images/s  "
            f"{clock_time((total - step) / rate)} left  data wait {self._waiting / self._seconds:.0%}"
        )

    def _fold(self) -> None:
        """The losses that wait become part of the smoothed one, by one transfer for all."""
        for total, images in torch.stack(self._totals).tolist() if self._totals else []:
            loss = total / images
            if math.isfinite(loss):  # else its step was skipped
                self._loss = loss if math.isnan(self._loss) else self._loss + SMOOTHING * (loss - self._loss)
        self._totals = []

    def _stop(self) -> None:
        if self._bar is not None:
            stop_bar(self._bar)
            self._bar = None


class Ranking(Callback):
    """How far a prediction is, in batches."""

    def on_predict_batch_start(self, trainer: Trainer, pl_module: DiffusionModule, batch: Any, batch_idx: int) -> None:
        """Here, because what is made before the first batch has bars of its own."""
        if batch_idx == 0:
            count = int(trainer.num_predict_batches[0])
            self._shown = track(range(count), "batches ranked", count)
            next(self._shown)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        next(self._shown, None)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """The same items, shown by the first rank as a bar with rate and time left (otl.types.Progress)."""
    if rank_zero_only.rank != 0:
        yield from items
        return
    console = Console()
    if not console.is_terminal:
        yield from _lines(items, description, total)
        return
    with bar(console) as shown:
        task = shown.add_task(description, total=total, status="")
        begun = time.perf_counter()
        for count, item in enumerate(items, start=1):
            yield item
            shown.update(task, completed=count, status=rate(count, total, time.perf_counter() - begun))


def _lines(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    begun = said = time.perf_counter()
    for count, item in enumerate(items, start=1):
        yield item
        now = time.perf_counter()
        if count == total or (now - said > PAUSE and count * LINES // total > (count - 1) * LINES // total):
            said = now
            log.info(f"{description} {count}/{total}  {rate(count, total, now - begun)}")


def rate(count: int, total: int, seconds: float) -> str:
    per_second = count / max(seconds, 1e-9)
    return f"{per_second:.1f}/s  {clock_time((total - count) / per_second)} left"


def clock_time(seconds: float) -> str:
    """3725.2 -> "1:02:05"; 65 -> "1:05"."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


@contextmanager
def bar(console: Console) -> Iterator[Bar]:
    started = start_bar(console)
    try:
        yield started
    finally:
        stop_bar(started)


def start_bar(console: Console) -> Bar:
    """A running bar; log lines appear above it."""
    started = Bar(
        TextColumn("{task.description}", table_column=Column(no_wrap=True)),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TextColumn("{task.fields[status]}", table_column=Column(no_wrap=True)),
        BarColumn(bar_width=20),  # the one that gives way where the terminal is narrow
        console=console,
        refresh_per_second=4,
    )
    plain = (sys.stdout, sys.stderr)
    started.start()
    _move_logs(plain, (sys.stdout, sys.stderr))
    return started


def stop_bar(started: Bar) -> None:
    shown = (sys.stdout, sys.stderr)
    started.stop()
    _move_logs(shown, (sys.stdout, sys.stderr))


def _move_logs(before: tuple[Any, Any], after: tuple[Any, Any]) -> None:
    """Log handlers hold the stream they began with; a bar needs them to write where it can make room."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.StreamHandler) and handler.stream in before:
            handler.setStream(after[before.index(handler.stream)])
