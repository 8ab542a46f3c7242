"""Training loops without a trainer, around the network that OTL trains: what OTL is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn
from torch.nn import functional as F

from otl import rng
from otl.modules.base import DiffusionModule
from otl.types import Batch

Network = Callable[[Tensor, Tensor], Tensor]
"""(noisy latents, t) -> prediction, with the conditioning of one batch."""


class Inputs(NamedTuple):
    """One batch as the loops take it: on the device, in the network's dtype."""

    latents: Tensor  # [B, C, h, w] float32
    noise: Tensor  # [B, C, h, w] float32
    t: Tensor  # [B] int64
    signal: Tensor  # [B, 1, 1, 1] factor of the latents at t
    sigma: Tensor  # [B, 1, 1, 1] factor of the noise at t
    network: Network


def inputs(module: DiffusionModule, batch: Batch) -> Inputs:
    """The noise and timesteps that OTL takes for this batch."""
    assert batch.latents is not None and batch.noise is not None
    device = batch.latents.device
    t = module.noise_schedule.sample(rng.uniforms(batch.key.cpu(), "timestep")).to(device)
    bars = module.noise_schedule.alpha_bars[t.cpu()].reshape(-1, 1, 1, 1)
    signal, sigma = bars.sqrt().float().to(device), (1 - bars).sqrt().float().to(device)
    network = NETWORKS[module.config_name](module.part("denoiser"), batch)
    return Inputs(batch.latents, batch.noise, t, signal, sigma, network)


def sd15(unet: Any, batch: Batch) -> Network:
    dtype = unet.dtype  # read once: diffusers walks through all modules for it
    hidden = batch.cond["hidden"].to(dtype)
    return lambda noisy, t: unet(noisy.to(dtype), t, hidden).sample


def sdxl(unet: Any, batch: Batch) -> Network:
    dtype = unet.dtype
    hidden = batch.cond["hidden"].to(dtype)
    sizes = torch.cat([batch.original_size, batch.crop, batch.target_size], dim=1)
    added = {"text_embeds": batch.cond["pooled"].to(dtype), "time_ids": sizes.to(hidden)}
    return lambda noisy, t: unet(noisy.to(dtype), t, hidden, added_cond_kwargs=added).sample


NETWORKS: dict[str, Callable[[Any, Batch], Network]] = {"sd15": sd15, "sdxl": sdxl}


class Bare:
    """The least that trains: predict, squared error, backward, clip, step. Everything else is prepared beforehand.

    Args:
        module: whose network is trained, by an optimizer of the same kind; its noise must be an epsilon schedule.
        batches: on the device, taken in turn.
        clip: norm of the gradient; None: unlimited.
    """

    def __init__(self, module: DiffusionModule, batches: list[Batch], *, clip: float | None) -> None:
        assert module.optimizer is not None and module.noise_schedule.prediction == "epsilon"
        self.parameters: list[nn.Parameter] = list(module.trained_parameters().values())
        self.optimizer = module.optimizer([{"params": self.parameters}])
        self.inputs = [inputs(module, batch) for batch in batches]
        self.device_type, self.autocast_dtype, self.clip = module.device.type, module.autocast_dtype, clip
        self.steps = 0

    def loss(self, batch: Inputs) -> Tensor:
        noisy = batch.signal * batch.latents + batch.sigma * batch.noise
        return F.mse_loss(batch.network(noisy, batch.t).float(), batch.noise)

    def forward(self) -> Tensor:
        batch = self.inputs[self.steps % len(self.inputs)]
        self.steps += 1
        with torch.autocast(self.device_type, self.autocast_dtype, enabled=self.autocast_dtype is not None):
            return self.loss(batch)

    def step(self) -> None:
        self.forward().backward()
        self.update()

    def update(self) -> None:
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Diffusers(Bare):
    """What diffusers' text-to-image LoRA example does in a step, on cached latents and without accelerate.

    Noise and timesteps are drawn on the device and added by diffusers' scheduler; the loss is fetched for the log and
    for the bar: https://github.com/huggingface/diffusers/blob/main/examples/text_to_image/train_text_to_image_lora.py
    """

    def __init__(self, module: DiffusionModule, batches: list[Batch], *, clip: float | None) -> None:
        super().__init__(module, batches, clip=clip)
        self.scheduler = DDPMScheduler.from_config(module.pipeline.scheduler.config)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda _: 1.0)
        self.logged = 0.0

    def loss(self, batch: Inputs) -> Tensor:
        noise = torch.randn_like(batch.latents)
        count = self.scheduler.config.num_train_timesteps
        t = torch.randint(0, count, (len(noise),), device=noise.device).long()
        noisy = self.scheduler.add_noise(batch.latents, noise, t)
        return F.mse_loss(batch.network(noisy, t).float(), noise.float())

    def step(self) -> None:
        loss = self.forward()
        self.logged = loss.detach().repeat(len(self.inputs[0].t)).mean().item()
        loss.backward()
        self.update()
        self.schedule.step()
        self.logged = loss.detach().item()


LOOPS: dict[str, type[Bare]] = {"bare": Bare, "diffusers": Diffusers}
