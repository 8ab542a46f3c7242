"""Whole models in one file, under the names of the original code: what ComfyUI, A1111 and Forge read."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from otl.formats.original import sgm_unet_names
from otl.formats.stored import Stored, renamed

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
Weights = Mapping[str, Tensor]


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


def clip(prefix: str, state: Weights) -> Stored:
    """A CLIP text encoder's weights as transformers 4 named them, below `prefix`."""
    return renamed(state, {f"{prefix}.text_model.{name.removeprefix('text_model.')}": name for name in state})


def clip_of(prefix: str, file: Weights) -> Stored:
    """The inverse, of a file with more."""
    return below(prefix, file)


def below(prefix: str, file: Weights) -> Stored:
    """What begins with `prefix` and a dot, without them."""
    return renamed(file, {key.removeprefix(f"{prefix}."): key for key in file if key.startswith(f"{prefix}.")})


def open_clip(prefix: str, state: Weights) -> Stored:
    """A CLIP text encoder's weights as OpenCLIP names them, below `prefix`: q, k and v of a layer are one matrix, and
    the projection is transposed."""
    own = renamed(state, {name.removeprefix("text_model."): name for name in state})
    return Stored({f"{prefix}.{name}": read for name, read in open_clip_reads(own)})


def open_clip_reads(state: Weights) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    for name in state:
        if name == "text_projection.weight":
            yield "text_projection", partial(transposed, state, name)
        elif not (layer := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)):
            yield OPEN_CLIP_OUTSIDE[name], partial(state.__getitem__, name)
        elif layer[2] == "self_attn.q_proj":
            names = [name.replace("q_proj", f"{one}_proj") for one in "qkv"]
            yield f"transformer.resblocks.{layer[1]}.attn.in_proj_{layer[3]}", partial(joined, state, names)
        elif layer[2] not in {"self_attn.k_proj", "self_attn.v_proj"}:
            spelled = f"transformer.resblocks.{layer[1]}.{OPEN_CLIP_LAYER[layer[2]]}.{layer[3]}"
            yield spelled, partial(state.__getitem__, name)


def open_clip_of(prefix: str, file: Weights) -> Stored:
    """The inverse, of a file with more."""
    return Stored(dict(clip_reads(below(prefix, file))))


def clip_reads(state: Weights) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    layers = {theirs: ours for ours, theirs in OPEN_CLIP_LAYER.items()}
    outside = {theirs: ours for ours, theirs in OPEN_CLIP_OUTSIDE.items()}
    for name in state:
        layer = re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+?)[._](weight|bias)", name)
        if name == "text_projection":
            yield "text_projection.weight", partial(transposed, state, name)
        elif layer and layer[2] == "attn.in_proj":
            for place, one in enumerate("qkv"):
                spelled = f"encoder.layers.{layer[1]}.self_attn.{one}_proj.{layer[3]}"
                yield spelled, partial(third, state, name, place)
        elif layer and layer[2] in layers:
            yield f"encoder.layers.{layer[1]}.{layers[layer[2]]}.{layer[3]}", partial(state.__getitem__, name)
        elif name in outside:
            yield outside[name], partial(state.__getitem__, name)


def transposed(state: Weights, name: str) -> Tensor:
    return state[name].T


def joined(state: Weights, names: list[str]) -> Tensor:
    return torch.cat([state[name] for name in names])


def third(state: Weights, name: str, place: int) -> Tensor:
    return state[name].chunk(3)[place]


class TextLayout(NamedTuple):
    """How files spell a text encoder, and back."""

    spelled: Callable[[str, Weights], Stored]
    read: Callable[[str, Weights], Stored]


CLIP = TextLayout(clip, clip_of)
OPEN_CLIP = TextLayout(open_clip, open_clip_of)


def marks(*, prediction: str, zero_terminal_snr: bool) -> State:
    """Empty tensors by which ComfyUI knows an SDXL that does not predict epsilon."""
    found = {"v_pred": torch.zeros(0)} if prediction == "v_prediction" else {}
    return found | ({"ztsnr": torch.zeros(0)} if found and zero_terminal_snr else {})
