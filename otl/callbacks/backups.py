"""The folder of a run's checkpoints: their order, which of them are whole, and which may go."""

from __future__ import annotations

import json
import logging
import math
import re
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer

from otl.callbacks.snapshot import bytes_of
from otl.formats.files import NO_ROOM, DiskError, named, require_free, sweep, whole
from otl.formats.objects import parsed

log = logging.getLogger(__name__)

FOLDER = "checkpoints"
INDEX = "index.json"
NAME = re.compile(r"step-\d+\.ckpt")
POLL = 5.0  # seconds between looks for room on a full disk


@dataclass(frozen=True)
class Best:
    """The checkpoint with the lowest validation loss."""

    name: str
    val_loss: float


class Backups:
    """What a run has written into its folder of checkpoints.

    index.json there has the order: clocks jump, and a run that replaces another one counts its steps anew.

    Args:
        folder: made when the run begins.
        keep: newest checkpoints kept, beside the best; older ones that this run wrote are deleted.
        wait: minutes that a full disk is waited for.
    """

    def __init__(self, folder: Path, *, keep: int, wait: float) -> None:
        self.folder, self.keep, self.wait = folder, keep, wait
        self.written: list[str] = []  # names, oldest first
        self.best: Best | None = None

    def begin(self, resumed: Path | None) -> None:
        """Go on from a checkpoint, or anew: what else is in the folder is not of this run.

        Args:
            resumed: from here on; what was written after it is of a way that the run does not go any more. None: anew.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in sweep(self.folder):
            log.info(f"{left} was left half written by a process that was killed: deleted")
        written, best = read_index(self.folder)
        ours = resumed is not None and resumed.absolute().parent == self.folder.absolute() and resumed.name in written
        self.written = written[: written.index(resumed.name) + 1] if resumed is not None and ours else []
        self.best = best if best is not None and best.name in self.written else None
        self._write_index(self.written, self.best)

    def save(
        self, checkpoint: dict[str, Any], name: str, *, val_loss: float | None, give_up: Callable[[], bool]
    ) -> None:
        """Write a checkpoint, and delete what is not kept any more.

        On a full disk the run's older checkpoints are let go, and then room is waited for.

        Args:
            val_loss: of these weights, where the best is kept; None: it is not measured, or is no number.
            give_up: whether there is no time to wait.

        Raises:
            DiskError: it cannot be written.
        """
        until = time.monotonic() + 60 * self.wait
        while True:
            try:
                self._write(checkpoint, name, val_loss)
                break
            except DiskError as error:
                if error.number not in NO_ROOM or not self._makes_room(error, give_up() or time.monotonic() >= until):
                    self.failed = True
                    log.error(f"{name} is not saved; newest checkpoint: {self.written[-1] if self.written else 'none'}")
                    raise
        self._waiting = False
        for old in self._but_best(self.written[: -self.keep]):
            self._delete(old)

    @property
    def lowest(self) -> float:
        """The best's validation loss; infinite where there is none."""
        return math.inf if self.best is None else self.best.val_loss

    failed = False  # whether a checkpoint could not be written
    _waiting = False  # whether it is said that room is waited for

    def _write(self, checkpoint: dict[str, Any], name: str, val_loss: float | None) -> None:
        path, needs = self.folder / name, bytes_of(checkpoint)
        with named(path):
            require_free(path, needs)
        written = [other for other in self.written if other != name] + [name]
        better = Best(name, val_loss) if val_loss is not None and val_loss < self.lowest else None
        if name in self.written or not path.exists():  # else the name is that of another run's, until it is replaced
            # The index comes first: a process may be killed as soon as the file has its name.
            self._write_index(written, self.best, coming=better)
        with whole(path) as aside:
            dump(checkpoint, aside)
        self.written, self.best = written, better or self.best
        self._write_index(self.written, self.best)

    def _makes_room(self, error: DiskError, late: bool) -> bool:
        """Whether it is worth another attempt: an older checkpoint is let go, or else some time has passed."""
        if spare := self._but_best(self.written[:-1]):
            log.warning(f"{self.folder} is full: {spare[0]} is deleted, a newer checkpoint is there")
            self._delete(spare[0])
            return True
        if not late:
            if not self._waiting:
                log.error(f"{self.folder}: {error.reason}; room is waited for, {self.wait:g} minutes at most")
            self._waiting = True
            time.sleep(POLL)
        return not late

    def _but_best(self, names: list[str]) -> list[str]:
        return [name for name in names if self.best is None or name != self.best.name]

    def _delete(self, name: str) -> None:
        with named(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)
        self.written.remove(name)

    def _write_index(self, written: list[str], best: Best | None, *, coming: Best | None = None) -> None:
        index = {"written": written, "best": best and asdict(best), "coming": coming and asdict(coming)}
        with whole(self.folder / INDEX) as aside:
            aside.write_text(json.dumps(index, indent=1), encoding="utf-8")


def read_index(folder: Path) -> tuple[list[str], Best | None]:
    """The names of the checkpoints that are there, oldest first, and the best. Without an index, in order of steps.

    An index that came with a stranger's folder may name anything: what is no checkpoint's name is left alone.
    """
    try:
        index = parsed((folder / INDEX).read_bytes(), INDEX)
        written = [name for name in index["written"] if NAME.fullmatch(name) and (folder / name).is_file()]
        better = [
            Best(each["name"], float(each["val_loss"]))
            for each in (index.get("coming"), index["best"])
            if each and each["name"] in written
        ]
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # there is none, or it makes no sense
        return sorted(path.name for path in folder.glob("step-*.ckpt")), None
    return written, better[0] if better else None


def newest(folder: Path) -> Path | None:
    """The checkpoint in `folder` that was written last and is a whole file; None where there is none."""
    for name in reversed(read_index(folder)[0]):
        if is_whole(folder / name):
            return folder / name
        log.warning(f"{folder / name} is damaged and passed over for the one before it")
    return None


def goes_on(trainer: Trainer, run_dir: Path) -> bool:
    """Whether the run has been resumed from a checkpoint in its own folder, and not from another run's."""
    return trainer.ckpt_path is not None and Path(trainer.ckpt_path).absolute().parent.parent == run_dir.absolute()


def is_whole(path: Path) -> bool:
    """Whether every byte of a torch file is as it was written, by its own checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError, EOFError):
        return False


class Disk:
    """A file to write to that remembers what the system said: torch's own errors do not tell."""

    def __init__(self, file: Any) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: Any) -> int:
        try:
            return self.file.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self.file.flush()


def dump(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint as a torch file.

    Raises:
        OSError: what the system said.
    """
    with path.open("wb") as file:
        disk = Disk(file)
        try:
            torch.save(checkpoint, disk)
        except RuntimeError:
            if disk.error is not None:
                raise disk.error from None
            raise
