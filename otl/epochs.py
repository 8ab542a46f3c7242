"""When a part stops training: after a number of steps, a share of the run, or whole epochs, written `3 epochs`."""

from __future__ import annotations

import re
from typing import Any

StopAfter = float | str
"""Below 1 a share of the run, from 1 on optimizer steps; a text: whole epochs."""

WRITTEN = re.compile(r"(1) epoch|([2-9]|[1-9][0-9]+) epochs")
ACCEPTED = "a number, or whole epochs as in '1 epoch' and '3 epochs'"


def epochs_of(text: str) -> int | None:
    """`3 epochs` -> 3; None: it is written in another way."""
    found = WRITTEN.fullmatch(text)
    return int(found[1] or found[2]) if found else None


def is_stop(value: Any) -> bool:
    """Whether a value of YAML says when something stops, whatever its sign."""
    if isinstance(value, str):
        return epochs_of(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)
