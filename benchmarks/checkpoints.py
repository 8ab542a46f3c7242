"""Random weights in the real architectures, narrow or at full width, saved as diffusers folders."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from otl.config import assets_dir
from otl.formats.tokenizer import write_clip_tokenizer
from otl.modules import loading

PAD = {"tokenizer": "<|endoftext|>", "tokenizer_2": "!"}
NARROW_VAE = {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}


@dataclass(frozen=True)
class Size:
    """One family at one size.

    Args:
        resolution: pixels per side of the training images.
        unet: what differs from the real UNet's config.
        text_widths: of each text encoder; both have one layer, because their output is cached.
    """

    resolution: int
    unet: dict[str, Any]
    text_widths: tuple[int, ...]


SIZES: dict[str, dict[str, Size]] = {
    "tiny": {
        "sd15": Size(128, {"block_out_channels": (32, 32, 32, 32), "layers_per_block": 1}, (32,)),
        "sdxl": Size(
            128,
            {
                "block_out_channels": (32, 32, 64),
                "layers_per_block": 1,
                "transformer_layers_per_block": (1, 1, 1),
                "attention_head_dim": (1, 1, 2),
            },
            (32, 32),
        ),
    },
    "small": {  # the real layers, a tenth to a fifth as wide
        "sd15": Size(128, {"block_out_channels": (32, 64, 128, 128), "layers_per_block": 1}, (128,)),
        "sdxl": Size(
            256,
            {
                "block_out_channels": (32, 64, 128),
                "layers_per_block": 1,
                "transformer_layers_per_block": (1, 1, 2),
                "attention_head_dim": (1, 2, 4),
            },
            (64, 128),
        ),
    },
    "full": {"sd15": Size(512, {}, (768,)), "sdxl": Size(1024, {}, (768, 1280))},
}


def write(folder: Path, family: str, size: str, *, device: str = "cpu") -> Path:
    """A pipeline that `model.checkpoint` takes; made once.

    Args:
        device: where the random weights are drawn.
    """
    if (folder / "model_index.json").is_file():
        return folder
    loading.quiet()
    torch.manual_seed(0)
    chosen = SIZES[size][family]
    with torch.device(device):
        unet = diffusers.UNet2DConditionModel.from_config(unet_config(family, chosen))
        vae = diffusers.AutoencoderKL.from_config(config(family, "vae") | NARROW_VAE)
    encoders = text_encoders(family, chosen.text_widths)
    tokenizers = {name: tokenizer(folder / name) for name in list(PAD)[: len(encoders)]}
    common = {"unet": unet, "vae": vae, "scheduler": scheduler(family), **encoders, **tokenizers}
    if family == "sd15":
        absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = diffusers.StableDiffusionPipeline(**common, **absent)
    else:
        pipeline = diffusers.StableDiffusionXLPipeline(**common, add_watermarker=False)
    for part in (unet, vae, *encoders.values()):
        part.to("cpu", torch.bfloat16 if size == "full" else torch.float32)
    if device == "cuda":
        torch.cuda.empty_cache()  # this process would keep it from the one that is measured
    pipeline.save_pretrained(folder)
    return folder


def config(family: str, part: str) -> dict[str, Any]:
    """The real config of a part, as it ships with OTL."""
    name = f"{part}_config.json" if part == "scheduler" else "config.json"
    return json.loads((assets_dir() / "configs" / family / part / name).read_text())


def unet_config(family: str, size: Size) -> dict[str, Any]:
    changed = config(family, "unet") | size.unet | {"cross_attention_dim": sum(size.text_widths)}
    if "addition_time_embed_dim" in changed:
        numbers = 6 * changed["addition_time_embed_dim"]  # height and width of file, crop and bucket
        changed["projection_class_embeddings_input_dim"] = numbers + size.text_widths[-1]
    return changed


def text_encoders(family: str, widths: tuple[int, ...]) -> dict[str, Any]:
    """Part -> text encoder of one layer."""
    classes = (CLIPTextModel, CLIPTextModelWithProjection)
    names = ("text_encoder", "text_encoder_2")[: len(widths)]
    return {
        name: kind(CLIPTextConfig(**config(family, name) | narrow_text(width)))
        for name, kind, width in zip(names, classes, widths)
    }


def narrow_text(width: int) -> dict[str, int]:
    heads = max(1, width // 64)
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_attention_heads": heads,
        "num_hidden_layers": 1,
        "projection_dim": width,
    }


def tokenizer(folder: Path) -> CLIPTokenizer:
    write_clip_tokenizer(folder, pad_token=PAD[folder.name])
    return CLIPTokenizer.from_pretrained(folder)


def scheduler(family: str) -> Any:
    settings = config(family, "scheduler")
    return getattr(diffusers, settings["_class_name"]).from_config(settings)
