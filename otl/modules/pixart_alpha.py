"""PixArt Alpha at 1024, 512 and 256 pixels."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, PixArtAlphaPipeline, PixArtTransformer2DModel
from torch import Tensor, nn
from transformers import T5EncoderModel
from transformers.models.t5.modeling_t5 import T5Attention

from otl import variational
from otl.config import SettingsError
from otl.formats import pixart
from otl.modules.base import DiffusionModule
from otl.modules.stable_diffusion import decode_vae, encode_vae
from otl.noise import Discrete
from otl.types import Batch, Cond, Noise

MAX_TOKENS = 120  # section 3.1 of the paper; the last one ends the prompt, and none begins it
TRANSFORMER_TARGETS = {
    "attn-mlp": [r"attn1\.", r"attn2\.", r"ff\.net"],
    "attn-only": [r"attn1\.", r"attn2\."],
    "blocks": [r"transformer_blocks\."],
    "full": [r""],
}
T5_TARGETS = {
    "attn-mlp": [r"SelfAttention", r"DenseReluDense"],
    "attn-only": [r"SelfAttention"],
    "blocks": [r"block\."],
    "full": [r""],
}


class PixArtAlpha(DiffusionModule):
    """A transformer over 4-channel latents at an eighth of the size, led by T5-XXL (https://arxiv.org/abs/2310.00426).

    It predicts the noise and the variance of the step back: 8 channels. The loss is that of the original training code
    (https://github.com/PixArt-alpha/PixArt-alpha, `diffusion/model/gaussian_diffusion.py`): the distance of the noise
    plus the variational bound in bits, which teaches the variance alone; a weight by signal to noise ratio multiplies
    both. The 1024 checkpoint is told the size of the file, and the aspect of the bucket, as in
    `InternalData_ms.py` there; OneTrainer tells it the bucket's size instead.

    A dropped caption is the empty one with its mask, which guidance reads as the negative prompt; OneTrainer multiplies
    what T5 gives, and the mask, by 0 instead. The original training had fixed vectors of its own there (`y_embedding`),
    which the published diffusers checkpoints no longer hold.
    """

    pipeline_class = PixArtAlphaPipeline
    part_names = ("transformer", "vae", "text_encoder")
    denoiser = "transformer"
    learned_variance = True
    prompt_tokens = 119
    encodes_ahead = True  # T5-XXL: 4.8 thousand million parameters beside 0.6
    resolution = 1024
    bucket_step = 16
    guidance = 4.5
    config_name = "pixart_alpha_1024"
    single_step = False
    predictions = ("epsilon",)  # with which alone it learns its variance
    lora_targets = {"transformer": TRANSFORMER_TARGETS, "text_encoder": T5_TARGETS}
    kohya_prefixes = {"transformer": "transformer.", "text_encoder": "lora_te1"}  # as ComfyUI reads them
    embedding_keys = {"text_encoder": "t5xxl"}
    architecture = "pixart-alpha"
    base_model_version = "pixart_alpha"

    @classmethod
    def part_classes(cls) -> dict[str, Any]:
        return {"transformer": PixArtTransformer2DModel, "vae": AutoencoderKL, "text_encoder": T5EncoderModel}

    def original_names(self, paths: list[str]) -> dict[str, list[str]]:
        return pixart.original_names(paths)

    def load_pipeline(self, without: Sequence[str] = ()) -> Any:
        self.refuse_files()
        return super().load_pipeline(without)

    def load_skeleton(self) -> Any:
        self.refuse_files()
        return super().load_skeleton()

    def refuse_files(self) -> None:
        """A single file holds the transformer alone, and diffusers cannot read it.

        Raises:
            SettingsError: the checkpoint is a file.
        """
        if Path(self.checkpoint).expanduser().is_file():
            raise SettingsError(
                f"model.checkpoint={self.checkpoint}: PixArt Alpha is read from a diffusers folder or the hub; a file "
                "holds its transformer alone, without T5 and the VAE. diffusers' convert_pixart_alpha_to_diffusers.py "
                "makes a folder of it: give that with model.checkpoint=FOLDER"
            )

    def prepare(self) -> None:
        without_dropout(self.pipeline.text_encoder)
        super().prepare()

    def part_dtypes(self) -> dict[str, torch.dtype]:
        """T5 overflows in fp16: it is kept in bf16 then."""
        dtypes = super().part_dtypes()
        if dtypes["default"] == torch.float16:
            dtypes.setdefault("text_encoder", torch.bfloat16)
        return dtypes

    def make_noise(self) -> Noise:
        """The schedule of the checkpoint: linear betas from 0.0001 to 0.02, 1000 steps, epsilon-prediction.

        Raises:
            SettingsError: another prediction, or a transformer that learns no variance.
        """
        schedule = super().make_noise()
        channels = self.pipeline.transformer.config.out_channels
        if channels != 2 * self.pipeline.transformer.config.in_channels:
            raise SettingsError(
                f"model.checkpoint={self.checkpoint}: its transformer has {channels} output channels; PixArt Alpha's "
                f"has {2 * self.pipeline.transformer.config.in_channels}, for the noise and its variance"
            )
        return schedule

    def encode_image(self, pixels: Tensor) -> Tensor:
        """The mean of the posterior, not a draw from it: the same picture has the same latents every time."""
        return encode_vae(self.pipeline.vae, pixels)

    def decode_image(self, latents: Tensor) -> Tensor:
        return decode_vae(self.pipeline.vae, latents)

    def encode_prompt(self, captions: list[str]) -> Cond:
        """{"hidden": [B, 120, 4096], "mask": [B, 120] bool, True for a token of the caption and its end}.

        Captions are put in lower case and stripped, as in the original training and in the stock pipeline.
        """
        words = self.pipeline.tokenizer(
            [self.spelled(caption) for caption in captions],
            padding="max_length",
            max_length=MAX_TOKENS,
            truncation=True,
            return_tensors="pt",
        )
        ids, mask = (each.to(self.device, non_blocking=True) for each in (words.input_ids, words.attention_mask))
        seen = None if mask.is_meta else mask  # transformers reads its values, of which a skeleton has none
        with self.never_fp16():
            hidden = self.pipeline.text_encoder(ids, attention_mask=seen).last_hidden_state
        return {"hidden": hidden, "mask": mask.bool()}

    @property
    def reading(self) -> str:
        """Also weights in fp32 are computed with in bf16 where the run is in mixed precision: see `never_fp16`."""
        return f"{MAX_TOKENS} tokens, {'mixed' if self.autocast_dtype is not None else 'plain'}"

    def spelled(self, caption: str) -> str:
        return caption.lower().strip()

    def prompt_room(self) -> int:
        return self.prompt_tokens

    def never_fp16(self) -> contextlib.AbstractContextManager[Any]:
        """For T5: where the run is in mixed precision, bf16."""
        if self.device.type == "meta":  # knows no autocast
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast_dtype is not None)

    def predict(self, noisy: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        """[B, 4, h, w] noisy latents at timesteps [B] -> [B, 8, h, w]: the noise, and where its log variance lies."""
        transformer = self.pipeline.transformer
        dtype = next(transformer.parameters()).dtype  # transformer.dtype goes through all of them: milliseconds
        return transformer(
            noisy.to(dtype),
            encoder_hidden_states=cond["hidden"].to(dtype),
            encoder_attention_mask=cond["mask"],
            timestep=t,
            added_cond_kwargs=sizes(batch, noisy.device) if transformer.use_additional_conditions else {},
        ).sample

    def objective(
        self,
        predicted: Tensor,
        latents: Tensor,
        clean: Tensor,
        noisy: Tensor,
        t: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """[B] distance of the noise plus the variational bound in bits; the bound gives the noise no gradient."""
        assert isinstance(self.noise_schedule, Discrete)
        noise, fraction = predicted.chunk(2, dim=1)
        bits = variational.bound(noise, fraction, latents, noisy, self.noise_schedule.alpha_bars, t)
        if weights is not None:
            bits = bits * weights.to(bits)
        return super().objective(noise, latents, clean, noisy, t, weights) + bits.flatten(1).mean(1)

    def prompt_arguments(self, cond: Cond, uncond: Cond) -> dict[str, Any]:
        """Besides the prompts: the size asked for is drawn, not the nearest that the weights were trained at."""
        return super().prompt_arguments(cond, uncond) | {"negative_prompt": None, "use_resolution_binning": False}


def sizes(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """The micro-conditions in fp32 (bf16 would round sizes above 256): [B, 2] height and width of the files in pixels,
    [B, 1] height / width of the buckets."""
    target = batch.target_size.to(device, torch.float32)
    return {
        "resolution": batch.original_size.to(device, torch.float32),
        "aspect_ratio": target[:, :1] / target[:, 1:],
    }


def without_dropout(text_encoder: nn.Module) -> None:
    """T5's own, which is on wherever it trains, would make the loss depend on the global random state."""
    for each in text_encoder.modules():
        if isinstance(each, nn.Dropout):
            each.p = 0.0
        elif isinstance(each, T5Attention):
            each.dropout = 0.0
