"""When an optimizer step is done, and where the wall time goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback


class Steps:
    """Tells batches that end an optimizer step from those that only add gradients."""

    def __init__(self) -> None:
        self._seen = 0

    def start(self, trainer: Trainer) -> None:
        """From here on; call it when training starts, after a checkpoint is restored."""
        self._seen = trainer.global_step

    def advanced(self, trainer: Trainer) -> bool:
        """Whether an optimizer step was made since the last call."""
        before, self._seen = self._seen, trainer.global_step
        return self._seen > before


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every so many steps happens at this one; None: never."""
    return every is not None and step % every == 0


@dataclass
class Span:
    """What happened since the last look at the clock."""

    seconds: float = 0.0  # training, waiting for data included, pauses not
    waiting: float = 0.0  # seconds of them in which the loader was waited for
    images: int = 0

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds if self.seconds else 0.0

    @property
    def data_wait(self) -> float:
        """Share of the time, 0..1."""
        return self.waiting / self.seconds if self.seconds else 0.0


class Clock:
    """Splits wall time into training, waiting for data, and pauses, which do not count."""

    def __init__(self) -> None:
        self._mark = time.perf_counter()
        self._span = Span()

    def batch_arrived(self) -> None:
        """Since the last mark the loader was waited for."""
        self._span.waiting += self._pass()

    def batch_trained(self, images: int) -> None:
        self._pass()
        self._span.images += images

    def pause(self) -> None:
        self._pass()

    def resume(self) -> None:
        self._mark = time.perf_counter()

    def look(self) -> Span:
        """What happened since the last look."""
        span, self._span = self._span, Span()
        return span

    def _pass(self) -> float:
        now = time.perf_counter()
        passed, self._mark = now - self._mark, now
        self._span.seconds += passed
        return passed


class Clocked(Callback):
    """A callback with a clock that stands still during validation and whatever is `paused`."""

    def __init__(self) -> None:
        self.clock = Clock()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.resume()


@contextmanager
def paused(trainer: Trainer) -> Iterator[None]:
    """What is done in here is not training: the clocks of all callbacks stand still."""
    clocks = [callback.clock for callback in trainer.callbacks if isinstance(callback, Clocked)]
    for clock in clocks:
        clock.pause()
    try:
        yield
    finally:
        for clock in clocks:
            clock.resume()
