"""The spelling of the original checkpoints (sgm, ldm), and the config folders with which diffusers reads them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from otl.config import assets_dir
from otl.formats.files import listed
from otl.formats.tokenizer import write_clip_tokenizer

OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE_BLOCK = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
IN_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def layers_of_blocks(config: dict[str, Any]) -> list[int]:
    """Resnets in each down block."""
    layers = config["layers_per_block"]
    return [layers] * len(config["down_block_types"]) if isinstance(layers, int) else list(layers)


def spell(name: str, blocks: dict[str, str]) -> str:
    """The original path of one module, or "" where it has none."""
    head = next((head for head in blocks if f"{name}.".startswith(f"{head}.")), None)
    if head is None:
        return ""
    inner = name[len(head) + 1 :]
    if ".resnets." in head and inner:
        inner = IN_RESNET.get(inner, "")
        return f"{blocks[head]}.{inner}" if inner else ""
    return f"{blocks[head]}.{inner}".rstrip(".")


def down_names(config: dict[str, Any]) -> dict[str, str]:
    """Resnets, attentions and downsamplers of the down blocks -> input_blocks.<number>.<position>."""
    names: dict[str, str] = {}
    kinds = config["down_block_types"]
    number = 1  # 0 is conv_in
    for block, layers in enumerate(layers_of_blocks(config)):
        for layer in range(layers):
            names[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{number}.0"
            names[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block < len(kinds) - 1:
            names[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    return names


def up_names(config: dict[str, Any]) -> dict[str, str]:
    """Resnets, attentions and upsamplers of the up blocks -> output_blocks.<number>.<position>."""
    names: dict[str, str] = {}
    kinds = config["up_block_types"]
    number = 0
    for block, layers in enumerate(reversed(layers_of_blocks(config))):
        for layer in range(layers + 1):
            names[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{number}.0"
            names[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        if block < len(kinds) - 1:  # In the last group of its block, behind the attention where there is one.
            position = 2 if "CrossAttn" in kinds[block] else 1
            names[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{number - 1}.{position}.conv"
    return names


def sgm_unet_names(config: dict[str, Any], module_names: Iterable[str]) -> dict[str, str]:
    """Module path in a diffusers UNet -> its path in the original UNet.

    Args:
        config: of the UNet: block types and `layers_per_block` are read.
        module_names: paths of modules that hold weights.

    Raises:
        ValueError: a module has no counterpart in the original.
    """
    blocks = {**OUTSIDE_BLOCKS, **down_names(config), **MIDDLE_BLOCK, **up_names(config)}
    names = {name: spell(name, blocks) for name in module_names}
    if unknown := [name for name, spelled in names.items() if not spelled]:
        raise ValueError(f"no place in the original UNet for {listed(unknown)}")
    return names


def config_folder(family: str, target: Path) -> Path:
    """Write the diffusers folder of a family without its weights, tokenizers included, so that `from_single_file`
    needs no network.

    Args:
        family: a folder of otl/assets/configs.
        target: becomes that folder; made where it is absent.
    """
    shutil.copytree(assets_dir() / "configs" / family, target, dirs_exist_ok=True)
    for settings in sorted(target.glob("tokenizer*/tokenizer_config.json")):
        tokenizer = json.loads(settings.read_text())
        write_clip_tokenizer(
            settings.parent, pad_token=tokenizer["pad_token"], max_length=tokenizer["model_max_length"]
        )
    return target
