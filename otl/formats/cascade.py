"""Stable Cascade's names outside of diffusers: files of stage C, and LoRA files as ComfyUI reads them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from otl.formats.stored import Stored, in_file, opened, renamed, together

ATTENTION = {"to_q": "attn.to_q", "to_k": "attn.to_k", "to_v": "attn.to_v", "to_out.0": "attn.out_proj"}
IN_ORIGINAL = {"to_q": "in_proj_0", "to_k": "in_proj_1", "to_v": "in_proj_2", "to_out.0": "out_proj"}  # OneTrainer's
KNOWN_BY = "clip_txt_mapper.weight"  # stage C has it, stage B has not
PRIOR_PREFIX = "model.diffusion_model."  # in a file with the text encoder
TEXT_PREFIX = "text_encoder.clip_g.transformer."
PROJECTION = "text_encoder.clip_g.text_projection"  # some files have it so, transposed
OUT = ".attention.to_out.0."
QKV = re.compile(r"(.*\.attention)\.to_([qkv])\.(weight|bias)")
IN_PROJ = re.compile(r"(.*\.attention)\.attn\.in_proj_(weight|bias)")


def lora_name(path: str) -> str:
    """Path of a layer in diffusers' prior -> its path in a LoRA file: one more level below `attention`."""
    block, found, layer = path.rpartition(".attention.")
    return f"{block}.attention.{ATTENTION[layer]}" if found else path


def original_names(paths: list[str]) -> dict[str, list[str]]:
    """Paths as the original code has them, the thirds of its query, key and value counted -> paths in a prior of
    diffusers'; others are the same in both."""
    parted = {path: path.rpartition(".attention.") for path in paths}
    return {
        f"{block}.attention.attn.{IN_ORIGINAL[layer]}": [path]
        for path, (block, found, layer) in parted.items()
        if found
    }


def prior_to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names -> Stability's: query, key and value lie in one tensor."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in state.items():
        found = QKV.fullmatch(name)
        if found is None:
            tensors[name.replace(OUT, ".attention.attn.out_proj.")] = tensor
        elif found[2] == "q":
            together = [state[f"{found[1]}.to_{letter}.{found[3]}"] for letter in "qkv"]
            tensors[f"{found[1]}.attn.in_proj_{found[3]}"] = torch.cat(together)
    return tensors


def prior_from_original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse; names that are diffusers' already stay."""
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        found = IN_PROJ.fullmatch(name)
        if found is None:
            state[name.replace(".attention.attn.out_proj.", OUT)] = tensor
        else:
            for letter, third in zip("qkv", tensor.chunk(3)):
                state[f"{found[1]}.to_{letter}.{found[2]}"] = third.contiguous()
    return state


def read_prior(path: Path) -> dict[str, Tensor]:
    """The prior of a stage C file, under diffusers' names; empty where the file is another."""
    with opened(path) as file:
        names = set(file.keys())
        prefix = PRIOR_PREFIX if PRIOR_PREFIX + KNOWN_BY in names else ""
        if prefix + KNOWN_BY not in names:
            return {}
        return prior_from_original(
            {name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)}
        )


def read_text(path: Path) -> dict[str, Tensor]:
    """The text encoder of a stage C file, under the names of transformers; empty where it has none."""
    return dict(stored_text(path))


def stored_text(path: Path) -> Stored:
    """The same, on the disk."""
    file = in_file(path)
    state = renamed(file, {name.removeprefix(TEXT_PREFIX): name for name in file if name.startswith(TEXT_PREFIX)})
    if PROJECTION not in file:
        return state
    return together(state, Stored({"text_projection.weight": partial(projection, file)}))


def projection(file: Mapping[str, Tensor]) -> Tensor:
    return file[PROJECTION].T.contiguous()


def joined(prior: dict[str, Tensor], text: Mapping[str, Tensor]) -> Stored:
    """One file with both, as ComfyUI reads it."""
    original = {f"{PRIOR_PREFIX}{name}": tensor for name, tensor in prior_to_original(prior).items()}
    return together(original, renamed(text, {f"{TEXT_PREFIX}{name}": name for name in text}))
