"""Settings of the loss, the noise and the masks that make no sense together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import Enum
from functools import partial
from types import SimpleNamespace
from typing import Any

from otl.config import Inpaint, Loss, NoiseOptions, Problem
from otl.signatures import Unknown
from otl.wording import show


def _word(value: Any) -> Any:
    """A choice by its name, anything else as it is."""
    return value.name if isinstance(value, Enum) else value


def _mixed(loss: dict[str, Any]) -> bool:
    return any(loss.get("mix", {}).values())


def _huber(loss: dict[str, Any]) -> bool:
    return bool(loss["mix"]["huber"]) if _mixed(loss) else _word(loss.get("type")) == "huber"


def _scheduled(loss: dict[str, Any]) -> bool:
    return _huber(loss) and _word(loss.get("huber_schedule")) != "constant"


def _timesteps(name: str) -> tuple[str, Callable[[dict[str, Any]], bool]]:
    return f"noise.timesteps={name}", lambda noise: _word(noise.get("timesteps")) == name


# Parameter -> what it is of no use without, and whether that is given.
LOSS_PARAMETERS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "huber_delta": ("loss.type=huber or loss.mix.huber", _huber),
    "huber_schedule": ("loss.type=huber or loss.mix.huber", _huber),
    "gamma": ("loss.weight=min_snr or p2", lambda loss: _word(loss.get("weight")) in {"min_snr", "p2"}),
    "unmasked_weight": ("loss.masked=true", lambda loss: bool(loss.get("masked"))),
    "unmasked_probability": ("loss.masked=true", lambda loss: bool(loss.get("masked"))),
    "normalize_masked_area": ("loss.masked=true", lambda loss: bool(loss.get("masked"))),
}
NOISE_PARAMETERS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "offset_random_strength": ("noise.offset above 0", lambda noise: bool(noise.get("offset"))),
    "offset_generalized": ("noise.offset above 0", lambda noise: bool(noise.get("offset"))),
    "multires_discount": ("noise.multires_iterations above 1", lambda noise: noise.get("multires_iterations") != 0),
    "logit_mean": _timesteps("logit_normal"),
    "logit_std": _timesteps("logit_normal"),
    "mode_scale": _timesteps("heavy_tail"),
    "beta_alpha": _timesteps("beta"),
    "beta_beta": _timesteps("beta"),
}
GENERATED = "inpaint.masks=generated or both", lambda inpaint: _word(inpaint.get("masks")) != "files"
INPAINT_PARAMETERS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    **dict.fromkeys(("boxes", "brushes", "ellipses", "whole", "min_area", "max_area"), GENERATED),
}
TASK_PARAMETERS: dict[str, tuple[str, Callable[[dict[str, Any]], bool]]] = {
    "separator": ("task.mode=append or prepend", lambda task: task.get("mode") in {"append", "prepend"}),
    "alpha": ("task.mode=blend", lambda task: task.get("mode") == "blend"),
}
PARAMETERS = (
    ("loss", Loss, LOSS_PARAMETERS),
    ("noise", NoiseOptions, NOISE_PARAMETERS),
    ("inpaint", Inpaint, INPAINT_PARAMETERS),
    ("task", partial(SimpleNamespace, separator=None, alpha=None), TASK_PARAMETERS),
)


def of_objective(settings: dict[str, Any]) -> Iterator[Problem]:
    """What of the loss, the noise, the masks and the task would have no effect, or cannot be."""
    for group, kind, parameters in PARAMETERS:
        given, defaults = settings.get(group) or {}, kind()
        for name, (needed, used) in parameters.items():
            value = given.get(name)
            changed = value is not Unknown and name in given and _word(value) != _word(getattr(defaults, name))
            if changed and not used(given):
                yield Problem(f"{group}.{name}", f"{show(_word(value))} would have no effect: it needs {needed}")
    loss = settings.get("loss") or {}
    if _mixed(loss) and _word(loss.get("type")) != "mse":
        message = f"{_word(loss['type'])} would have no effect: loss.mix says which distances count; leave one out"
        yield Problem("loss.type", message)
    if _scheduled(loss) and loss.get("huber_delta") == 1:
        message = "a schedule goes from 1 to loss.huber_delta, so that with 1 it would have no effect: lower it"
        yield Problem("loss.huber_delta", message)
    yield from _check_noise(settings.get("noise") or {})
    yield from _check_inpaint(settings.get("inpaint") or {})


def _check_noise(noise: dict[str, Any]) -> Iterator[Problem]:
    low, high = noise.get("min_timestep"), noise.get("max_timestep")
    if isinstance(low, int | float) and isinstance(high, int | float) and low >= high:
        yield Problem("noise.min_timestep", f"{low} is not below noise.max_timestep={high}: nothing would be trained")
    if noise.get("multires_iterations") == 1:
        message = "1 is the noise itself, without any coarser one: give 0 for none, or 2 and more"
        yield Problem("noise.multires_iterations", message)


def _check_inpaint(inpaint: dict[str, Any]) -> Iterator[Problem]:
    """Masks that cannot be made."""
    shares = [inpaint.get(form) for form in ("boxes", "brushes", "ellipses", "whole")]
    if all(share == 0 for share in shares):
        yield Problem("inpaint.whole", "boxes, brushes, ellipses and whole are all 0: give at least one a share")
    low, high = inpaint.get("min_area"), inpaint.get("max_area")
    if isinstance(low, int | float) and isinstance(high, int | float) and low > high:
        yield Problem("inpaint.min_area", f"{low} is above inpaint.max_area={high}")
