"""Tiny random pipelines of the real classes, saved as diffusers folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PixArtAlphaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from otl.formats.tokenizer import clip_merges, write_clip_tokenizer

CLIP, FEW = 48894, 500  # merges of CLIP's vocabulary; so many of them load five times faster
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}


def vae(levels: int = 2) -> AutoencoderKL:
    """4 channels; each level but one halves the sides."""
    return AutoencoderKL(
        block_out_channels=(32,) * levels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        latent_channels=4,
        layers_per_block=1,
        sample_size=32,
        scaling_factor=0.18215,
    )


def clip(width: int, *, projection: int = 32, act: str = "quick_gelu", words: int = FEW) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=2 * 256 + words + 2,  # bytes, bytes that end a word, merges, start and end
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=2,
        num_hidden_layers=3,
        projection_dim=projection,
        hidden_act=act,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )


def tokenizer(folder: Path, pad: str, words: int = FEW) -> CLIPTokenizer:
    """CLIP's with its first so many merges."""
    write_clip_tokenizer(folder, pad_token=pad, merges="\n".join(clip_merges().splitlines()[: words + 1]) + "\n")
    return CLIPTokenizer.from_pretrained(folder)


def sd15(
    folder: Path,
    *,
    seed: int = 0,
    in_channels: int = 4,
    pad: str = "<|endoftext|>",
    act: str = "quick_gelu",
    linear: bool = False,
    words: int = FEW,
    **scheduler: Any,
) -> Path:
    """A two-level UNet of the SD1.5 kind with its VAE, text encoder, tokenizer and scheduler."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        in_channels=in_channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        use_linear_projection=linear,
        upcast_attention=linear,
        sample_size=16,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip(32, act=act, words=words)),
        tokenizer=tokenizer(folder / "tokenizer", pad, words),
        unet=unet,
        scheduler=DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, **scheduler),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def sd2(folder: Path, *, seed: int = 0, words: int = FEW) -> Path:
    """What SD 2.1 at 768 pixels has otherwise: linear projections, upcast attention, gelu, "!" as padding, v."""
    return sd15(folder, seed=seed, pad="!", act="gelu", linear=True, words=words, prediction_type="v_prediction")


def sdxl(folder: Path, *, seed: int = 0, in_channels: int = 4, words: int = FEW) -> Path:
    """A two-level UNet of the SDXL kind with both text encoders."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        in_channels=in_channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        cross_attention_dim=32 + 48,
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        sample_size=16,
    )
    pipeline = StableDiffusionXLPipeline(
        vae=vae(levels=4),  # the published factor of 8: sides of buckets are multiples of 64
        text_encoder=CLIPTextModel(clip(32, words=words)),
        text_encoder_2=CLIPTextModelWithProjection(clip(48, act="gelu", words=words)),
        tokenizer=tokenizer(folder / "tokenizer", "<|endoftext|>", words),
        tokenizer_2=tokenizer(folder / "tokenizer_2", "!", words),
        unet=unet,
        scheduler=EulerDiscreteScheduler(**BETAS, timestep_spacing="leading", steps_offset=1),
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def t5_tokenizer() -> T5Tokenizer:
    """One token for each printable letter, with the space that begins a word and without."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["▁", *letters, *(f"▁{letter}" for letter in letters)]
    specials = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5Tokenizer(vocab=[*specials, *((piece, -float(len(piece))) for piece in pieces)], extra_ids=10)


def pixart_alpha(folder: Path, *, seed: int = 0, sample_size: int = 128) -> Path:
    """Two transformer blocks of the PixArt kind with their VAE and T5; 128 is the one that is told sizes."""
    torch.manual_seed(seed)
    transformer = PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=12,  # a third of the width is that of the embedded sizes
        in_channels=4,
        out_channels=8,
        num_layers=2,
        cross_attention_dim=24,
        sample_size=sample_size,
        caption_channels=32,
    )
    words = t5_tokenizer()
    text = T5Config(
        vocab_size=len(words),
        d_model=32,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    pipeline = PixArtAlphaPipeline(
        tokenizer=words,
        text_encoder=T5EncoderModel(text),
        vae=vae(),
        transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(),
    )
    pipeline.save_pretrained(folder)
    return folder


BUILDERS = {"sd15": sd15, "sd2": sd2, "sdxl": sdxl, "pixart_alpha": pixart_alpha}
