"""A family that is not in OTL: rectified flow in blocks of pixels, led by words in no order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from otl.config import SettingsError
from otl.modules.base import DiffusionModule
from otl.types import Batch, Cond, Dtype, Noise
from otl_example.networks import BlockTransformer, WordEncoder
from otl_example.pipeline import ExamplePipeline, from_blocks, to_blocks

BY_SEED = "seed:"  # a checkpoint that is made, not loaded


class Flow:
    """The straight line from a picture (t = 0) to noise (t = 1); the denoiser predicts its direction
    (https://arxiv.org/abs/2209.03003)."""

    prediction = "flow"

    def sample(self, u: Tensor) -> Tensor:
        """[B] shares of the schedule -> [B] float32 times, the same."""
        return u.float()

    def share(self, t: Tensor) -> Tensor:
        return t.double()

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        t = t.to(latents).reshape(-1, 1, 1, 1)
        return (1 - t) * latents + t * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        return noise - latents

    def snr(self, t: Tensor) -> Tensor:
        """[B] times -> [B] signal to noise ratio; infinite at t = 0."""
        t = t.double()
        return ((1 - t) / t) ** 2


class Example(DiffusionModule):
    """A transformer over blocks of 4 x 4 pixels. No image encoder, no tokenizer, no download.

    Args:
        checkpoint: "seed:N": random weights made from the number; or a folder that method=finetune wrote.
        dtype: of the frozen weights: "fp32", "bf16", "fp16", or "auto" for the precision's own.
        gradient_checkpointing: compute activations twice instead of keeping them: less memory, about a third slower.
    """

    pipeline_class = ExamplePipeline
    part_names = ("transformer", "text_encoder")
    denoiser = "transformer"
    image_encoder = ""  # none: the latents are the pixels, in blocks
    text_encoders = ("text_encoder",)
    resolution = 64
    bucket_step = 8
    guidance = 2.0
    lora_targets = {
        "transformer": {"attn-mlp": [r"to_", r"mlp\."], "attn-only": [r"to_"], "full": [r""]},
        "text_encoder": {"attn-mlp": [r"proj"], "attn-only": [r"proj"], "full": [r"proj"]},  # its only layer
    }
    kohya_prefixes = {"transformer": "lora_transformer", "text_encoder": "lora_te"}
    architecture = "otl-example"
    base_model_version = "otl_example"

    def __init__(
        self, checkpoint: str = "seed:0", *, dtype: Dtype = "auto", gradient_checkpointing: bool = False
    ) -> None:
        super().__init__(checkpoint, dtype=dtype, gradient_checkpointing=gradient_checkpointing)

    @classmethod
    def part_classes(cls) -> dict[str, Any]:
        return {"transformer": BlockTransformer, "text_encoder": WordEncoder}

    def load_pipeline(self, without: Sequence[str] = ()) -> ExamplePipeline:
        """Made from the seed, which is all or nothing, or loaded as every family's."""
        if not self.checkpoint.startswith(BY_SEED):
            return super().load_pipeline(without)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.weights_seed())
            pipeline = made()
        return pipeline.to(self.part_dtypes()["default"])

    def load_skeleton(self) -> ExamplePipeline:
        if not self.checkpoint.startswith(BY_SEED):
            return super().load_skeleton()
        self.weights_seed()
        with torch.device("meta"):
            return made()

    def weights_seed(self) -> int:
        """Raises SettingsError: what follows `seed:` is no number."""
        number = self.checkpoint.removeprefix(BY_SEED)
        if not number.isdecimal():
            raise SettingsError(f"model.checkpoint={self.checkpoint}: give a number, such as {BY_SEED}0, or a folder")
        return int(number)

    def make_noise(self) -> Noise:
        return Flow()

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> [B, 48, H/4, W/4], the same numbers in another order."""
        return to_blocks(pixels)

    def decode_image(self, latents: Tensor) -> Tensor:
        return from_blocks(latents)

    def encode_prompt(self, captions: list[str]) -> Cond:
        """{"words": [B, 128]}."""
        return {"words": self.pipeline.encode_prompt(captions)}

    def predict(self, noisy: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
        transformer = self.pipeline.transformer
        return transformer(noisy.to(transformer.dtype), t, cond["words"].to(transformer.dtype))

    def prompt_arguments(self, cond: Cond, uncond: Cond) -> dict[str, Any]:
        return {"prompt_embeds": cond["words"], "negative_prompt_embeds": uncond["words"]}

    def image_identity(self) -> str:
        """No weights: only the order of the numbers could change."""
        return "blocks of 4 x 4 pixels"


def made() -> ExamplePipeline:
    """The networks at the size they come in, with the weights of torch's generator."""
    return ExamplePipeline(BlockTransformer(), WordEncoder(), FlowMatchEulerDiscreteScheduler())
