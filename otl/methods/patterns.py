"""What `method.targets` says before any layer is known: a preset of the family, or patterns."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from otl.config import SettingsError


def preset(name: str, presets: dict[str, list[str]]) -> list[str]:
    """A preset's patterns; any other word is taken as one pattern.

    Raises:
        SettingsError: it is nearly a preset's name.
    """
    if name in presets:
        return presets[name]
    if close := difflib.get_close_matches(name, presets, n=1, cutoff=0.7):
        raise SettingsError(
            f"method.targets={name}: did you mean {close[0]}? Presets: {', '.join(presets)}; a pattern of that name is "
            f"a list, [{name}]"
        )
    return [name]


def compiled(pattern: str, setting: str) -> re.Pattern[str]:
    """Raises SettingsError: it is no regular expression."""
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SettingsError(f"method.{setting}: {pattern!r} is no regular expression ({error})") from error


def as_list(patterns: str | Iterable[str] | None) -> list[str]:
    """One pattern, several or none."""
    return [patterns] if isinstance(patterns, str) else list(patterns or [])


def starting_file(from_file: str | None, targets: str | list[str]) -> Path | None:
    """The adapter file to go on from.

    Raises:
        SettingsError: it is not there, or its layers are asked for and none is given.
    """
    if from_file is None:
        if targets == "file":
            raise SettingsError("method.targets=file: means the layers of method.from_file, which is not given")
        return None
    path = Path(from_file).expanduser()
    if not path.exists():
        raise SettingsError(f"method.from_file={from_file}: there is no such file")
    return path
