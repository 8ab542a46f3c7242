"""A process of its own for a piece of work: what kills that does not kill whoever waits for it. Imports no torch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


def apart(work: Callable[[], None]) -> int:
    """Do it in a copy of this process, and wait.

    The copy is in a group of its own: a terminal's Ctrl-C reaches this process alone, which passes it on, so that one
    is one. It reads no terminal.

    Returns:
        0; the exit code, where the work exits; the negative number of what killed it; 128 and the number of the signal,
        where this process was asked to stop meanwhile.
    """
    sys.stdout.flush(), sys.stderr.flush()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)  # until there is somebody to pass them on
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), sys.__stdin__.fileno() if sys.__stdin__ else 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        work()
        sys.exit(0)  # and so out of whatever called this
    asked: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        with contextlib.suppress(ProcessLookupError):  # it has ended just now
            os.kill(child, number)

    ignored = [number for number in FORWARDED if signal.getsignal(number) is signal.SIG_IGN]  # as nohup has it
    handlers = {number: signal.signal(number, forward) for number in FORWARDED if number not in ignored}
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return 128 + asked[0] if asked else code


def told(code: int) -> str:
    """What has ended work that did not end by itself, in words.

    Args:
        code: that `apart` gave.
    """
    if code >= 0:
        return f"it ended by itself with exit code {code}, before it was done"
    name = signal.Signals(-code).name
    return f"killed by {name}" + ("; was the machine out of memory?" if name == "SIGKILL" else "")
