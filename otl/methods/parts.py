"""Which parts of a model a method trains, and how."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, fields
from typing import Any

from otl.config import SettingsError
from otl.epochs import ACCEPTED, StopAfter, is_stop


@dataclass
class PartOptions:
    """What can be set for one part; None is the method's or the optimizer's own."""

    lr: float | None = None  # learning rate
    rank: int | None = None  # inner dimension of its adapter
    alpha: float | None = None  # numerator of its adapter's strength
    stop_after: StopAfter | None = None  # a share of the run, steps or epochs; None: never


def chosen_parts(parts: dict[str, Any], *, accepted: Collection[str] = ("lr", "stop_after")) -> dict[str, PartOptions]:
    """part -> its options, of those that are not None.

    Args:
        accepted: the options that the method has.

    Raises:
        SettingsError: nothing is chosen, or a part has a setting that does not exist or an impossible value.
    """
    assert set(accepted) <= {field.name for field in fields(PartOptions)}
    chosen = {name: options_of(name, options, accepted) for name, options in parts.items() if options is not None}
    if not chosen:
        raise SettingsError("method.parts: no part is chosen, so nothing would train; set method.parts.denoiser={}")
    return chosen


def options_of(name: str, options: dict[str, Any], accepted: Collection[str]) -> PartOptions:
    """One part's options, checked."""
    for key, value in options.items():
        setting = f"method.parts.{name}.{key}={value}"
        if key not in accepted:
            raise SettingsError(f"{setting}: no such setting; a part has {', '.join(accepted)}")
        if value is None:
            continue
        if key == "stop_after" and isinstance(value, str):
            if not is_stop(value):
                raise SettingsError(f"{setting}: must be {ACCEPTED}")
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise SettingsError(f"{setting}: must be a number")
        if key == "rank" and (not isinstance(value, int) or value < 1):
            raise SettingsError(f"{setting}: must be a whole number, at least 1")
        if value < 0 or (value == 0 and key != "lr"):
            raise SettingsError(f"{setting}: must be {'at least' if key == 'lr' else 'above'} 0")
    return PartOptions(**options)
