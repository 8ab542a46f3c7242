"""A device that keeps its numbers in the CPU's memory and is as particular as a GPU, for machines that have none.

An operation that is given tensors of two devices raises, as does one that no GPU can do deterministically; whatever the
CPU would have to wait for is noted. It is torch's backend in Python (`privateuseone`), which a process keeps once it
has it: call it by the fixture `apart`.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.accelerators import Accelerator, AcceleratorRegistry
from lightning.pytorch.strategies import SingleDeviceStrategy, StrategyRegistry
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests import pretend_autocast

NAME = "pretend"  # also of Lightning's accelerator and strategy
aten = torch.ops.aten
COPY, MOVE = aten.copy_.default, aten._to_copy.default
TABLES = {aten.index.Tensor, aten.index_put_.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten._linalg_check_errors.default}
# Of docs.pytorch.org, torch.use_deterministic_algorithms: what raises on a GPU.
UNDETERMINED = set(
    "avg_pool3d_backward _adaptive_avg_pool2d_backward _adaptive_avg_pool3d_backward adaptive_max_pool2d_backward "
    "fractional_max_pool2d_backward fractional_max_pool3d_backward max_unpool2d max_unpool3d "
    "upsample_linear1d_backward upsample_bilinear2d_backward upsample_bicubic2d_backward upsample_trilinear3d_backward "
    "_upsample_bilinear2d_aa_backward _upsample_bicubic2d_aa_backward reflection_pad1d_backward "
    "reflection_pad2d_backward reflection_pad3d_backward nll_loss_forward nll_loss2d_forward _ctc_loss_backward "
    "_embedding_bag_dense_backward put_ histc bincount grid_sampler_2d_backward grid_sampler_3d_backward".split()
)
waits: list[str] = []  # what the CPU has waited for, and where it was asked for


class MixedDevices(RuntimeError):
    """Tensors of the CPU and of the device in one operation."""


class Undetermined(RuntimeError):
    """An operation without a deterministic kernel on a GPU."""


class Placed(Tensor):
    """A tensor on the device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, /, **_: Any) -> Placed:
        found = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        found.held = held
        return found

    def tolist(self) -> Any:
        """torch refuses it for subclasses."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """Makes what is asked for there."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Backend(backend_registration._DummyBackendModule):
    """What torch asks of `torch.pretend`."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """By the CPU; the result is where a GPU would have it."""
    given = [each for each in leaves([*args, *kwargs.values()]) if isinstance(each, Tensor)]
    plain = [tensor for tensor in given if not isinstance(tensor, Placed)]
    placed = len(plain) < len(given)
    device = kwargs.get("device")
    there = placed if device is None else device.type == NAME
    if not placed and not there:
        return func(*args, **kwargs)
    if placed:
        require_one_device(func, args, plain)
    if undetermined(func, args):
        raise Undetermined(f"{func} {where()}")
    if kwargs.get("generator") is not None:
        raise MixedDevices(f"{func}: a generator of the CPU cannot draw on the device")
    if waited(func, args, kwargs, placed=placed, there=there):
        waits.append(f"{func} {where()}")
    own = kwargs if not there or device is None else kwargs | {"device": torch.device("cpu")}
    found = func(*held(args), **{name: held(each) for name, each in own.items()})
    if not there:
        return found.clone() if func is MOVE and found is held(args[0]) else found
    found = brought(found)
    return return_and_correct_aliasing(func, args, kwargs, found) if func._schema.is_mutable else found


def leaves(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from leaves(value)
        else:
            yield value


def held(value: Any) -> Any:
    """What the CPU has of it."""
    if isinstance(value, Placed):
        return value.held
    return type(value)(map(held, value)) if type(value) in (list, tuple) else value


def brought(value: Any) -> Any:
    """The CPU's tensors as the device's."""
    if isinstance(value, Tensor):
        return Placed(value)
    return type(value)(map(brought, value)) if type(value) in (list, tuple) else value


def require_one_device(func: Any, args: Any, plain: list[Tensor]) -> None:
    """A single number may lie on the CPU, and so may what a table on the device is looked up by."""
    if func is COPY or all(each.dim() == 0 for each in plain) or (func in TABLES and isinstance(args[0], Placed)):
        return
    raise MixedDevices(f"{func}: {tuple(plain[0].shape)} on the CPU, others on the device {where()}")


def undetermined(func: Any, args: Any) -> bool:
    if func is aten.cumsum.default:
        return bool(args[0].is_floating_point())
    return func is aten.median.dim or func.overloadpacket.__name__ in UNDETERMINED


def waited(func: Any, args: Any, kwargs: dict[str, Any], *, placed: bool, there: bool) -> bool:
    """Whether the CPU would wait until the device has done all that was asked of it before."""
    if func is MOVE:
        return placed != there and not (there and kwargs.get("non_blocking"))
    if func is COPY:
        to, source = (isinstance(each, Placed) for each in args[:2])
        return to != source and not (to and args[2:] == (True,))
    if func in TABLES:
        places = [each for each in args[1] if each is not None]
        return not all(isinstance(each, Placed) and each.dtype != torch.bool for each in places)
    return func in WAITS


def where() -> str:
    """The line of the repository that asked for it."""
    lines = [frame for frame in traceback.extract_stack() if "site-packages" not in frame.filename]
    line = [frame for frame in lines if Path(frame.filename) != Path(__file__)][-1]
    return f"({Path(line.filename).name}:{line.lineno}: {line.line})"


def exchange(a: Any, b: Any) -> None:
    """Parameters stay the objects they are when a module moves; torch's own function refuses those that are in use."""
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)  # type: ignore[attr-defined]


class PretendAccelerator(Accelerator):
    """For Lightning: `trainer.accelerator=pretend` with `trainer.strategy=pretend`."""

    def setup_device(self, device: torch.device) -> None:
        pass

    def teardown(self) -> None:
        pass

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> Any:
        return [torch.device(NAME, 0)]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return NAME


def register() -> None:
    """In a new process: autograd makes a thread for each device that there is when it first goes backward."""
    torch.set_num_threads(1)
    pretend_autocast.register(NAME)
    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    AcceleratorRegistry.register(NAME, PretendAccelerator)
    StrategyRegistry.register(NAME, SingleDeviceStrategy, device=torch.device(NAME, 0))


@contextmanager
def pretended() -> Iterator[torch.device]:
    """The device is there for the time of the block."""
    own, torch.utils.swap_tensors = torch.utils.swap_tensors, exchange  # type: ignore[assignment]
    torch.__future__.set_swap_module_params_on_conversion(True)
    torch._C._set_only_lift_cpu_tensors(True)  # what `torch.tensor` makes there comes there by an operation
    waits.clear()
    try:
        with Device():
            yield torch.device(NAME, 0)
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch.utils.swap_tensors = own
