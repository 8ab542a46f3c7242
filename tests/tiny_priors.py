"""Tiny random checkpoints of Wuerstchen and Stable Cascade: a prior, with `effnet` and `decoders` in its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMWuerstchenScheduler, StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from otl.modules.efficientnet import EfficientNetEncoder
from otl.modules.stable_cascade import StableCascade
from otl.modules.wuerstchen import Wuerstchen
from tests.tiny import FEW, clip, tokenizer

STAGES = ((1, 1, 8, 1), (2, 2, 8, 2), (2, 2, 8, 1), (2, 2, 8, 2), (2, 1, 8, 1), (2, 2, 8, 1))


def wuerstchen(folder: Path, *, seed: int = 0, words: int = FEW) -> Path:
    """Two blocks, a text encoder, and decoders with a text encoder of their own."""
    torch.manual_seed(seed)
    prior = WuerstchenPrior(c=32, c_cond=32, c_r=8, depth=2, nhead=2)
    for parameter in prior.out[1].parameters():
        parameter.data *= 0.2  # it divides by 1 minus a half of its output, which a trained one keeps from 1
    decoder = WuerstchenDiffNeXt(
        c_r=8,
        c_cond=32,
        c_hidden=[32, 32],
        nhead=[-1, 2],
        blocks=[1, 1],
        level_config=["CT", "CTA"],
        inject_effnet=[False, True],
        clip_embd=32,
    )
    text, other = (CLIPTextModel(clip(32, act="gelu", words=words)) for _ in range(2))
    save(folder, words, prior=prior, text_encoder=text, effnet=encoder(affine=True))
    save(folder / "decoders", words, decoder=decoder, text_encoder=other, vqgan=vqgan())
    return folder


def stable_cascade(folder: Path, *, seed: int = 0, width: int = 32, words: int = FEW) -> Path:
    """Two levels of two blocks each way, a text encoder with projection, and decoders.

    Args:
        width: channels of the prior.
    """
    torch.manual_seed(seed)
    prior = stage(
        conditioning_dim=32,
        block_out_channels=(width, width),
        num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 2),
        up_num_layers_per_block=(2, 1),
        block_types_per_layer=2 * [["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"]],
        clip_text_in_channels=32,
        clip_text_pooled_in_channels=32,
        clip_image_in_channels=24,
        switch_level=[False],
        timestep_conditioning_type=("sca", "crp"),
    )
    decoder = stage(
        in_channels=4,
        out_channels=4,
        patch_size=2,
        conditioning_dim=32,
        block_out_channels=(32, 32),
        num_attention_heads=(0, 2),
        down_num_layers_per_block=(1, 1),
        up_num_layers_per_block=(1, 1),
        block_types_per_layer=[
            ["SDCascadeResBlock", "SDCascadeTimestepBlock"],
            ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock"],
        ],
        clip_text_pooled_in_channels=32,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        timestep_conditioning_type=("sca",),
    )
    text = CLIPTextModelWithProjection(clip(32, act="gelu", words=words))
    save(folder, words, prior=prior, text_encoder=text, effnet=encoder(affine=False))
    save(folder / "decoders", words, decoder=decoder, vqgan=vqgan())
    return folder


def stage(**config: Any) -> StableCascadeUNet:
    return StableCascadeUNet(timestep_ratio_embedding_dim=8, **config)


def encoder(*, affine: bool) -> EfficientNetEncoder:
    """EfficientNet's kinds of blocks in small, its statistics as after training."""
    made = EfficientNetEncoder(affine=affine, stages=STAGES, head=16)
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.2, 0.5)
    return made


def vqgan() -> PaellaVQModel:
    """Factor 4, 4 channels."""
    return PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=8)


def save(folder: Path, words: int, **parts: nn.Module) -> None:
    """Each part in its folder, beside tokenizer and scheduler."""
    for name, part in parts.items():
        part.save_pretrained(folder / name)
    DDPMWuerstchenScheduler().save_pretrained(folder / "scheduler")
    tokenizer(folder / "tokenizer", "<|endoftext|>", words)


def options(folder: Path) -> dict[str, str]:
    """Where the other networks lie."""
    return {"effnet": str(folder / "effnet"), "decoder": str(folder / "decoders")}


FAMILIES = {"wuerstchen": (Wuerstchen, wuerstchen), "stable_cascade": (StableCascade, stable_cascade)}
