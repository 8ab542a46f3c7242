"""Signals that ask a run to stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from otl.config import RunEnded

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # the last is what clusters send ahead of a time limit


class Stopped(RunEnded):
    """The run was asked to stop, and did so after a checkpoint.

    Args:
        signal_number: what asked for it; a program stopped by it exits with 128 + this number.
        path: the checkpoint from which `resume=auto` goes on; None: no step was being made.
    """

    def __init__(self, signal_number: int, path: Path | None) -> None:
        name = signal.Signals(signal_number).name
        if path is None:
            super().__init__(f"stopped by {name} outside of the steps; the same line begins again with resume=auto")
        else:
            super().__init__(f"stopped by {name}; go on with resume=auto (from {path})")
        self.signal_number, self.path = signal_number, path
        self.exit_code = 128 + signal_number
        self.on_all_ranks = path is not None  # else the others may not know, and would wait for this one


@contextmanager
def at_once() -> Iterator[None]:
    """In here a signal ends the run at once: for what comes before the first step and after the last.

    Raises:
        Stopped: out of whatever is being done.
    """
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() == process:  # not in the loader's workers, which inherit it
            raise Stopped(number, None)

    before = catch(end)
    try:
        yield
    finally:
        restore(before)


class Stops:
    """While steps are made, notes that a signal asks for a stop, which is then made between two of them.

    Another Ctrl-C acts at once; another SIGTERM or SIGUSR1 does not: clusters send several.
    """

    def __init__(self) -> None:
        self.asked: int | None = None  # the signal
        self._before: dict[int, Any] = {}  # signal -> handler
        self._process = 0  # that trains; the loader's workers inherit its handlers

    def begin(self) -> None:
        self.asked, self._process = None, os.getpid()
        self._before = catch(self._ask)

    def end(self) -> None:
        restore(self._before)
        self._before = {}

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # Ctrl-C reaches the workers too, and the step may still need their batches
        if self.asked is not None and number == signal.SIGINT:
            self.end()
            raise KeyboardInterrupt
        self.asked = self.asked or number
        # Not the log: a handler may interrupt it in the middle of a line.
        os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C once more to stop at once\n")


def catch(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Signal -> the handler it had before. Only the main thread can: elsewhere none is caught."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    return {number: signal.signal(number, handler) for number in SIGNALS}


def restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
