"""How settings, values and suggestions are written in messages."""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from enum import Enum
from typing import Any


def joined(prefix: str, key: Any) -> str:
    """The full name of a setting."""
    return f"{prefix}.{key}" if prefix else str(key)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts -> full name -> value."""
    if not isinstance(node, dict):
        return {prefix: node}
    return {name: value for key in node for name, value in flat(node[key], f"{prefix}.{key}".lstrip(".")).items()}


def nearest(name: str, names: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The name that was probably meant."""
    by_fold = {candidate.casefold(): candidate for candidate in names}
    close = get_close_matches(name, names, 1, cutoff)
    close = close or [by_fold[fold] for fold in get_close_matches(name.casefold(), list(by_fold), 1, cutoff)]
    return close[0] if close else None


def meant(name: Any, names: Sequence[Any]) -> str:
    """`; did you mean x?`, or nothing."""
    close = nearest(str(name), [str(candidate) for candidate in names])
    return f"; did you mean {close}?" if close else ""


def as_number(text: str) -> str | None:
    """How a number that YAML 1.1 reads as text for want of a dot or a sign has to be written: 1e-4 -> 1.0e-4."""
    found = re.fullmatch(r"([+-]?\d+)\.?(\d*)[eE]([+-]?)(\d+)", text)
    return f"{found[1]}.{found[2] or 0}e{found[3] or '+'}{found[4]}" if found else None


def as_whole(value: Any) -> str:
    """`; did you mean 1000?` where 1e3, which is no whole number in YAML, was typed for one; or nothing."""
    return f"; did you mean {value:.0f}?" if isinstance(value, float) and value.is_integer() else ""


def show(value: Any) -> str:
    """A value as one writes it on the command line."""
    if value is None:
        return "null"
    if isinstance(value, Enum):
        return str(value.value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def counted(count: int, name: str) -> str:
    """ "1 file", "2 files"."""
    return f"{count} {name}" + ("s" if count != 1 else "")


def printable(text: str) -> str:
    """A name as any console takes it: what is no character, or moves the cursor, is escaped."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
