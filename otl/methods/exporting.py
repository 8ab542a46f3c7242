"""The file of a trained adapter, written, read back and compared."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otl.config import LoraFormat
from otl.formats import embedding
from otl.formats import lora as lora_file
from otl.formats.deltas import compare
from otl.formats.files import whole
from otl.formats.modelspec import lora_metadata, with_hash
from otl.methods.injected import base_weight
from otl.types import AdapterState, Size

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-5, "fp16": 4e-3, "bf16": 3e-2}  # relative error of a delta that rounding to the dtype explains


def export(
    module: DiffusionModule, state: AdapterState, path: Path, header: dict[str, str], bundled: dict[str, Tensor]
) -> Path:
    """Write `<path>.safetensors`, read it back and compare it with the live adapter.

    Args:
        state: the live adapter, as it is to be written.
        bundled: the tensors of embeddings that the file carries along.

    An adapter too small for the dtype (fp16 ends near 6e-8) is written in fp32 instead, with a warning.

    Raises:
        RuntimeError: the file does not hold what was trained.
    """
    path = path.with_name(path.name + ".safetensors")
    dtype = module.output_options.dtype
    with whole(path) as aside:
        difference = write(module, state, aside, header, bundled, dtype=dtype)
        if dtype != "fp32" and not difference <= TOLERANCE[dtype]:
            log.warning(f"output.dtype={dtype} loses {difference:.1e} of this adapter: it is written in fp32 instead")
            dtype = "fp32"
            difference = write(module, state, aside, header, bundled, dtype=dtype)
        if not difference <= TOLERANCE[dtype]:
            raise RuntimeError(f"{path}: differed from the trained adapter by {difference:.1e} of its size; removed")
    return path


def write(
    module: DiffusionModule,
    state: AdapterState,
    path: Path,
    header: dict[str, str],
    bundled: dict[str, Tensor],
    *,
    dtype: str,
) -> float:
    """The file, and by how much what is read back differs from `state` or `bundled`, relative."""
    lora_file.write(path, lora_file.cast(spelled(state, module) | bundled, DTYPES[dtype]), header)
    with_hash(path)
    written, _ = lora_file.read(path)
    carried = {key: written.pop(key) for key in embedding.bundle_keys(written)}
    difference = compare(state, unspelled(written, state, module), lambda part, name: base_weight(module, part, name))
    return max(difference, embedding.compare(bundled, carried))


def metadata(
    module: DiffusionModule, state: AdapterState, *, name: str, network: str, arguments: dict[str, str]
) -> dict[str, str]:
    """The header that tools read; the arguments are those of `lora_metadata`."""
    options = module.output_options
    return lora_metadata(
        state,
        network=network,
        arguments=arguments,
        architecture=module.architecture,
        base_model_version=module.base_model_version,
        title=options.title or name,
        name=name,
        resolution=Size(module.data_resolution, module.data_resolution),
        implementation=module.implementation if options.format == LoraFormat.kohya else "diffusers",
        prediction=getattr(module.noise_schedule, "prediction", "epsilon"),
        trigger=options.trigger,
    )


def spelled(state: AdapterState, module: DiffusionModule) -> dict[str, Tensor]:
    """In the keys of the chosen format."""
    if module.output_options.format == LoraFormat.peft:
        return lora_file.to_peft(state)
    return lora_file.to_kohya(state, prefixes=module.kohya_prefixes, names=spellings(state, module))


def unspelled(tensors: dict[str, Tensor], state: AdapterState, module: DiffusionModule) -> AdapterState:
    """The inverse of `spelled`; `state` says which layers there are."""
    if module.output_options.format == LoraFormat.peft:
        return lora_file.from_peft(tensors, modules=state)
    found = lora_file.from_kohya(tensors, prefixes=module.kohya_prefixes, names=spellings(state, module))
    return lora_file.with_frozen_lengths(found, state)


def spellings(state: AdapterState, module: DiffusionModule) -> dict[str, dict[str, str]]:
    """part -> path of an adapted layer -> its path in a kohya file."""
    return {
        part: lora_file.text_names(layers) if part in module.text_encoders else module.denoiser_names(list(layers))
        for part, layers in state.items()
    }
