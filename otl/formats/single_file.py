"""Whole models in one file, under the names of the original code: what ComfyUI, A1111 and Forge read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from otl.formats.files import destination, whole, write
from otl.formats.original import sgm_unet_names

VAE_OUTSIDE = {"quant_conv", "post_quant_conv"}
VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
    "query": "q",
    "key": "k",
    "value": "v",
    "proj_attn": "proj_out",
}
OPEN_CLIP_LAYER = {
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
OPEN_CLIP_OUTSIDE = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
State = dict[str, Tensor]


def unet(config: dict[str, Any], state: State) -> State:
    """A diffusers UNet's weights as `model.diffusion_model.*`."""
    modules = {name.rpartition(".")[0] for name in state}
    names = sgm_unet_names(config, modules)
    return {
        f"model.diffusion_model.{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": tensor
        for name, tensor in state.items()
    }


def vae(config: dict[str, Any], state: State) -> State:
    """A diffusers AutoencoderKL's weights as `first_stage_model.*`; the attention's matrices become 1 x 1 convolutions.

    Raises:
        ValueError: a weight has no counterpart in the original.
    """
    levels = len(config["block_out_channels"])
    return {
        f"first_stage_model.{vae_name(name, levels)}": tensor[..., None, None]
        if ".attentions." in name and tensor.dim() == 2
        else tensor
        for name, tensor in state.items()
    }


def vae_name(name: str, levels: int) -> str:
    """One weight's name; the up blocks are counted from the other end."""
    module, _, kind = name.rpartition(".")
    side, _, inner = module.partition(".")
    if module in VAE_OUTSIDE:
        return name
    if found := re.fullmatch(r"mid_block\.resnets\.(\d)\.(\w+)", inner):
        return f"{side}.mid.block_{int(found[1]) + 1}.{VAE_RESNET.get(found[2], found[2])}.{kind}"
    if found := re.fullmatch(r"mid_block\.attentions\.0\.(.+)", inner):
        return f"{side}.mid.attn_1.{VAE_ATTENTION[found[1]]}.{kind}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", inner):
        level = int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])
        return f"{side}.{found[1]}.{level}.block.{found[3]}.{VAE_RESNET.get(found[4], found[4])}.{kind}"
    if found := re.fullmatch(r"(down|up)_blocks\.(\d+)\.(down|up)samplers\.0\.conv", inner):
        level = int(found[2]) if found[1] == "down" else levels - 1 - int(found[2])
        return f"{side}.{found[1]}.{level}.{found[3]}sample.conv.{kind}"
    if inner in {"conv_in", "conv_out", "conv_norm_out"}:
        return f"{side}.{inner.replace('conv_norm_out', 'norm_out')}.{kind}"
    raise ValueError(f"no place in the original VAE for {name}")


def clip(prefix: str, state: State) -> State:
    """A CLIP text encoder's weights as transformers 4 named them, below `prefix`."""
    return {f"{prefix}.text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()}


def open_clip(prefix: str, state: State) -> State:
    """A CLIP text encoder's weights as OpenCLIP names them, below `prefix`: q, k and v of a layer are one matrix, and
    the projection is transposed."""
    own = {name.removeprefix("text_model."): tensor for name, tensor in state.items()}
    return {f"{prefix}.{name}": tensor for name, tensor in open_clip_pairs(own)}


def open_clip_pairs(state: State) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state.items():
        if name == "text_projection.weight":
            yield "text_projection", tensor.T
        elif not (layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)):
            yield OPEN_CLIP_OUTSIDE[name], tensor
        elif layer[2] == "self_attn.q_proj":
            joined = torch.cat([state[name.replace("q_proj", f"{one}_proj")] for one in "qkv"])
            yield f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}", joined
        elif layer[2] not in {"self_attn.k_proj", "self_attn.v_proj"}:
            yield f"transformer.resblocks.{layer[1]}.{OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}", tensor


def marks(*, prediction: str, zero_terminal_snr: bool) -> State:
    """Empty tensors by which ComfyUI knows an SDXL that does not predict epsilon."""
    found = {"v_pred": torch.zeros(0)} if prediction == "v_prediction" else {}
    return found | ({"ztsnr": torch.zeros(0)} if found and zero_terminal_snr else {})


def save(tensors: State, path: Path, metadata: dict[str, str], *, dtype: torch.dtype) -> Path:
    """Write the file, read every tensor back and compare, and only then put it in place.

    Raises:
        SettingsError: a weight is NaN or infinite in that dtype.
        RuntimeError: what is read back is not what was written.
    """
    cast = {name: tensor.detach().to("cpu", dtype) for name, tensor in tensors.items()}
    with whole(path) as aside:
        write(aside, cast, metadata)
        with safe_open(aside, "pt") as file:
            names = set(file.keys())
            if names != cast.keys() or any(not torch.equal(file.get_tensor(name), cast[name]) for name in names):
                raise RuntimeError(
                    f"{destination(path)}: what was read back is not what was written; is the disk full or failing?"
                )
    return path
