"""What a check says, and whether two tensors are equal."""

from __future__ import annotations

import math

from torch import Tensor

ROUNDING = 1e-4  # of the largest number: what another order of the same sums may change


def require(condition: bool, message: str) -> None:
    """`assert`, that python -O keeps."""
    if not condition:
        raise AssertionError(message)


def close(a: Tensor, b: Tensor, share: float = ROUNDING) -> bool:
    """Whether two tensors are equal up to rounding."""
    return a.shape == b.shape and difference(a, b) <= share


def differ(a: Tensor, b: Tensor) -> bool:
    """Whether they differ by more than rounding at its smallest."""
    return a.shape != b.shape or difference(a, b) > 1e-6


def difference(a: Tensor, b: Tensor) -> float:
    """The largest difference as a share of the largest number."""
    scale = a.double().abs().max().clamp(min=1e-12)
    return ((a.double() - b.double()).abs().max() / scale).nan_to_num(nan=math.inf).item()
