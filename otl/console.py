"""Stdout and stderr that may go away while the work goes on. Imports no torch."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import Any


class Console(io.FileIO):
    """A descriptor whose reader may go (a closed terminal, `| head`) or whose disk may be full: what cannot be written
    is dropped, which is said once on stderr.

    Args:
        name: of it, for people.
    """

    def __init__(self, descriptor: int, name: str) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.known_as, self.broken = name, False

    def write(self, content: bytes) -> int:  # type: ignore[override]
        try:
            return super().write(content)
        except OSError as error:
            if not self.broken:
                self.broken = True
                with contextlib.suppress(OSError):  # it may be stderr itself
                    os.write(
                        2, f"{self.known_as}: {error.strerror}; a run goes on, and its otl.log has it all\n".encode()
                    )
            return len(content)


def lasting(stream: io.TextIOWrapper, name: str) -> io.TextIOWrapper:
    """The same stream, by a `Console`."""
    at_once = stream.write_through  # as with python -u or PYTHONUNBUFFERED
    raw: io.RawIOBase = Console(stream.fileno(), name)
    buffer: Any = raw if at_once else io.BufferedWriter(raw)
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=at_once,
    )


def keep_going() -> None:
    """This process and those that it starts lose nothing but what they would say."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # there is none by `>&-`, and another kind where a program puts it
        sys.stdout = lasting(sys.stdout, "stdout")
    if isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = lasting(sys.stderr, "stderr")
