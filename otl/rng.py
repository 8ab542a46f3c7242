"""Randomness as a function of (seed, epoch, sample): the same on any device, any number of workers and ranks."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def key(*parts: int | str) -> int:
    """Any integers and words -> a number in 0..2**63-1 that depends on all of them and their order."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by `key(*parts)`."""
    return torch.Generator().manual_seed(key(*parts))


def uniform(*parts: int | str) -> float:
    """A number in 0..1 (1 excluded) that depends on all of `parts`."""
    return key(*parts) / 2**63


def uniforms(keys: Tensor, stream: str) -> Tensor:
    """[B] int64 keys -> [B] float64 in 0..1; `stream` names what they are for."""
    return torch.tensor([uniform(int(k), stream) for k in keys], dtype=torch.float64)


def normals(keys: Tensor, shape: tuple[int, ...], stream: str) -> Tensor:
    """[B] int64 keys -> [B, *shape] float32 standard normal, each row from its own key; on the CPU."""
    return torch.stack([torch.randn(shape, generator=generator(int(k), stream)) for k in keys])


def permutation(count: int, *parts: int | str) -> NDArray[np.int64]:
    """A shuffle of 0..count-1 that depends on all of `parts`."""
    return torch.randperm(count, generator=generator(*parts)).numpy()
