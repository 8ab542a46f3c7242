"""How pictures are drawn: what a family's stock diffusers pipeline does, for networks that diffusers does not know."""

from __future__ import annotations

import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from torch import Tensor
from torch.nn import functional as F

from otl_example.networks import BlockTransformer, WordEncoder, word_ids

BLOCK = 4  # pixels per side


class ExamplePipeline(DiffusionPipeline):
    """Straight from noise to blocks of pixels, in Euler steps."""

    def __init__(
        self, transformer: BlockTransformer, text_encoder: WordEncoder, scheduler: FlowMatchEulerDiscreteScheduler
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, text_encoder=text_encoder, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self,
        prompt_embeds: Tensor,
        negative_prompt_embeds: Tensor,
        num_inference_steps: int,
        guidance_scale: float,
        generator: list[torch.Generator],
        height: int,
        width: int,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """One picture for each prompt, from its generator's noise.

        Args:
            prompt_embeds, negative_prompt_embeds: [B, width] each, from `encode_prompt`.
            num_inference_steps: Euler steps.
            guidance_scale: 1 is the prompt alone; above, the negative prompt is gone away from.
            height, width: pixels.
            output_type: "pil", or "latent" for the blocks as they are.
        """
        shape = (3 * BLOCK**2, height // BLOCK, width // BLOCK)
        latents = torch.stack([torch.randn(shape, generator=each) for each in generator]).to(self.device)
        words = torch.cat([negative_prompt_embeds, prompt_embeds])
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            times = (t / 1000).expand(len(words))
            both = torch.cat([latents, latents]).to(words.dtype)
            away, towards = self.transformer(both, times, words).float().chunk(2)
            velocity = away + guidance_scale * (towards - away)
            latents = self.scheduler.step(velocity, t, latents, return_dict=False)[0]
        if output_type == "latent":
            return ImagePipelineOutput(images=latents)
        pixels = from_blocks(latents).clamp(-1, 1).permute(0, 2, 3, 1) / 2 + 0.5
        return ImagePipelineOutput(images=self.numpy_to_pil(pixels.float().cpu().numpy()))

    def encode_prompt(self, captions: list[str]) -> Tensor:
        """B captions -> [B, width]."""
        ids = word_ids(captions, words=self.text_encoder.config.words)
        return self.text_encoder(torch.tensor(ids, device=self.text_encoder.device))


def to_blocks(pixels: Tensor) -> Tensor:
    """[B, 3, H, W] -> [B, 48, H/4, W/4]: the pixels of a block as channels of one position."""
    return F.pixel_unshuffle(pixels, BLOCK)


def from_blocks(latents: Tensor) -> Tensor:
    """The inverse of `to_blocks`."""
    return F.pixel_shuffle(latents, BLOCK)
