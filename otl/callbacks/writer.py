"""Writing beside the training, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Does one thing at a time. What goes wrong in it is raised where it is asked for, and so never lost."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin, once what was begun before is done."""
        self.finish()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                self._error = error

        # A daemon: the second Ctrl-C waits for nothing.
        self._thread = threading.Thread(target=run, name="otl-checkpoints", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise what has gone wrong by now."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def finish(self) -> None:
        """Wait until it is done, and raise what has gone wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()
