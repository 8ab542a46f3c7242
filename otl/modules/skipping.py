"""An optimizer step that is not made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class StepSkipped(Exception):
    """Raised when the gradients are there and before the optimizer sees them, by callbacks/guard.py."""


@contextlib.contextmanager
def skippable(scaler: torch.amp.GradScaler | None) -> Iterator[None]:
    """Around the optimizer's step. One that is skipped leaves weights, optimizer and average as they are.

    Args:
        scaler: of fp16, whose scale stays as it is; None: there is none.
    """
    try:
        yield
    except StepSkipped:
        if scaler is not None:
            scaler.update(scaler.get_scale())
