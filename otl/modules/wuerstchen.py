"""Wuerstchen v2: the prior."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from diffusers import WuerstchenDecoderPipeline, WuerstchenPriorPipeline
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel, WuerstchenDiffNeXt, WuerstchenPrior
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from otl.config import LoraFormat
from otl.methods.lora import Lora
from otl.modules import fetching
from otl.modules.cascaded import CascadedModule
from otl.modules.stable_diffusion import CLIP_TARGETS
from otl.types import Batch, Cond, Noise, Problem

TARGETS = {
    "attn-mlp": [r"attention", r"channelwise"],
    "attn-only": [r"attention"],
    "full": [r""],
    "blocks": [r"^blocks\."],
    "mapper": [r"mapper"],
}
TEXT_TARGETS = CLIP_TARGETS | {"blocks": [r"layers"], "mapper": [r"layers"]}  # it has neither: all of it
SAVED_AS = ["wuerstchen", "WuerstchenPrior"]  # in model_index.json, as in the published repository


class Wuerstchen(CascadedModule):
    """Blocks of convolution and attention over 16 x 24 x 24 latents, led by the last layer of OpenCLIP bigG
    (https://arxiv.org/abs/2306.00637).

    As in the original training (github.com/dome272/Wuerstchen, train_stage_C.py): t = 1.08 u + 0.001, at most 1, so
    that seven in a hundred times are pure noise; the squared error of the noise times 1 / (1 + snr); dropout of 0.1 in
    the prior; and data.caption_dropout=0.05, which is for the user to set. The latents' scale of 42 and shift of 1 are
    the published pipeline's. A dropped caption is the empty one, as there; OneTrainer multiplies what the text encoder
    gives by 0 instead.
    """

    pipeline_class = WuerstchenPriorPipeline
    pipeline_options = {"latent_mean": 42.0, "latent_std": 1.0}
    prior_class = WuerstchenPrior
    text_class = CLIPTextModel
    decoder_class = WuerstchenDecoderPipeline
    decoder_parts = {"text_encoder": CLIPTextModel, "vqgan": PaellaVQModel, "decoder": WuerstchenDiffNeXt}
    time_embedding = "gen_r_embedding"
    latent_scale = 42.0
    latent_shift = 1.0
    config_name = "wuerstchen"
    lora_targets = {"prior": TARGETS, "text_encoder": TEXT_TARGETS}
    kohya_prefixes = {"prior": "lora_prior_unet", "text_encoder": "lora_prior_te"}
    embedding_keys = {"text_encoder": "clip_g"}
    architecture = "wuerstchen-v2-prior"
    base_model_version = "wuerstchen_v2"

    def assembled(self, parts: dict[str, nn.Module]) -> Any:
        pipeline = super().assembled(parts)
        pipeline.register_to_config(prior=SAVED_AS)  # diffusers 0.42 would name itself, and not find the class there
        return pipeline

    def make_noise(self) -> Noise:
        return self.cosine(stretch=1.08)

    def encode_prompt(self, captions: list[str]) -> Cond:
        """{"hidden": [B, 77, 1280]}, after the final layer norm."""
        return {"hidden": self.pipeline.text_encoder(**self.tokens(captions)).last_hidden_state}

    def predict(self, noisy: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        prior = self.pipeline.prior
        dtype = next(prior.parameters()).dtype  # prior.dtype goes through all of them: milliseconds
        return prior(noisy.to(dtype), t, cond["hidden"].to(dtype))

    def advice(self) -> Iterator[Problem]:
        """Warns of LoRA keys that no other program reads."""
        if isinstance(self.method, Lora) and self.output_options.format is LoraFormat.kohya:
            message = (
                "kohya: diffusers, the other program that draws with Wuerstchen, takes such a file and reads nothing "
                "of it; set output.format=peft"
            )
            yield Problem("output.format", message, fatal=False)

    def decoder_words(self, decoder: str) -> dict[str, Any]:
        return {"tokenizer": fetching.fetch_other(CLIPTokenizer, decoder, "tokenizer", setting="model.decoder")}

    def decoder_arguments(self, prompt: str) -> dict[str, Any]:
        """Its own text encoder, OpenCLIP H, reads the prompt."""
        return {"prompt": [prompt]}
