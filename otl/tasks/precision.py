"""Which precision this machine can train in, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from otl.config import SettingsError

CHOICES = ("auto", "32-true", "bf16-mixed", "16-mixed")
NAMES = {"32": "32-true", "fp32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "fp16": "16-mixed"}
NAMED = {"cpu": "CPU", "mps": "Apple GPU"}
WITHOUT_CUDA = {"cpu": "no GPU is used", "mps": "mixed precision was never tried on Apple GPUs"}


class Precision(NamedTuple):
    """A choice of precision."""

    name: str  # as Lightning calls it
    autocast: torch.dtype | None  # of the forward pass; None: none
    reason: str


def device_kind(accelerator: str) -> str:
    """ "cuda", "mps" or "cpu": what Lightning's `accelerator` comes to on this machine."""
    if torch.cuda.is_available() and accelerator in {"auto", "gpu", "cuda"}:
        return "cuda"
    return "mps" if torch.backends.mps.is_available() and accelerator in {"auto", "gpu", "mps"} else "cpu"


def first_device(devices: Any) -> int:
    """The number of the first GPU that Lightning's `devices` names: 0 for a count, 1 for [1, 2] and "1,2"."""
    if isinstance(devices, str) and "," in devices:
        devices = [int(number) for number in devices.split(",") if number.strip()]
    return 0 if isinstance(devices, str | int) else int(devices[0])


def device(trainer: Any) -> torch.device:
    """Where a task without a Trainer computes, by the settings of that group."""
    kind = device_kind(trainer.accelerator)
    return torch.device(kind, first_device(trainer.devices)) if kind == "cuda" else torch.device(kind)


def choose(asked: str, *, accelerator: str = "auto", devices: Any = 1) -> Precision:
    """The precision for this machine.

    Args:
        asked: one of CHOICES, or a short form.
        accelerator: Lightning's: "auto", "cpu", "gpu", "cuda", ...
        devices: Lightning's: a count or a list; the first decides for all.

    Raises:
        SettingsError: this machine cannot train in it.
    """
    name = NAMES.get(str(asked), str(asked))
    if name not in CHOICES:
        raise SettingsError(f"trainer.precision={asked}: accepted are {', '.join(CHOICES)}")
    kind = device_kind(accelerator)
    if name == "32-true":
        return Precision(name, None, "as asked")
    if kind == "cuda":
        with torch.cuda.device(first_device(devices)):
            return on_cuda(name, asked)
    if name == "16-mixed":
        raise SettingsError(
            f"trainer.precision={asked}: fp16 needs a CUDA GPU and none is used here; use 32-true or auto"
        )
    if name == "bf16-mixed":
        return Precision(name, torch.bfloat16, f"as asked, on the {NAMED[kind]}")
    return Precision(
        "32-true", None, "no GPU is used" if kind == "cpu" else "mixed precision is not tried on Apple GPUs"
    )


def on_cuda(name: str, asked: str) -> Precision:
    """For the current GPU: bf16 where it has units for it, else fp16."""
    device, has_bf16 = torch.cuda.get_device_name(), torch.cuda.is_bf16_supported(including_emulation=False)
    if name == "bf16-mixed" and not has_bf16:
        raise SettingsError(f"trainer.precision={asked}: {device} has no bf16 units; use 16-mixed or auto")
    if name == "16-mixed" or not has_bf16:
        return Precision("16-mixed", torch.float16, "as asked" if name == "16-mixed" else f"{device} has no bf16 units")
    return Precision("bf16-mixed", torch.bfloat16, "as asked" if name == "bf16-mixed" else f"{device} has bf16 units")


def allow_tf32(precision: Precision, *, accelerator: str) -> bool:
    """In mixed precision, let a GPU round the factors of fp32 products to 10 bits; returns whether it now does.

    Autocast has the large products in 16 bits already. What is left in fp32 is the image encoder's, and small. In fp32
    nothing is rounded, which torch by itself does in convolutions, and an earlier job of a sweep may have allowed.
    """
    allowed = precision.autocast is not None and device_kind(accelerator) == "cuda"
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed
    return allowed
