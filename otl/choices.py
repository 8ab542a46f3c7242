"""The words, colours, durations and devices that settings take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from otl.config import Problem
from otl.signatures import Unknown
from otl.wording import flat, meant, show

PRECISIONS = ("auto", "32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16", "fp32", "fp16", 32, 16)
STRATEGIES = (  # Lightning's names; others, such as ModelParallelStrategy, are given by trainer.strategy._target_
    "auto",
    *("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook"),
    *(
        f"{kind}_find_unused_parameters_{each}"
        for kind in ("ddp", "ddp_spawn", "ddp_fork", "ddp_notebook")
        for each in ("true", "false")
    ),
    *("fsdp", "fsdp_cpu_offload", "deepspeed", "deepspeed_stage_1", "deepspeed_stage_2", "deepspeed_stage_2_offload"),
    *("deepspeed_stage_3", "deepspeed_stage_3_offload", "deepspeed_stage_3_offload_nvme"),
    *("single_device", "single_xla", "xla_debug", "xla", "single_tpu"),
)
CHOICES: dict[str, tuple[Any, ...]] = {
    "output.dtype": ("fp32", "fp16", "bf16"),
    "trainer.precision": PRECISIONS,
    "trainer.accelerator": ("auto", "cpu", "gpu", "cuda", "mps"),
    "trainer.strategy": (None, *STRATEGIES),
    "trainer.profiler": (None, "simple", "advanced", "pytorch", "xla"),
    "trainer.gradient_clip_algorithm": (None, "norm", "value"),
}
WORDED = {"trainer.devices": "at least 1; auto or -1: all; a list: numbers of GPUs from 0"}  # ranges that need words


def not_chosen(settings: dict[str, Any]) -> Iterator[Problem]:
    """Choices, colours, durations and devices that are not accepted."""
    leaves = flat(settings)
    for key, choices in CHOICES.items():
        if key in leaves and leaves[key] is not Unknown and leaves[key] not in choices:
            names = list(dict.fromkeys(map(show, choices)))
            message = f"{show(leaves[key])} is not accepted: must be {', '.join(names)}{meant(leaves[key], names)}"
            yield Problem(key, message)
    yield from _check_colours(settings)
    yield from _check_masker(settings.get("masker") or {})
    trainer = settings.get("trainer") or {}
    yield from _check_devices(trainer.get("devices", 1))
    yield from _check_duration(trainer.get("max_time"))


def _check_colours(settings: dict[str, Any]) -> Iterator[Problem]:
    """The one under transparent pixels, and those that become masks."""
    given = {"data.background": (settings.get("data") or {}).get("background", "white")}
    colours = (settings.get("masker") or {}).get("colours")
    given |= {
        f"masker.colours[{index}]": each for index, each in enumerate(colours if isinstance(colours, list) else [])
    }
    for key, colour in given.items():
        if colour in {"white", "black"} or colour is Unknown:
            continue
        from PIL import ImageColor  # only here: the usual colours need no import

        try:
            ImageColor.getrgb(colour)
        except ValueError:
            hint = meant(colour, list(ImageColor.colormap))
            yield Problem(key, f"{colour} is no colour: give a name such as white, or #rrggbb{hint}")


def _check_masker(masker: dict[str, Any]) -> Iterator[Problem]:
    """What is to be white, where that is asked for."""
    for name, such in (("prompts", "[a dog]"), ("colours", "[lime]")):
        if masker.get(name) == []:
            yield Problem(f"masker.{name}", f"there are none; name what is to be white, such as 'masker.{name}={such}'")


def _check_duration(duration: Any) -> Iterator[Problem]:
    """As Lightning reads it where it is text."""
    if isinstance(duration, dict) or duration in (None, Unknown):
        return
    written = r"(?=.*[1-9])\d+:\d\d:\d\d:\d\d"  # with no time at all nothing would be trained
    if not isinstance(duration, str) or not re.fullmatch(written, duration.strip()):
        message = f"{show(duration)} is not accepted: give days, hours, minutes and seconds, such as 00:12:00:00"
        yield Problem("trainer.max_time", message)


def _check_devices(devices: Any) -> Iterator[Problem]:
    """A number of devices or the numbers of some, as a list or with commas between them."""
    if devices in (Unknown, None, "auto"):
        return
    listed = isinstance(devices, list) or (isinstance(devices, str) and "," in devices)
    numbers = devices if isinstance(devices, list) else [each for each in str(devices).split(",") if each.strip()]
    if not numbers or not all(_is_device(each, listed=listed) for each in numbers):
        yield Problem("trainer.devices", f"{show(devices)} is not accepted: must be {WORDED['trainer.devices']}")


def _is_device(number: Any, *, listed: bool) -> bool:
    """Whether that is a GPU's number where they are listed, or a number of devices."""
    if isinstance(number, bool) or not re.fullmatch(r"\s*-?\d+\s*", str(number)):
        return False
    return int(number) >= 0 if listed else int(number) >= 1 or int(number) == -1
