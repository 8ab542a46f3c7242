"""The global random generators, saved and put back. What OTL itself draws is keyed (otl/rng.py); dropout is not."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import torch


def states() -> dict[str, Any]:
    """The states of Python's, NumPy's and torch's generators, of types that `torch.load(weights_only=True)` reads."""
    name, keys, *rest = numpy.random.get_state()
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": [name, torch.from_numpy(keys.astype("int64")), *rest],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():  # else nothing was drawn there, and asking would occupy memory of a run on the CPU
        found["cuda"] = torch.cuda.get_rng_state()  # of this process's device only: asking others would occupy them
    return found


def of_all_ranks() -> list[dict[str, Any]]:
    """The states of each rank; all have to ask at once."""
    own = states()
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [own]
    ranks = [own] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, own)
    return ranks


def restore(saved: dict[str, Any]) -> None:
    """Put back what `states` returned; a CUDA state is left out where there is no CUDA."""
    version, numbers, gauss = saved["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = saved["numpy"]
    numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    torch.set_rng_state(saved["torch"].cpu())
    if "cuda" in saved and torch.cuda.is_available():
        torch.cuda.set_rng_state(saved["cuda"].cpu())


@contextmanager
def kept() -> Iterator[None]:
    """Whatever is drawn in here, the generators go on as if it had not been."""
    saved = states()
    try:
        yield
    finally:
        restore(saved)
