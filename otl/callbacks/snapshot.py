"""A checkpoint held still: a copy in the CPU's memory, and how large it is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil
from torch import Tensor


def snapshot(value: Any) -> Any:
    """The same with its tensors copied to the CPU and its containers new, so that training may go on."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return type(value)((key, snapshot(each)) for key, each in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(snapshot, value))
    return value


def bytes_of(value: Any) -> int:
    """Of all tensors in nested containers, each storage counted once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors(value)}
    return sum(storages.values())


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors(each)


def fits(count: int) -> bool:
    """Whether memory has room for so many bytes, and for as many again."""
    return 2 * count < psutil.virtual_memory().available
