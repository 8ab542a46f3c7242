"""The layers that carry adapters inside a network: finding them, reading them, giving them weights."""

from __future__ import annotations

from functools import singledispatch
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from otl.types import AdapterLayer, AdapterState

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

ADAPTER = "default"  # PEFT's name of ours


def adapted(part: nn.Module) -> dict[str, BaseTunerLayer]:
    """path -> layer of PEFT's that carries the adapter."""
    return {
        path: layer
        for path, layer in part.named_modules()
        if isinstance(layer, BaseTunerLayer) and ADAPTER in layer._get_available_adapters()
    }


def own_parameters(layer: Any) -> list[nn.Parameter]:
    """What of a layer of PEFT's is the adapter's."""
    return [
        parameter for name, parameter in layer.named_parameters() if name.startswith(tuple(layer.adapter_layer_names))
    ]


def weights_of(layer: Any, names: dict[str, str]) -> dict[str, Tensor]:
    """What a layer of PEFT's holds, fp32 on the CPU; `names`: its attributes -> the names here."""
    return {
        ours: getattr(layer, theirs)[ADAPTER].detach().float().cpu()
        for theirs, ours in names.items()
        if ADAPTER in getattr(layer, theirs)
    }


def replace_weights(layer: Any, names: dict[str, str], given: AdapterLayer) -> None:
    """Put a file's tensors in the place of a layer's, whose shapes may be others; `names` as in `weights_of`."""
    device = layer.get_base_layer().weight.device
    for theirs, ours in names.items():
        tensors, tensor = getattr(layer, theirs), getattr(given, ours)
        if ADAPTER in tensors:
            del tensors[ADAPTER]
        if tensor is not None:
            tensors[ADAPTER] = nn.Parameter(tensor.to(device))


def keep_autocast(layer: nn.Module) -> None:
    """Let a layer put out what its frozen one does under autocast: PEFT's LoHa and LoKr go back to their input's dtype,
    which is fp32 behind every norm."""
    layer.register_forward_hook(in_autocast_dtype)


def in_autocast_dtype(layer: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    device = output.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)  # a plan's device knows none
    return output.to(torch.get_autocast_dtype(device)) if autocast else output


@singledispatch
def state_of(layer: Any) -> AdapterLayer:
    """What a layer of PEFT's has become, fp32 on the CPU; each kind says how."""
    raise TypeError(f"{type(layer).__name__} is no adapter of OTL's")


def live_state(module: DiffusionModule) -> AdapterState:
    """The adapters of all parts as they are now, fp32 on the CPU; what else trains is not among them."""
    states = {
        name: {path: state_of(layer) for path, layer in adapted(part).items()} for name, part in module.trained.items()
    }
    return {name: state for name, state in states.items() if state}


def base_weight(module: DiffusionModule, part: str, path: str) -> Tensor:
    """The frozen weight below an adapter, fp32 on the CPU."""
    layer: Any = module.part(part).get_submodule(path)
    return layer.get_base_weight().detach().float().cpu()
