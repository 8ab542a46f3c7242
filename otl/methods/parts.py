"""Which parts of a model a method trains, and how."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, fields
from typing import Any

from otl.config import SettingsError
from otl.epochs import ACCEPTED, StopAfter, is_stop
from otl.wording import meant

OF_EACH = ("lr", "stop_after")  # options of a part that every method has


@dataclass
class PartOptions:
    """What can be set for one part; None is the method's or the optimizer's own."""

    lr: float | None = None  # learning rate
    rank: int | None = None  # inner dimension of its adapter
    alpha: float | None = None  # numerator of its adapter's strength
    stop_after: StopAfter | None = None  # a share of the run, steps or epochs; None: never


def chosen_parts(parts: dict[str, Any], *, accepted: Collection[str] = OF_EACH) -> dict[str, PartOptions]:
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
    if not isinstance(options, dict):
        raise SettingsError(f"method.parts.{name}={options}: give its options, such as method.parts.{name}.lr=1e-5")
    for key, value in options.items():
        setting = f"method.parts.{name}.{key}={value}"
        if key not in accepted:
            raise SettingsError(
                f"{setting}: no such setting{meant(key, list(accepted))}; a part has {', '.join(accepted)}"
            )
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


def check_sizes(sizes: dict[str, Any], setting: str) -> None:
    """Raises SettingsError: what a pattern on layers is given is no size of an adapter."""
    for pattern, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise SettingsError(f"method.{setting}.{pattern}={size}: must be a whole number, at least 1")


def pipeline_name(name: str, *, family: str, denoiser: str, part_names: Sequence[str]) -> str:
    """The pipeline's name of a part; "denoiser" is the one that predicts.

    Args:
        family: its class's name, for the error.
        denoiser, part_names: as the family says them.

    Raises:
        SettingsError: the family has no such part.
    """
    name = denoiser if name == "denoiser" else name
    if name not in part_names:
        others = ", ".join(part for part in part_names if part != denoiser)
        raise SettingsError(f"method.parts.{name}: {family} has no such part; it has denoiser, {others}")
    return name


def by_pipeline_name(
    parts: dict[str, PartOptions], named: Callable[[str], str], *, trainable: Collection[str]
) -> dict[str, PartOptions]:
    """The pipeline's name of each part -> its options.

    Args:
        named: `pipeline_name` of the family.
        trainable: the parts that the method can train.

    Raises:
        SettingsError: a part is not there, cannot be trained by the method, or is named twice.
    """
    options: dict[str, PartOptions] = {}
    for key, settings in parts.items():
        name = named(key)
        if name not in trainable:
            raise SettingsError(f"method.parts.{key}: this method does not train {name}, but {', '.join(trainable)}")
        if name in options:
            raise SettingsError(f"method.parts.{key}: {name} is named twice; leave one of the two out")
        options[name] = settings
    return options
