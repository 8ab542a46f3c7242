"""From the CPU to the device without a wait: a blocking copy would wait for all that the device has still to do."""

from __future__ import annotations

from torch import Tensor


def to_like(values: Tensor, like: Tensor) -> Tensor:
    """In the dtype and on the device of `like`."""
    return values.to(like.device, like.dtype, non_blocking=True)


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] in the dtype and on the device of `like`, to multiply [B, ...]."""
    return to_like(values, like).reshape(-1, *[1] * (like.dim() - 1))
