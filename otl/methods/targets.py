"""Which layers a pattern means."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from otl.config import SettingsError
from otl.methods.patterns import compiled, preset


def layers(part: nn.Module) -> list[str]:
    """Paths of the layers that an adapter can sit on: linear and convolution.

    Not grouped (depthwise) convolutions: what two thin matrices do to their outputs is no change of their weight.
    """
    return [name for name, module in part.named_modules() if isinstance(module, nn.Linear) or plain(module)]


def plain(module: nn.Module) -> bool:
    """Whether it is a convolution in which every output sees every input."""
    return isinstance(module, nn.Conv2d) and module.groups == 1


def matching(
    names: dict[str, list[str]], targets: str | list[str], presets: dict[str, dict[str, list[str]]]
) -> dict[str, list[str]]:
    """part -> the layers that any pattern finds; a pattern may be meant for one of several parts.

    Args:
        names: part -> paths of all its layers.
        targets: a preset's name, or regular expressions searched for anywhere in a path.
        presets: part -> name -> patterns.

    Raises:
        SettingsError: no such preset, a pattern that is no regular expression or finds nothing in any part, or a part
            in which none finds anything.
    """
    found: dict[str, set[str]] = {part: set() for part in names}
    hits: dict[str, int] = {}
    for part, of_part in names.items():
        patterns = preset(targets, presets.get(part, {})) if isinstance(targets, str) else targets
        for pattern in patterns:
            layers_found = found_by(pattern, of_part, setting="targets")
            found[part] |= layers_found
            hits[pattern] = hits.get(pattern, 0) + len(layers_found)
    if idle := [pattern for pattern, count in hits.items() if not count]:
        raise SettingsError(f"method.targets: {idle[0]!r} matches no layer of {' or '.join(names)}. {kinds_of(names)}")
    if empty := [part for part, of_part in found.items() if not of_part]:
        raise SettingsError(
            f"method.targets: nothing matches a layer of {empty[0]}: add a pattern for it, or set "
            f"method.parts.{empty[0]}=null. {kinds_of({empty[0]: names[empty[0]]})}"
        )
    return {part: [name for name in of_part if name in found[part]] for part, of_part in names.items()}


def found_by(pattern: str, names: Iterable[str], *, setting: str) -> set[str]:
    """The names in which a pattern is found.

    Raises:
        SettingsError: it is no regular expression.
    """
    expression = compiled(pattern, setting)
    return {name for name in names if expression.search(name)}


def excluding(chosen: dict[str, list[str]], patterns: list[str]) -> dict[str, list[str]]:
    """part -> layers, without those that any pattern finds.

    Raises:
        SettingsError: a pattern finds none of them, or leaves nothing of a part.
    """
    kept = {part: dict.fromkeys(names) for part, names in chosen.items()}
    for pattern in patterns:
        hits = {part: found_by(pattern, names, setting="exclude") for part, names in chosen.items()}
        if not any(hits.values()):
            raise SettingsError(
                f"method.exclude: {pattern!r} matches no layer that would be trained. {kinds_of(chosen)}"
            )
        for part, found in hits.items():
            for name in found:
                kept[part].pop(name, None)
    if empty := [part for part, names in kept.items() if not names]:
        raise SettingsError(f"method.exclude leaves no layer of {empty[0]}: set method.parts.{empty[0]}=null instead")
    return {part: list(names) for part, names in kept.items()}


def by_pattern(chosen: dict[str, list[str]], values: dict[str, int], *, setting: str) -> dict[str, dict[str, int]]:
    """part -> layer -> the value of the first pattern that finds it, where any does.

    Raises:
        SettingsError: a pattern finds no layer that another has not found before.
    """
    given: dict[str, dict[str, int]] = {part: {} for part in chosen}
    for pattern, value in values.items():
        new = [
            (part, name)
            for part, names in chosen.items()
            for name in found_by(str(pattern), names, setting=setting)
            if name not in given[part]
        ]
        if not new:
            raise SettingsError(
                f"method.{setting}: {pattern!r} matches no layer that would be trained, or only those of a "
                f"pattern before it. {kinds_of(chosen)}"
            )
        for part, name in new:
            given[part][name] = value
    return given


def kinds_of(chosen: dict[str, list[str]]) -> str:
    """What would be trained, part by part."""
    return " ".join(f"Of {part}: {described(names)}." for part, names in chosen.items())


def described(names: list[str]) -> str:
    """What exists, with numbers folded: a few dozen kinds instead of hundreds of names."""
    kinds = sorted({re.sub(r"\b\d+\b", "N", name) for name in names})
    return f"Its {len(names)} layers are of these kinds: {', '.join(kinds)}"
