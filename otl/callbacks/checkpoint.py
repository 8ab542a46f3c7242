"""Checkpoints from which a run goes on exactly where it stopped."""

from __future__ import annotations

import logging
import math
import signal
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from otl.callbacks import randomness
from otl.callbacks.backups import FOLDER, Backups
from otl.callbacks.guard import require_finite
from otl.callbacks.position import position, settle, share_anew
from otl.callbacks.snapshot import bytes_of, fits, snapshot
from otl.callbacks.stops import Stopped, Stops
from otl.callbacks.timing import Steps, due, paused
from otl.callbacks.writer import Writer
from otl.config import RunEnded, SettingsError

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)


class Checkpoint(Callback):
    """Saves at every so many steps, minutes or epochs, at the end, when the run is asked to stop, and when it fails
    between two steps.

    A checkpoint is made between optimizer steps, when no gradient waits, and after the validation that follows the
    step. SIGTERM, SIGUSR1 and the first Ctrl-C wait for that, save, and raise `Stopped`; the second acts at once.

    Args:
        every: optimizer steps; None: not by steps.
        every_minutes: minutes since the last one; None: not by time.
        every_epochs: epochs; None: not by epochs.
        keep: newest checkpoints kept; older ones that this run wrote are deleted.
        best: whether the one with the lowest validation loss is kept too, and made after each lower one.
        asynchronous: whether training goes on while one is written, from a copy in the CPU's memory.
        wait: minutes that a full disk is waited for, before the run ends.
        requeue: signals upon which a SLURM job is put back into the queue as well, by tasks/slurm.py.
    """

    def __init__(
        self,
        every: int | None = 500,
        every_minutes: float | None = None,
        every_epochs: int | None = None,
        keep: int = 2,
        best: bool = False,
        asynchronous: bool = True,
        wait: float = 60.0,
        requeue: list[Literal["SIGUSR1", "SIGTERM"]] | None = None,
    ) -> None:
        self.every, self.every_minutes, self.every_epochs = every, every_minutes, every_epochs
        self.keep, self.best, self.asynchronous, self.wait = keep, best, asynchronous, wait
        self.requeue = requeue or []
        self._steps, self._stops, self._writer = Steps(), Stops(), Writer()
        self._backups = Backups(Path(), keep=keep, wait=wait)
        self._begun_step = self._begun_at = 0  # optimizer steps, and batches, when the batch began
        self._saved_step: int | None = None
        self._saved_at = 0.0  # seconds
        self._ends = False  # whether Lightning is to end the run, such as by trainer.max_time
        self._due = False  # whether a checkpoint is to be made after this step
        self._unvalidated = False  # whether the validation that follows a step has not come to its end
        self._val_loss: float | None = None  # of the weights as they are
        self._lowest = math.inf  # validation loss so far
        self._randomness: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: DiffusionModule, stage: str) -> None:
        """Raises SettingsError: a number below 1, or `best` without held-out images."""
        for name in ("every", "every_epochs", "keep"):
            if (count := getattr(self, name)) is not None and count < 1:
                raise SettingsError(f"callbacks.checkpoint.{name}={count}: give at least 1")
        if self.best and not trainer.enable_validation:
            raise SettingsError(
                "callbacks.checkpoint.best=true has no effect: there are no held-out images; give some by "
                "data.validation_share or a concept of type=validation"
            )
        self._backups = Backups(pl_module.run_dir / FOLDER, keep=self.keep, wait=self.wait)
        trainer.strategy.checkpoint_io = Hand(self._write)
        # Last, so that what the other callbacks do at a step is done when its checkpoint appears.
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]

    def on_train_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._steps.start(trainer)
        self._saved_step, self._begun_step, self._saved_at = None, trainer.global_step, time.monotonic()
        self._val_loss = None
        if trainer.is_global_zero:
            self._backups.begin(Path(trainer.ckpt_path) if trainer.ckpt_path else None)
            self._lowest = self._backups.lowest
        self._stops.begin()
        if self._randomness is not None:
            randomness.restore(self._randomness)
            self._randomness = None
        if self._unvalidated:
            self._begun_step, self._begun_at = trainer.global_step - 1, position(trainer)
            validate(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: DiffusionModule, batch: Any, batch_idx: int) -> None:
        self._begun_step, self._begun_at = trainer.global_step, position(trainer)
        self._val_loss, self._unvalidated = None, False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raises Stopped: a signal has asked for it."""
        if not self._steps.advanced(trainer):  # an end that is asked for waits until no gradient does
            self._ends, trainer.should_stop = self._ends or trainer.should_stop, False
            return
        trainer.should_stop = trainer.should_stop or self._ends
        self._writer.check()
        self._due, self._unvalidated = self._is_due(trainer, pl_module), validates_now(trainer)
        if not self._unvalidated:
            self._settle(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """Raises Stopped: a signal has asked for it."""
        if self._between_steps(trainer) and not trainer.sanity_checking:
            self._val_loss, self._unvalidated = float(trainer.callback_metrics["val_loss"]), False
            self._settle(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._stops.end()
        if self._saved_step != trainer.global_step:
            self._save(trainer, pl_module)
        self._writer.finish()

    def on_exception(self, trainer: Trainer, pl_module: DiffusionModule, exception: BaseException) -> None:
        """What was done up to the last step is saved, where that can be: a process alone cannot do it for all ranks.

        Nor is the run's last step saved without the validation after it, which nobody would make up for.
        """
        self._stops.end()
        if not isinstance(exception, Exception):
            return
        together = trainer.world_size == 1 or (isinstance(exception, RunEnded) and exception.on_all_ranks)
        whole = not self._unvalidated or trainer.global_step < pl_module.total_steps
        try:
            if together and whole and self._between_steps(trainer) and self._saved_step != trainer.global_step:
                log.info(f"saved {self._save(trainer, pl_module)}; go on with resume=auto")
            self._writer.finish()
        except Exception as error:
            log.error(f"and what was done since the last checkpoint could not be saved: {error}")

    def _between_steps(self, trainer: Trainer) -> bool:
        """Whether this batch's optimizer step is done: no gradient waits, and no other batch is taken yet."""
        return trainer.global_step > self._begun_step and position(trainer) == self._begun_at

    def _is_due(self, trainer: Trainer, module: DiffusionModule) -> bool:
        step = trainer.global_step
        by_epoch = self.every_epochs and module.steps_per_epoch * self.every_epochs
        # The last step's is saved here, not at the end of training: from there Lightning would go on with a new epoch.
        return due(step, self.every) or due(step, by_epoch) or self._is_time(trainer) or step == module.total_steps

    def _is_time(self, trainer: Trainer) -> bool:
        """By a clock that does not jump; all ranks go by any one's."""
        if self.every_minutes is None:
            return False
        late = time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return trainer.strategy.reduce_boolean_decision(late, all=False)

    def _settle(self, trainer: Trainer, module: DiffusionModule) -> None:
        """Save if it is time to, and stop if that is asked for."""
        stop = self._is_asked(trainer)
        better = self.best and self._val_loss is not None and self._is_lowest(trainer, self._val_loss)
        if stop or better or self._due:
            path = self._save(trainer, module)
            stop = stop or self._is_asked(trainer)  # meanwhile: the checkpoint is there already
            if stop and trainer.global_step < module.total_steps:
                self._writer.finish()
                number = self._stops.asked or signal.SIGTERM  # another rank's
                raise Stopped(number, path)

    def _is_asked(self, trainer: Trainer) -> bool:
        """Whether a signal has asked any rank for a stop."""
        return trainer.strategy.reduce_boolean_decision(self._stops.asked is not None, all=False)

    def _is_lowest(self, trainer: Trainer, val_loss: float) -> bool:
        """Whether a validation loss is lower than all before, by what the first rank knows; NaN never is."""
        lower = trainer.is_global_zero and val_loss < self._lowest
        self._lowest = min(self._lowest, val_loss) if lower else self._lowest
        return trainer.strategy.reduce_boolean_decision(lower, all=False)

    def _save(self, trainer: Trainer, module: DiffusionModule) -> Path:
        path = self._backups.folder / f"step-{trainer.global_step:08d}.ckpt"
        require_finite(module, trainer.global_step)
        with paused(trainer):
            trainer.save_checkpoint(path, weights_only=False)  # all take part; the first process writes, by `_write`
        self._saved_step, self._saved_at = trainer.global_step, time.monotonic()
        return path

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        """Now, or beside the training."""
        self._writer.finish()
        val_loss = self._val_loss if self.best else None
        beside = self.asynchronous and fits(bytes_of(checkpoint))
        held = snapshot(checkpoint) if beside else checkpoint

        def hurry() -> bool:
            return self._backups.failed or self._stops.asked is not None

        save = partial(self._backups.save, held, path.name, val_loss=val_loss, give_up=hurry)
        self._writer.start(save) if beside else save()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: DiffusionModule, checkpoint: dict[str, Any]) -> None:
        loop = checkpoint["loops"]["fit_loop"]
        settle(loop, batches=trainer.num_training_batches, steps=trainer.global_step)
        checkpoint |= {
            "epoch": loop["epoch_progress"]["current"]["processed"],
            "randomness": randomness.of_all_ranks(),
            "unvalidated": self._unvalidated,
            "world_size": trainer.world_size,
        }

    def on_load_checkpoint(self, trainer: Trainer, pl_module: DiffusionModule, checkpoint: dict[str, Any]) -> None:
        ranks = checkpoint["randomness"]
        self._randomness = ranks[trainer.global_rank % len(ranks)]
        self._unvalidated = checkpoint["unvalidated"]
        then, now = checkpoint["world_size"], trainer.world_size
        if then != now:
            batches = [trainer.datamodule.batches_per_epoch(ranks) for ranks in (then, now)]
            share_anew(checkpoint["loops"]["fit_loop"], ranks=(then, now), batches=batches)


class Hand(TorchCheckpointIO):
    """Lightning's way to a file: what it gathers for a checkpoint is handed on."""

    def __init__(self, write: Any) -> None:
        self.write = write

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        self.write(checkpoint, Path(path))


def validates_now(trainer: Trainer) -> bool:
    """Whether Lightning validates after this step, by its own decision: a checkpoint waits for it."""
    loop = trainer.fit_loop
    return bool(loop.epoch_loop._should_check_val_fx(loop._data_fetcher))


def validate(trainer: Trainer) -> None:
    """What the run was about to do when it ended: Lightning does not make up for it."""
    trainer.validating = True
    trainer.fit_loop.epoch_loop.val_loop.run()
    trainer.training = True
