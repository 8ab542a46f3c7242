"""Stable Diffusion 1.5 and its derivatives."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionInpaintPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from otl.formats import single_file
from otl.formats.original import sgm_unet_names
from otl.formats.stored import Stored, together
from otl.modules.base import DiffusionModule
from otl.modules.clip import ClipModule
from otl.types import Batch, Cond

UNET_TARGETS = {
    "attn-mlp": [r"attentions"],
    "attn-only": [r"attn[12]\."],
    "full": [r""],
    "blocks": [r"attentions"],  # attn-mlp by the name that the other families have for it
    "down-blocks": [r"down_blocks\..*attentions"],
    "mid-block": [r"mid_block\.attentions"],
    "up-blocks": [r"up_blocks\..*attentions"],
}
CLIP_TARGETS = {"attn-mlp": [r"layers"], "attn-only": [r"self_attn"], "full": [r""]}
TEXT_TARGETS = {preset: [r"layers"] for preset in UNET_TARGETS} | CLIP_TARGETS  # of the other presets: all of it


class StableDiffusion(ClipModule):
    """A UNet over 4-channel latents at an eighth of the size, led by the last layer of CLIP-L, 77 tokens.

    A dropped caption is the empty one, as in the original training (github.com/CompVis/stable-diffusion,
    `ucg_training` in ldm/models/diffusion/ddpm.py); OneTrainer multiplies what the text encoder gives by 0 instead.
    """

    pipeline_class = StableDiffusionPipeline
    inpaint_pipeline_class = StableDiffusionInpaintPipeline
    pipeline_options = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    part_names = ("unet", "vae", "text_encoder")
    denoiser = "unet"
    resolution = 512
    bucket_step = 8
    guidance = 7.5
    config_name = "sd15"
    file_keys = ("model.diffusion_model.output_blocks.11.0.skip_connection.weight",)
    foreign_keys = ("cond_stage_model.model.transformer.resblocks.22.ln_1.weight",)
    writes_file = True
    file_texts = {"text_encoder": (single_file.CLIP, "cond_stage_model.transformer")}
    lora_targets = {"unet": UNET_TARGETS, "text_encoder": TEXT_TARGETS}
    kohya_prefixes = {"unet": "lora_unet", "text_encoder": "lora_te"}
    architecture = "stable-diffusion-v1"
    inpaint_architecture = "stable-diffusion-v1-inpainting"
    base_model_version = "sd_v1"

    @classmethod
    def part_classes(cls) -> dict[str, Any]:
        return {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}

    def original_names(self, paths: list[str]) -> dict[str, list[str]]:
        """Those of the original code (sgm)."""
        return {name: [path] for path, name in sgm_unet_names(dict(self.pipeline.unet.config), paths).items()}

    def encode_image(self, pixels: Tensor) -> Tensor:
        """The mean of the posterior, not a draw from it: the same picture has the same latents every time."""
        return encode_vae(self.pipeline.vae, pixels)

    def decode_image(self, latents: Tensor) -> Tensor:
        return decode_vae(self.pipeline.vae, latents)

    def encode_prompt(self, captions: list[str]) -> Cond:
        """{"hidden": [B, chunks * 77, 768]}, after the final layer norm, whichever layer is read."""
        encoder, ids = self.pipeline.text_encoder, self.tokens(self.pipeline.tokenizer, captions)
        found = encoder(ids, output_hidden_states=True)
        if not self.clip_skip:
            return {"hidden": self.joined(found.last_hidden_state)}
        last = getattr(encoder, "text_model", encoder)  # transformers 4 and 5
        return {"hidden": self.joined(last.final_layer_norm(found.hidden_states[-1 - self.clip_skip]))}

    def predict(self, noisy: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        unet = self.pipeline.unet
        dtype = next(unet.parameters()).dtype  # unet.dtype goes through all of them: milliseconds
        return unet(noisy.to(dtype), t, encoder_hidden_states=cond["hidden"].to(dtype)).sample

    def single_file(self) -> Stored:
        return original(self)


def original(module: DiffusionModule) -> Stored:
    """All networks under the names of the original code."""
    unet, vae = module.part("unet"), module.part("vae")
    return together(
        single_file.unet(dict(unet.config), unet.state_dict()),
        single_file.vae(dict(vae.config), vae.state_dict()),
        *(layout.spelled(prefix, module.weights(name)) for name, (layout, prefix) in module.file_texts.items()),
    )


def encode_vae(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """[B, 3, H, W] in -1..1 -> [B, C, h, w] float32, scaled; never under autocast: SDXL's VAE overflows in fp16."""
    with without_autocast(pixels):
        latents = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist.mode()
    return latents.float() * vae.config.scaling_factor


def decode_vae(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """The inverse of `encode_vae`."""
    with without_autocast(latents):
        return vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The weights' own dtype; the meta device knows no autocast."""
    if tensor.device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(tensor.device.type, enabled=False)
