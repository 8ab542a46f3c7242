"""One method of each kind."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from otl.methods.adapter import Adapter
from otl.methods.injected import adapted
from otl.methods.loha import Loha
from otl.methods.lokr import Lokr
from otl.methods.lora import Dora, Lora
from otl.methods.oft import Oft
from otl.modules.base import DiffusionModule
from otl.testing.published import published as published

KINDS: dict[str, Callable[..., Adapter]] = {
    "lora": lambda **options: Lora(**{"rank": 4, "alpha": 3.0} | options),
    "dora": lambda **options: Dora(**{"rank": 4, "alpha": 3.0} | options),
    "dora_lycoris": lambda **options: Dora(**{"rank": 4, "alpha": 3.0, "reader": "lycoris"} | options),
    "loha": lambda **options: Loha(**{"rank": 4, "alpha": 3.0} | options),
    "loha_tucker": lambda **options: Loha(**{"rank": 4, "alpha": 3.0, "tucker": True} | options),
    "lokr": lambda **options: Lokr(**{"rank": 2, "alpha": 3.0, "factor": 4} | options),
    "lokr_both": lambda **options: Lokr(**{"rank": 2, "alpha": 3.0, "decompose_both": True} | options),
    "lokr_tucker": lambda **options: Lokr(**{"rank": 2, "alpha": 3.0, "factor": 4, "tucker": True} | options),
    "lokr_whole": lambda **options: Lokr(**{"rank": 64, "alpha": 3.0} | options),
    "oft": lambda **options: Oft(**{"block_size": 8} | options),
}


@functools.cache
def loaded(family: type[DiffusionModule], folder: str) -> Any:
    """A pipeline to copy: reading tokenizers takes longer than most tests."""
    return family(folder).load_pipeline()


def module_of(family: type[DiffusionModule], folder: Any, method: Adapter | None = None) -> DiffusionModule:
    """A family that copies its pipeline instead of loading it; nothing copied yet."""
    module = family(str(folder))
    module.method = method

    def load_pipeline(*args: Any) -> Any:
        pipeline = copy.copy(loaded(family, str(folder)))
        for name in family.part_names:
            setattr(pipeline, name, copy.deepcopy(getattr(pipeline, name)))
        return pipeline

    module.load_pipeline = load_pipeline  # type: ignore[method-assign]
    return module


def trained(family: type[DiffusionModule], folder: Any, method: Adapter, *, seed: int = 0) -> DiffusionModule:
    """A family with an adapter whose weights have gone some way from their start."""
    module = module_of(family, folder, method)
    module.seed = seed
    module.configure_model()
    train(module, seed=seed)
    return module


def train(module: DiffusionModule, *, seed: int = 0) -> None:
    """Move every trained weight by a tenth; lengths of rows by a tenth of themselves."""
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in module.trained_parameters().items():
            step = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(step * parameter if "magnitude" in name else step)


def outputs(layer: Any, weight: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Inputs for a layer, and what another weight in its place would make of them, without bias."""
    base = layer.get_base_layer()
    draw = torch.Generator().manual_seed(3)
    if isinstance(base, nn.Linear):
        x = torch.randn(5, base.in_features, generator=draw)
        return x, nn.functional.linear(x, weight) if weight is not None else None
    x = torch.randn(2, base.in_channels, 6, 6, generator=draw)
    return x, nn.functional.conv2d(x, weight, None, base.stride, base.padding) if weight is not None else None


def assert_same_layers(module: DiffusionModule, other: DiffusionModule) -> None:
    """The same layers make the same of the same inputs."""
    for part in module.trained:
        one, two = adapted(module.part(part)), adapted(other.part(part))
        assert one.keys() == two.keys()
        for path, layer in one.items():
            x, _ = outputs(layer)
            with torch.no_grad():
                a, b = layer.eval()(x), two[path].eval()(x)
            atol = 5e-5 * a.abs().max().item()
            torch.testing.assert_close(b, a, rtol=1e-5, atol=atol, msg=lambda why, path=path: f"{path}: {why}")
