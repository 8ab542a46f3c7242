"""Noise schedules: pure functions of tensors, and the nouns that families hand to the training step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def betas(schedule: str, start: float, end: float, count: int) -> Tensor:
    """[count] float64 variances of the forward steps.

    Args:
        schedule: "linear", "scaled_linear" (linear in the square root: latent diffusion) or "squaredcos_cap_v2".
    """
    if schedule == "linear":
        return torch.linspace(start, end, count, dtype=torch.float64)
    if schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    if schedule == "squaredcos_cap_v2":
        at = torch.arange(count + 1, dtype=torch.float64) / count
        bar = torch.cos((at + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise ValueError(f"beta schedule {schedule!r} is not one of linear, scaled_linear, squaredcos_cap_v2")


def alpha_bars(betas: Tensor) -> Tensor:
    """[T] variances -> [T] share of the signal that is left after each step."""
    return torch.cumprod(1 - betas, dim=0)


def zero_terminal_snr(alpha_bars: Tensor) -> Tensor:
    """[T] -> [T] shifted and scaled so that the last step is pure noise and the first stays as it was.

    Algorithm 1 of https://arxiv.org/abs/2305.08891.
    """
    root = alpha_bars.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * first / (first - last)) ** 2


def per_sample(values: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ...] in the dtype and on the device of `like`, to multiply [B, ...]."""
    return values.to(like.device, like.dtype).reshape(-1, *[1] * (like.dim() - 1))


class Discrete:
    """T steps of a Markov chain (Stable Diffusion, SDXL, PixArt).

    Args:
        alpha_bars: [T] share of the signal left after each step.
        prediction: what the denoiser predicts: "epsilon", "v_prediction" or "sample".
        low, high: shares of the schedule in 0..1 between which timesteps are drawn.
    """

    def __init__(self, alpha_bars: Tensor, prediction: str = "epsilon", *, low: float = 0.0, high: float = 1.0) -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        self.alpha_bars = alpha_bars.double()
        self.prediction = prediction
        count = len(alpha_bars)
        self.first, self.last = int(low * count), max(int(low * count), math.ceil(high * count) - 1)

    @classmethod
    def from_scheduler(
        cls,
        config: Any,
        *,
        prediction: str | None = None,
        zero_snr: bool | None = None,
        low: float = 0.0,
        high: float = 1.0,
    ) -> Discrete:
        """The schedule that a diffusers scheduler config describes; None keeps what the config says."""
        bars = alpha_bars(
            betas(config["beta_schedule"], config["beta_start"], config["beta_end"], config["num_train_timesteps"])
        )
        if zero_snr if zero_snr is not None else config.get("rescale_betas_zero_snr", False):
            bars = zero_terminal_snr(bars)
        return cls(bars, prediction or config.get("prediction_type", "epsilon"), low=low, high=high)

    def sample(self, u: Tensor) -> Tensor:
        """[B] uniform in 0..1 -> [B] int64 timesteps in first..last."""
        count = self.last - self.first + 1
        return (self.first + (u * count).floor().long()).clamp(max=self.last)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """[B] timesteps -> the factors of signal and noise, each [B, 1, ...]."""
        bars = self.alpha_bars[t.cpu()]
        return per_sample(bars.sqrt(), like), per_sample((1 - bars).sqrt(), like)

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """[B, ...] latents and noise, [B] timesteps -> [B, ...] noisy latents."""
        signal, sigma = self.scales(t, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """[B, ...] what the denoiser should predict."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return latents
        signal, sigma = self.scales(t, latents)
        return signal * noise - sigma * latents

    def snr(self, t: Tensor) -> Tensor:
        """[B] timesteps -> [B] float64 signal to noise ratio; 0 at a pure-noise step."""
        bars = self.alpha_bars[t.cpu()]
        return bars / (1 - bars)


def shaped(noise: Tensor, keys_normal: Tensor | None, *, offset: float) -> Tensor:
    """[B, C, h, w] noise plus `offset` times one number per image and channel ([B, C]), the same for all pixels.

    Source: https://www.crosslabs.org/blog/diffusion-with-offset-noise.
    """
    if not offset or keys_normal is None:
        return noise
    return noise + offset * keys_normal.to(noise).reshape(*keys_normal.shape, 1, 1)
