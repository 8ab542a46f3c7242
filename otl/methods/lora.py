"""LoRA: low-rank adapters beside frozen layers, through PEFT."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer as PeftLayer
from torch import Tensor, nn

from otl import rng
from otl.config import LoraFormat, SettingsError
from otl.formats import lora as lora_file
from otl.formats.modelspec import lora_metadata, with_hash
from otl.methods.parts import chosen_parts
from otl.methods.targets import layers, matching
from otl.types import LoraLayer, LoraState, ParamGroup, Size

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

ADAPTER = "default"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}  # relative error of a delta that rounding to the dtype explains


class Lora:
    """delta = alpha / rank * up @ down on each targeted layer (https://arxiv.org/abs/2106.09685).

    Args:
        rank: inner dimension.
        alpha: numerator of the strength.
        dropout: share of the adapter's inputs that are zeroed in training, 0..1.
        targets: a preset of the family (attn-mlp, attn-only, full) or patterns on layer names.
        parts: part -> {"lr": learning rate or None for the optimizer's}; None or absent: no adapter there.
    """

    whole_parts: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 16.0,
        dropout: float = 0.0,
        targets: str | list[str] = "attn-mlp",
        parts: dict[str, Any] | None = None,
    ) -> None:
        if rank < 1:
            raise SettingsError(f"method.rank={rank}: must be at least 1")
        if alpha <= 0:
            raise SettingsError(f"method.alpha={alpha}: must be above 0")
        if not 0 <= dropout < 1:
            raise SettingsError(f"method.dropout={dropout}: must be in 0..1, 1 excluded")
        self.rank, self.alpha, self.dropout, self.targets = rank, alpha, dropout, targets
        self.parts = chosen_parts(parts if parts is not None else {"denoiser": {}})

    def attach(self, module: DiffusionModule) -> list[ParamGroup]:
        """One group of fp32 parameters for each part."""
        groups = []
        for key, lr in self.parts.items():
            name = module.part_name(key)
            if name not in module.lora_targets:
                raise SettingsError(f"method.parts.{key}: {name} takes no adapter; {', '.join(module.lora_targets)} do")
            part = module.part(name)
            names = matching(layers(part), self.targets, module.lora_targets[name], part=name)
            self.inject(part, names, seed=rng.key(module.seed, "adapter", name))
            groups.append(ParamGroup(name, [p for p in part.parameters() if p.requires_grad], lr))
        return groups

    def inject(self, part: nn.Module, names: list[str], *, seed: int) -> None:
        """Adapters on the named layers, their start a function of the seed."""
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,
            lora_dropout=self.dropout,
            target_modules="|".join(re.escape(name) for name in names),
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, part, adapter_name=ADAPTER)
        for name, parameter in part.named_parameters():
            adapter = "lora_" in name
            parameter.requires_grad_(adapter)
            if adapter:
                parameter.data = parameter.data.float()  # beside frozen bf16: too coarse to train in

    def export(self, module: DiffusionModule, path: Path) -> Path:
        """Write `<path>.safetensors`, read it back and compare it with the live adapter.

        An adapter too small for the dtype (fp16 ends near 6e-8) is written in fp32 instead, with a warning.

        Raises:
            RuntimeError: the file does not hold what was trained.
        """
        path = path.with_name(path.name + ".safetensors")
        state = live_state(module)
        dtype = module.output_options.dtype
        difference = self.write(module, state, path, dtype=dtype)
        if dtype != "fp32" and not difference <= TOLERANCE[dtype]:
            log.warning(f"output.dtype={dtype} loses {difference:.1e} of this adapter: it is written in fp32 instead")
            dtype = "fp32"
            difference = self.write(module, state, path, dtype=dtype)
        if not difference <= TOLERANCE[dtype]:
            path.unlink()
            raise RuntimeError(f"{path}: differed from the trained adapter by {difference:.1e} of its size; removed")
        return path

    def write(self, module: DiffusionModule, state: LoraState, path: Path, *, dtype: str) -> float:
        """The file, and by how much what is read back differs from `state`, relative."""
        tensors = lora_file.cast(spelled(state, module), DTYPES[dtype])
        lora_file.write(path, tensors, metadata(module, state, name=path.stem))
        with_hash(path)
        written, _ = lora_file.read(path)
        return lora_file.compare(state, unspelled(written, state, module))


def live_state(module: DiffusionModule) -> LoraState:
    """The adapters of all parts as they are now, fp32 on the CPU."""
    return {
        name: {
            path: LoraLayer(
                layer.lora_A[ADAPTER].weight.detach().float().cpu(),
                layer.lora_B[ADAPTER].weight.detach().float().cpu(),
                float(layer.lora_alpha[ADAPTER]),
            )
            for path, layer in part.named_modules()
            if isinstance(layer, PeftLayer)
        }
        for name, part in module.trained.items()
    }


def spelled(state: LoraState, module: DiffusionModule) -> dict[str, Tensor]:
    """In the keys of the chosen format."""
    if module.output_options.format == LoraFormat.peft:
        return lora_file.to_peft(state)
    return lora_file.to_kohya(state, prefixes=module.kohya_prefixes, names=spellings(state, module))


def unspelled(tensors: dict[str, Tensor], state: LoraState, module: DiffusionModule) -> LoraState:
    """The inverse of `spelled`; `state` says which layers there are."""
    if module.output_options.format == LoraFormat.peft:
        return lora_file.from_peft(tensors, modules=state)
    return lora_file.from_kohya(tensors, prefixes=module.kohya_prefixes, names=spellings(state, module))


def spellings(state: LoraState, module: DiffusionModule) -> dict[str, dict[str, str]]:
    """part -> path of an adapted layer -> its path in a kohya file."""
    return {
        part: lora_file.text_names(layers) if part in module.text_encoders else module.denoiser_names(list(layers))
        for part, layers in state.items()
    }


def metadata(module: DiffusionModule, state: LoraState, *, name: str) -> dict[str, str]:
    """The header that tools read."""
    options = module.output_options
    return lora_metadata(
        state,
        architecture=module.architecture,
        base_model_version=module.base_model_version,
        title=options.title or name,
        name=name,
        resolution=Size(module.data_resolution, module.data_resolution),
        implementation=module.implementation if options.format == LoraFormat.kohya else "diffusers",
        prediction=getattr(module.noise_schedule, "prediction", "epsilon"),
        trigger=options.trigger,
    )
