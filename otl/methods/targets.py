"""Which layers a pattern means."""

from __future__ import annotations

import difflib
import re

from torch import nn

from otl.config import SettingsError


def layers(part: nn.Module) -> list[str]:
    """Paths of the layers that an adapter can sit on: linear and convolution."""
    return [name for name, module in part.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def matching(names: list[str], targets: str | list[str], presets: dict[str, list[str]], *, part: str) -> list[str]:
    """The layers that any pattern finds.

    Args:
        names: paths of all layers of the part.
        targets: a preset's name, or regular expressions searched for anywhere in a path.
        presets: name -> patterns.
        part: for the error.

    Raises:
        SettingsError: no such preset, a pattern that is no regular expression, or one that finds nothing.
    """
    patterns = preset(targets, presets) if isinstance(targets, str) else list(targets)
    found: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if compiled(pattern).search(name)}
        if not hits:
            raise SettingsError(f"method.targets: {pattern!r} matches no layer of {part}. {described(names)}")
        found |= hits
    return [name for name in names if name in found]


def preset(name: str, presets: dict[str, list[str]]) -> list[str]:
    """A preset's patterns; any other word is taken as one pattern."""
    if name in presets:
        return presets[name]
    close = difflib.get_close_matches(name, presets, n=1, cutoff=0.7)
    if close:
        raise SettingsError(f"method.targets={name}: did you mean {close[0]}? Presets: {', '.join(presets)}")
    return [name]


def compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise SettingsError(f"method.targets: {pattern!r} is no regular expression ({error})") from error


def described(names: list[str]) -> str:
    """What exists, with numbers folded: a few dozen kinds instead of hundreds of names."""
    kinds = sorted({re.sub(r"\b\d+\b", "N", name) for name in names})
    return f"Its {len(names)} layers are of these kinds: {', '.join(kinds)}"
