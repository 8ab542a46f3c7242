"""Stable Diffusion XL and its derivatives (Pony, Lightning, ...)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionXLInpaintPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from otl import noise
from otl.formats import single_file
from otl.formats.original import sgm_unet_names
from otl.formats.stored import Stored, together
from otl.modules.clip import ClipModule
from otl.modules.stable_diffusion import TEXT_TARGETS, UNET_TARGETS, decode_vae, encode_vae, original
from otl.types import Batch, Cond


class StableDiffusionXL(ClipModule):
    """A UNet led by the penultimate layers of CLIP-L and OpenCLIP bigG side by side, bigG's pooled vector, and the
    sizes of file, crop and bucket (https://arxiv.org/abs/2307.01952, section 2.2).

    A dropped caption is the empty one, which pictures are drawn with as the negative prompt unless another is given.
    OneTrainer multiplies what the encoders give by 0 instead, as does github.com/Stability-AI/generative-models
    (`ucg_rate` in sgm/modules/encoders/modules.py); diffusers' pipeline reads zeros where it gets no negative prompt.
    """

    pipeline_class = StableDiffusionXLPipeline
    inpaint_pipeline_class = StableDiffusionXLInpaintPipeline
    pipeline_options = {"feature_extractor": None, "image_encoder": None, "add_watermarker": False}
    part_names = ("unet", "vae", "text_encoder", "text_encoder_2")
    denoiser = "unet"
    text_encoders = ("text_encoder", "text_encoder_2")
    resolution = 1024
    bucket_step = 64
    guidance = 5.0
    config_name = "sdxl"
    file_keys = ("conditioner.embedders.1.model.transformer.resblocks.9.mlp.c_proj.bias",)
    writes_file = True
    file_texts = {
        "text_encoder": (single_file.CLIP, "conditioner.embedders.0.transformer"),
        "text_encoder_2": (single_file.OPEN_CLIP, "conditioner.embedders.1.model"),
    }
    lora_targets = {"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS, "text_encoder_2": TEXT_TARGETS}
    kohya_prefixes = {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
    embedding_keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    architecture = "stable-diffusion-xl-v1-base"
    base_model_version = "sdxl_base_v1-0"
    implementation = "https://github.com/Stability-AI/generative-models"

    @classmethod
    def part_classes(cls) -> dict[str, Any]:
        return {
            "unet": UNet2DConditionModel,
            "vae": AutoencoderKL,
            "text_encoder": CLIPTextModel,
            "text_encoder_2": CLIPTextModelWithProjection,
        }

    def denoiser_names(self, paths: list[str]) -> dict[str, str]:
        """The names of the original code (sgm), which kohya's files carry for SDXL."""
        return sgm_unet_names(dict(self.pipeline.unet.config), paths)

    def single_file(self) -> Stored:
        schedule = self.noise_schedule
        ends = noise.ends_in_noise(schedule)
        return together(original(self), single_file.marks(prediction=schedule.prediction, zero_terminal_snr=ends))

    def encode_image(self, pixels: Tensor) -> Tensor:
        return encode_vae(self.pipeline.vae, pixels)

    def decode_image(self, latents: Tensor) -> Tensor:
        return decode_vae(self.pipeline.vae, latents)

    def encode_prompt(self, captions: list[str]) -> Cond:
        """{"hidden": [B, chunks * 77, 2048], "pooled": [B, 1280] of the first chunks}."""
        pipe = self.pipeline
        first = pipe.text_encoder(self.tokens(pipe.tokenizer, captions), output_hidden_states=True)
        second = pipe.text_encoder_2(self.tokens(pipe.tokenizer_2, captions), output_hidden_states=True)
        layer = -2 - self.clip_skip
        hidden = torch.cat([first.hidden_states[layer], second.hidden_states[layer]], dim=-1)
        return {"hidden": self.joined(hidden), "pooled": self.first(second.text_embeds)}

    def predict(self, noisy: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        unet = self.pipeline.unet
        dtype = next(unet.parameters()).dtype  # unet.dtype goes through all of them: milliseconds
        sizes = torch.cat([batch.original_size, batch.crop, batch.target_size], dim=1)
        return unet(
            noisy.to(dtype),
            t,
            encoder_hidden_states=cond["hidden"].to(dtype),
            added_cond_kwargs={
                "text_embeds": cond["pooled"].to(dtype),
                "time_ids": sizes.to(noisy.device, torch.float32),  # bf16 would round sizes above 256
            },
        ).sample
