"""Which precision this machine can train in, and why."""

from __future__ import annotations

from typing import NamedTuple

import torch

from otl.config import SettingsError

CHOICES = ("auto", "32-true", "bf16-mixed", "16-mixed")
NAMES = {"32": "32-true", "fp32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "fp16": "16-mixed"}


class Precision(NamedTuple):
    """A choice of precision."""

    name: str  # as Lightning calls it
    autocast: torch.dtype | None  # of the forward pass; None: none
    reason: str


def choose(asked: str, *, accelerator: str = "auto") -> Precision:
    """The precision for this machine.

    Args:
        asked: one of CHOICES, or a short form.
        accelerator: Lightning's: "auto", "cpu", "gpu", "cuda", ...

    Raises:
        SettingsError: this machine cannot train in it.
    """
    name = NAMES.get(str(asked), str(asked))
    if name not in CHOICES:
        raise SettingsError(f"trainer.precision={asked}: accepted are {', '.join(CHOICES)}")
    cuda = torch.cuda.is_available() and accelerator != "cpu"
    if name == "32-true":
        return Precision(name, None, "as asked")
    if not cuda:
        if name == "16-mixed":
            raise SettingsError(
                f"trainer.precision={asked}: fp16 needs a GPU and none is used here; use 32-true or auto"
            )
        if name == "bf16-mixed":
            return Precision(name, torch.bfloat16, "as asked, on the CPU")
        return Precision("32-true", None, "no GPU is used")
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    device = torch.cuda.get_device_name()
    if name == "bf16-mixed" and not has_bf16:
        raise SettingsError(f"trainer.precision={asked}: {device} has no bf16 units; use 16-mixed or auto")
    if name == "16-mixed" or not has_bf16:
        return Precision("16-mixed", torch.float16, "as asked" if name == "16-mixed" else f"{device} has no bf16 units")
    return Precision("bf16-mixed", torch.bfloat16, "as asked" if name == "bf16-mixed" else f"{device} has bf16 units")
