"""What trains, and the files of it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from otl.config import LoraFormat, Output
from otl.formats.deltas import compare
from otl.formats.lora import kohya_key, read
from otl.formats.spellings import all_ends
from otl.methods.adapter import Adapter
from otl.methods.continuing import continued
from otl.methods.injected import base_weight, live_state
from otl.methods.loha import Loha
from otl.methods.lokr import Lokr
from otl.methods.lora import Dora, Lora
from otl.methods.oft import Oft
from otl.modules.base import DiffusionModule
from otl.testing.comparing import ROUNDING, require
from otl.testing.inputs import Factory, adapt, backward, loaded

ADAPTERS: dict[str, Callable[..., Adapter]] = {
    "lora": partial(Lora, rank=4, alpha=2.0),
    "dora": partial(Dora, rank=4, alpha=2.0),
    "loha": partial(Loha, rank=2, alpha=1.0),
    "lokr": partial(Lokr, rank=2, alpha=1.0, factor=4),
    "oft": partial(Oft, block_size=4),
}


def check_gradients(factory: Factory) -> None:
    """Gradients reach every adapter of the denoiser, some of each text encoder, and nothing else."""
    module = adapt(factory())
    backward(module)
    own = {id(parameter) for parameter in module.trained_parameters().values()}
    require(own == {id(p) for group in module.groups for p in group.params}, "the groups are not what trains")
    for name in module.part_names:
        parameters = dict(module.part(name).named_parameters())
        extra = [key for key, p in parameters.items() if "lora_" not in key and (p.requires_grad or p.grad is not None)]
        require(not extra, f"{name}.{(extra or [''])[0]} is not of the adapter and yet gets a gradient")
        reached = {key: p.grad is not None and bool(p.grad.any()) for key, p in parameters.items() if "lora_" in key}
        if name in module.lora_targets:
            require(any(reached.values()), f"no gradient reaches {name}: is it called under no_grad?")
        missed = [key for key, reaches in reached.items() if not reaches]
        if name == module.denoiser:
            require(not missed, f"no gradient reaches {len(missed)} weights of {name}, such as {missed[:1]}")


def check_state_dict(factory: Factory) -> None:
    """A checkpoint holds the trained weights only, and loading it brings them back."""
    module = adapt(factory())
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    frozen = [name for name in state if "lora_" not in name]
    require(not frozen, f"state_dict holds {len(frozen)} frozen weights, such as {frozen[:1]}")
    adapters = sum(p.requires_grad for name in module.part_names for p in module.part(name).parameters())
    require(len(state) == adapters, f"state_dict holds {len(state)} of {adapters} trained weights")
    other = adapt(factory(), seed=1)
    other.load_state_dict(state, strict=other.strict_loading)
    require(all(torch.equal(other.state_dict()[name], state[name]) for name in state), "weights do not come back")


def check_lora_file(factory: Factory) -> None:
    """The file of every kind of adapter has each adapted layer under its part's name, and what goes on from it is the
    same; that of a LoRA in PEFT's names too."""
    plain = loaded(factory)
    for name, make in ADAPTERS.items():
        method = make()
        module = adapt(factory(), method)
        live = live_state(module)
        for style in LoraFormat if name == "lora" else (LoraFormat.kohya,):
            what = f"the {name} file in {style.value}'s names"
            module.output_options = Output(format=style, dtype="fp32")
            with tempfile.TemporaryDirectory() as folder:
                file = module.export(Path(folder) / "adapter")
                require_keys(module, file, what, style, layers=sum(map(len, live.values())))
                again = continued(plain, file, method.continues)
            off = compare(live, again, partial(base_weight, module))
            require(off < ROUNDING, f"going on from {what} is off by {off:.1e}")


def require_keys(module: DiffusionModule, file: Path, what: str, style: LoraFormat, *, layers: int) -> None:
    """The file has so many layers, all of them below the names of the family's parts, and the family's header."""
    starts = {
        LoraFormat.kohya: tuple(kohya_key(module.kohya_prefixes[part], "") for part in module.lora_targets),
        LoraFormat.peft: tuple(f"{part}." for part in module.lora_targets),
    }
    tensors, header = read(file)
    alien = [key for key in tensors if not key.startswith(starts[style])]
    require(not alien, f"{what} has {alien[:1]}, which belongs to no part")
    stems = {key.removesuffix(next((end for end in all_ends() if key.endswith(end)), ".alpha")) for key in tensors}
    require(len(stems) == layers, f"{what} has {len(stems)} of {layers} layers")
    require(header["modelspec.architecture"] == f"{module.architecture}/lora", "the header names another model")
