"""Checkpoints from which a run goes on exactly where it stopped."""

from __future__ import annotations

import logging
import os
import signal
import threading
import zipfile
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from otl.callbacks import randomness
from otl.callbacks.guard import require_finite
from otl.callbacks.timing import Steps, due, paused
from otl.config import RunEnded, SettingsError
from otl.formats.files import whole

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(RunEnded):
    """The run was asked to stop, and did so after a checkpoint.

    Args:
        signal_number: what asked for it; a program stopped by it exits with 128 + this number.
        path: the checkpoint from which `resume=auto` goes on.
    """

    def __init__(self, signal_number: int, path: Path) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}; go on with resume=auto (from {path})")
        self.signal_number, self.path = signal_number, path
        self.exit_code = 128 + signal_number


class Checkpoint(Callback):
    """Saves every so many optimizer steps, at the end, and when the run is asked to stop.

    SIGTERM and the first Ctrl-C wait for the end of the optimizer step, save, and raise `Stopped`; the second acts at
    once. Between optimizer steps there are gradients that no checkpoint holds.

    Args:
        every: optimizer steps; None: at the end only.
        keep: newest checkpoints kept; older ones that this run wrote are deleted.
    """

    def __init__(self, every: int | None = 500, keep: int = 2) -> None:
        self.every, self.keep = every, keep
        self._steps = Steps()
        self._folder = Path()
        self._written: list[str] = []  # names in the folder, oldest first
        self._saved_step: int | None = None
        self._randomness: dict[str, Any] | None = None
        self._asked: int | None = None  # the signal that asks for a stop
        self._handlers: dict[int, Any] = {}
        self._process = 0  # that trains; the loader's workers inherit its handlers

    def setup(self, trainer: Trainer, pl_module: DiffusionModule, stage: str) -> None:
        """Raises SettingsError: a number below 1."""
        for name, count in (("every", self.every), ("keep", self.keep)):
            if count is not None and count < 1:
                raise SettingsError(f"callbacks.checkpoint.{name}={count}: give at least 1")
        self._folder = pl_module.run_dir / FOLDER
        # Last, so that what the other callbacks do at a step is done when its checkpoint appears.
        trainer.callbacks = [callback for callback in trainer.callbacks if callback is not self] + [self]

    def on_train_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._steps.start(trainer)
        self._asked, self._saved_step = None, None
        self._catch_signals()
        if self._randomness is not None:
            randomness.restore(self._randomness)
            self._randomness = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: DiffusionModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raises Stopped: a signal has asked for it."""
        if not self._steps.advanced(trainer):
            return
        stop = trainer.strategy.reduce_boolean_decision(self._asked is not None, all=False)
        # The last step's is saved here, not at the end of training: from there Lightning would go on with a new epoch.
        if stop or due(trainer.global_step, self.every) or trainer.global_step == pl_module.total_steps:
            path = self._save(trainer, pl_module)
            if stop and trainer.global_step < pl_module.total_steps:
                raise Stopped(self._asked or signal.SIGTERM, path)

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._release_signals()
        if self._saved_step != trainer.global_step:
            self._save(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: DiffusionModule, exception: BaseException) -> None:
        self._release_signals()

    def _save(self, trainer: Trainer, module: DiffusionModule) -> Path:
        path = self._folder / f"step-{trainer.global_step:08d}.ckpt"
        require_finite(module, trainer.global_step)
        # Before saving: the checkpoint itself holds the list.
        self._written = [name for name in self._written if name != path.name] + [path.name]
        with paused(trainer):
            self._folder.mkdir(parents=True, exist_ok=True)
            if trainer.is_global_zero:
                with whole(path) as aside:
                    trainer.save_checkpoint(aside, weights_only=False)
                while len(self._written) > self.keep:
                    (self._folder / self._written.pop(0)).unlink(missing_ok=True)
            else:
                trainer.save_checkpoint(path, weights_only=False)  # takes part; only the first process writes
        self._saved_step = trainer.global_step
        log.debug(f"saved {path}")
        return path

    def on_save_checkpoint(self, trainer: Trainer, pl_module: DiffusionModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["randomness"] = randomness.states()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: DiffusionModule, checkpoint: dict[str, Any]) -> None:
        self._randomness = checkpoint["randomness"]

    def state_dict(self) -> dict[str, Any]:
        return {"folder": str(self._folder.resolve()), "written": list(self._written)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A run that goes on from another folder's checkpoint has written nothing here."""
        if state_dict["folder"] == str(self._folder.resolve()):
            self._written = list(state_dict["written"])

    def _catch_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._process = os.getpid()
            self._handlers = {number: signal.signal(number, self._ask) for number in SIGNALS}

    def _release_signals(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # Ctrl-C reaches the workers too, and the step may still need their batches
        self._asked = number
        self._release_signals()
        # Not the log: a handler may interrupt it in the middle of a line.
        os.write(2, b"\nstopping after this step, with a checkpoint; once more to stop at once\n")


def newest(folder: Path) -> Path | None:
    """The checkpoint in `folder` that was written last and is a whole file; None where there is none.

    By the time it was written: a run that replaced an earlier one may not have come as far as that one yet.
    """
    paths = folder.glob("step-*.ckpt")
    for path in sorted(paths, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True):
        if is_whole(path):
            return path
        log.warning(f"{path} is damaged and passed over")
    return None


def is_whole(path: Path) -> bool:
    """Whether every byte of a torch file is as it was written, by its own checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False
