"""Noise schedules: pure functions of tensors, and the nouns that families hand to the training step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from otl import agreement, rng
from otl.config import NoiseOptions
from otl.moving import per_sample, to_like
from otl.types import Noise

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


class Discrete:
    """T steps of a Markov chain (Stable Diffusion, SDXL, PixArt).

    Args:
        alpha_bars: [T] share of the signal left after each step.
        prediction: what the denoiser predicts: "epsilon", "v_prediction" or "sample".
    """

    def __init__(self, alpha_bars: Tensor, prediction: str = "epsilon") -> None:
        if prediction not in PREDICTIONS:
            raise ValueError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")
        self.alpha_bars = alpha_bars.double()
        self.factors = torch.stack([self.alpha_bars.sqrt(), (1 - self.alpha_bars).sqrt()])  # of signal and noise
        self.prediction = prediction

    @classmethod
    def from_scheduler(cls, config: Any, *, prediction: str | None = None, zero_snr: bool | None = None) -> Discrete:
        """The schedule that a diffusers scheduler config describes; None keeps what the config says."""
        bars = alpha_bars(
            betas(config["beta_schedule"], config["beta_start"], config["beta_end"], config["num_train_timesteps"])
        )
        if zero_snr if zero_snr is not None else config.get("rescale_betas_zero_snr", False):
            bars = zero_terminal_snr(bars)
        return cls(bars, prediction or config.get("prediction_type", "epsilon"))

    def sample(self, u: Tensor) -> Tensor:
        """[B] shares of the schedule in 0..1 -> [B] int64 timesteps in 0..T-1."""
        count = len(self.alpha_bars)
        return (u * count).long().clamp(max=count - 1)

    def share(self, t: Tensor) -> Tensor:
        """[B] timesteps -> [B] float64 shares of the schedule, 0 for the first."""
        return t.cpu().double() / len(self.alpha_bars)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """[B] timesteps -> the factors of signal and noise, each [B, 1, ...]."""
        signal, sigma = self.factors[:, t.cpu()]
        return per_sample(signal, like), per_sample(sigma, like)

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


def shaped(drawn: Tensor, keys: Tensor, stream: str, options: NoiseOptions, scale: Tensor | None) -> Tensor:
    """[B, C, h, w] white noise -> the same with the coarser resolutions and the offset that the settings ask for.

    Args:
        keys: [B] int64 on the CPU, see otl/rng.py.
        stream: names the noise, a function of (keys, stream).
        scale: [B] factor of the offset, see `offset_scale`; None: 1.
    """
    if options.multires_iterations:
        channels, h, w = drawn.shape[1:]
        coarser = multires(
            keys,
            (channels, h, w),
            stream,
            iterations=options.multires_iterations,
            discount=options.multires_discount,
        )
        drawn = normalized(drawn, to_like(coarser, drawn))
    if options.offset:
        shared = offset(
            keys,
            drawn.shape[1],
            stream,
            strength=options.offset,
            random_strength=options.offset_random_strength,
            scale=scale,
        )
        drawn = drawn + to_like(shared, drawn)
    return drawn


def perturbed(drawn: Tensor, keys: Tensor, stream: str, strength: float) -> Tensor:
    """[B, C, h, w] the noise that the input gets: with a strength, a little more than the target knows of.

    Source: https://arxiv.org/abs/2301.11706.
    """
    if not strength:
        return drawn
    more = rng.normals(keys, tuple(drawn.shape[1:]), f"{stream}/perturbation")
    return drawn + strength * to_like(more, drawn)


def offset(
    keys: Tensor,
    channels: int,
    stream: str,
    *,
    strength: float,
    random_strength: bool = False,
    scale: Tensor | None = None,
) -> Tensor:
    """[B, C, 1, 1] float32 noise that all pixels of a channel share.

    Source: https://www.crosslabs.org/blog/diffusion-with-offset-noise.

    Args:
        keys: [B] int64, see otl/rng.py.
        strength: standard deviation.
        random_strength: the strength of each image is uniform between 0 and `strength`.
        scale: [B] further factor of each image; see `offset_scale`.
    """
    drawn = strength * rng.normals(keys, (channels, 1, 1), f"{stream}/offset")
    if random_strength:
        drawn *= per_sample(rng.uniforms(keys, f"{stream}/offset_strength"), drawn)
    return drawn if scale is None else drawn * per_sample(scale, drawn)


def offset_scale(snr: Tensor, last: float) -> Tensor:
    """[B] signal to noise ratios -> [B] strength of generalized offset noise, 1 at the last step.

    The balanced schedule of https://arxiv.org/abs/2412.03134, where the noise of the reverse steps is offset by as
    much as that of the noisy latents. Its recursion (algorithm 1) has a closed form: psi_t = sigma_t / sigma_T, with
    sigma = snr^-1/2. OneTrainer's has another factor of sqrt(alpha_bar_T / alpha_bar_t).

    Args:
        last: signal to noise ratio of the last step; above 0.
    """
    return (last / snr).sqrt()


def last_snr(schedule: Noise) -> float:
    """Signal to noise ratio of the last step, for `offset_scale`.

    Raises:
        SettingsError: it is 0, so that the offset would be 0 at every other step.
    """
    agreement.require_offset(pure=ends_in_noise(schedule))
    return snr_at_the_end(schedule)


def ends_in_noise(schedule: Noise) -> bool:
    """Whether nothing of the picture is left at the last timestep (zero terminal SNR, a flow)."""
    return snr_at_the_end(schedule) <= 0


def snr_at_the_end(schedule: Noise) -> float:
    return schedule.snr(schedule.sample(torch.ones(1, dtype=torch.float64))).item()


def multires(keys: Tensor, shape: tuple[int, int, int], stream: str, *, iterations: int, discount: float) -> Tensor:
    """[B, C, h, w] float32: what coarser and coarser resolutions add to noise; see `normalized`.

    Each level is 2 to 4 times to the power of its number coarser than the one before, drawn for each image, until a
    side has one pixel.
    Source: https://wandb.ai/johnowhitaker/multires_noise/reports/Multi-Resolution-Noise-for-Diffusion-Model-Training.

    Args:
        keys: [B] int64, see otl/rng.py.
        shape: C, h, w.
        iterations: levels, with the finest, which the noise is itself.
        discount: strength of each level relative to the one before.
    """
    return torch.stack([_coarser(int(key), shape, stream, iterations, discount) for key in keys])


def _coarser(key: int, shape: tuple[int, int, int], stream: str, iterations: int, discount: float) -> Tensor:
    channels, *size = shape
    total = torch.zeros(shape)
    h, w = size
    for level in range(1, iterations):
        ratio = (2 + 2 * rng.uniform(key, stream, "multires_ratio", level)) ** level
        h, w = max(1, int(h / ratio)), max(1, int(w / ratio))
        drawn = torch.randn(1, channels, h, w, generator=rng.generator(key, stream, "multires", level))
        total += discount**level * F.interpolate(drawn, size=size, mode="bilinear")[0]
        if h == 1 or w == 1:
            break
    return total


def normalized(noise: Tensor, coarser: Tensor) -> Tensor:
    """[B, C, h, w] base noise and what `multires` gave -> their sum, of standard deviation 1 in each image."""
    # The source adds its finest level, as fine as the noise, to the noise: two white noises are one of sqrt(2).
    both = math.sqrt(2) * noise + coarser
    return both / both.flatten(1).std(1).reshape(-1, *[1] * (noise.dim() - 1))
