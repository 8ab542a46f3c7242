"""What CUDA's autocast does, for the device of `tests/pretend.py`: by the lists that torch has of it in its headers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.library import Library, fallthrough_kernel

KEY = "AutocastPrivateUse1"
HEADER = Path(torch.__file__).parent / "include/ATen/autocast_mode.h"
LISTS = {  # in the header -> whether a number's dtype becomes fp32, or else that of the mixed precision
    "AT_FORALL_LOWER_PRECISION_FP": False,
    "AT_FORALL_FP32": True,
    "AT_FORALL_FP32_SET_OPT_DTYPE": True,
}
libraries: list[Library] = []  # what is registered lasts as long as they do


def register(device: str) -> None:
    """In a new process."""
    everything, own = Library("_", "IMPL", KEY), Library("aten", "IMPL", KEY)
    libraries.extend([everything, own])
    everything.fallback(fallthrough_kernel)
    for name, exact in listed():
        own.impl(name, casting(operation(name), device, exact=exact))


def listed() -> Iterator[tuple[str, bool]]:
    """Name of an operation, and whether it is computed in fp32."""
    header = HEADER.read_text()
    for macro, exact in LISTS.items():
        body = re.search(rf"#define {macro}\(_\)(.*?)\n\n", header, re.DOTALL)
        assert body is not None
        for name, overload in re.findall(r"_\((\w+)(?:, (\w+))?\)", body[1]):
            yield f"{name}.{overload}" if overload else name, exact
    yield from (("norm.Scalar", True), ("norm.ScalarOpt_dim", True))


def operation(name: str) -> Any:
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def casting(call: Any, device: str, *, exact: bool) -> Callable[..., Any]:
    """An operation whose numbers are cast before; those in float64, and those of other devices, stay."""
    below = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)

    def cast(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(map(cast, value))
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == torch.float64:
            return value
        if value.device.type != device:
            return value
        return value.to(torch.float32 if exact else torch.get_autocast_dtype(device))

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(below):
            return call(*map(cast, args), **{name: cast(value) for name, value in kwargs.items()})

    return run
