"""Signals that ask a run to stop."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from otl.config import RunEnded

SIGNALS = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGUSR1,  # what clusters send ahead of a time limit
    signal.SIGHUP,  # the terminal is closed
)


class AtOnce(BaseException):
    """Out of whatever is being done, from a signal's handler; `at_once` makes `Stopped` of it.

    No Exception: libraries catch those, and would go on or make errors of their own of it.
    """

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.signal_number = signal_number


class Stopped(RunEnded):
    """The run was asked to stop, and did so.

    Args:
        signal_number: what asked for it; a program stopped by it exits with 128 + this number.
        path: the checkpoint made for it, from which `resume=auto` goes on; None: it was stopped at once.
        hint: how to go on where it was stopped at once.
    """

    def __init__(self, signal_number: int, path: Path | None, hint: str = "") -> None:
        how = f"at once{hint and f'; {hint}'}" if path is None else f"go on with resume=auto (from {path})"
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}{' ' if path is None else '; '}{how}")
        self.signal_number, self.path = signal_number, path
        self.exit_code = 128 + signal_number
        self.on_all_ranks = path is not None  # else the others may not know, and would wait for this one


@contextmanager
def at_once(hint: str = "") -> Iterator[None]:
    """In here a signal ends the work at once: for tasks without steps, what comes before the first step and after the
    last. What tidies up meanwhile is disturbed by no other signal but Ctrl-C, which kills.

    Args:
        hint: how to go on.

    Raises:
        Stopped: a signal has come.
    """
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # the loader's workers inherit it
            return
        for other in before:
            signal.signal(other, signal.SIG_DFL if other == signal.SIGINT else signal.SIG_IGN)
        raise AtOnce(number)

    before = catch(end)
    try:
        yield
    except AtOnce as asked:
        raise Stopped(asked.signal_number, None, hint) from None
    finally:
        restore(before)


class Stops:
    """While steps are made, notes that a signal asks for a stop, which is then made between two of them.

    Another Ctrl-C acts at once; another SIGTERM, SIGUSR1 or SIGHUP does not: clusters send several.
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
            raise AtOnce(number)
        self.asked = self.asked or number
        with contextlib.suppress(OSError):  # the terminal may be gone
            # Not the log: a handler may interrupt it in the middle of a line.
            os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C once more to stop at once\n")


def catch(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Signal -> the handler it had before. Only the main thread can: elsewhere none is caught."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    under_nohup = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    heard = [number for number in SIGNALS if number != signal.SIGHUP or not under_nohup]
    return {number: signal.signal(number, handler) for number in heard}


def restore(handlers: dict[int, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
