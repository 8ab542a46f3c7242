"""Networks of the shipped configs on the meta device, and tiny random pipelines of the real classes."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from otl.config import assets_dir
from otl.formats.original import config_folder

CLASSES = {
    "unet": UNet2DConditionModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModelWithProjection,
}
TINY_UNET = {
    "block_out_channels": [32, 64],
    "layers_per_block": 2,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
}
TINY_SD15 = TINY_UNET | {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
TINY_SDXL = TINY_UNET | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "use_linear_projection": True,
    "cross_attention_dim": 64,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 32,
}


def tiny_text_encoder(text_class: type) -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
    return text_class(CLIPTextConfig(vocab_size=49408, projection_dim=32, **sizes)).eval()


def tiny_vae() -> AutoencoderKL:
    return AutoencoderKL(block_out_channels=[32], latent_channels=4).eval()


@pytest.fixture(autouse=True)
def one_thread():
    """Threads that wait for each other make tiny networks slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    """The complete config folder of a family."""
    return {family: config_folder(family, tmp_path_factory.mktemp(family)) for family in ("sd15", "sdxl")}


@pytest.fixture(scope="session")
def meta():
    """All networks of a family, full size, without weights."""

    def build(family: str) -> SimpleNamespace:
        folder = assets_dir() / "configs" / family
        with torch.device("meta"):
            return SimpleNamespace(**{path.parent.name: meta_part(path) for path in folder.glob("*/config.json")})

    def meta_part(path: Path) -> nn.Module:
        settings, part_class = json.loads(path.read_text()), CLASSES[path.parent.name]
        if hasattr(part_class, "config_class"):
            return part_class(part_class.config_class(**settings))
        return part_class.from_config(settings)

    return {family: build(family) for family in ("sd15", "sdxl")}


@pytest.fixture
def tiny(config):
    """A fresh tiny pipeline; the same weights every time."""

    def build(family: str) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
        torch.manual_seed(0)
        parts = {
            "vae": tiny_vae(),
            "text_encoder": tiny_text_encoder(CLIPTextModel),
            "tokenizer": CLIPTokenizer.from_pretrained(config[family], subfolder="tokenizer"),
        }
        if family == "sd15":
            unet = UNet2DConditionModel(**TINY_SD15).eval()
            scheduler = PNDMScheduler.from_pretrained(config[family], subfolder="scheduler")
            extra = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            return StableDiffusionPipeline(unet=unet, scheduler=scheduler, **parts, **extra)
        second = {
            "text_encoder_2": tiny_text_encoder(CLIPTextModelWithProjection),
            "tokenizer_2": CLIPTokenizer.from_pretrained(config[family], subfolder="tokenizer_2"),
        }
        scheduler = EulerDiscreteScheduler.from_pretrained(config[family], subfolder="scheduler")
        unet = UNet2DConditionModel(**TINY_SDXL).eval()
        return StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, **parts, **second)

    return build
