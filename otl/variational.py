"""The variational bound by which a denoiser learns the variance of its reverse steps: pure functions.

Section 3 of Improved DDPM (https://arxiv.org/abs/2102.09672), as DiT and PixArt train with it. In all of it
`alpha_bars` is [T] float64, above 0, the share of the signal left after each step, and `t` is [B] timesteps.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otl.moving import per_sample

HALF_BIN = 1 / 255  # 256 levels over -1..1
SMALLEST = 1e-12  # probability of a bin; its logarithm stays finite


def bound(noise: Tensor, fraction: Tensor, latents: Tensor, noisy: Tensor, alpha_bars: Tensor, t: Tensor) -> Tensor:
    """[B, C, h, w] float32 bits of each element: how badly the predicted step back fits the true one.

    t > 0: KL(q(x[t-1] | x[t], x[0]) || p(x[t-1] | x[t])), both Gaussian; t = 0: -log p(x[0] | x[1]) in 256 levels.

    Args:
        noise: [B, C, h, w] as predicted; gets no gradient, so that the bound teaches the variance alone.
        fraction: [B, C, h, w] as predicted, -1..1: where the log variance lies between the smallest and the largest.
        latents, noisy: [B, C, h, w] x[0] and x[t].
    """
    noise, fraction, latents, noisy = noise.detach().float(), fraction.float(), latents.float(), noisy.float()
    smallest, largest = (at(values, t, noisy) for values in log_variances(alpha_bars))
    signal = at(alpha_bars, t, noisy)
    guess = (noisy - (1 - signal).sqrt() * noise) / signal.sqrt()
    mean = posterior_mean(guess, noisy, alpha_bars, t)
    log_variance = torch.lerp(smallest, largest, (fraction + 1) / 2)
    apart = gaussian_kl(posterior_mean(latents, noisy, alpha_bars, t), smallest, mean, log_variance)
    last = -binned_log_likelihood(latents, mean, log_variance)
    return torch.where(per_sample(t == 0, noisy) > 0, last, apart) / math.log(2)


def at(values: Tensor, t: Tensor, like: Tensor) -> Tensor:
    """[T] values -> those at t, [B, 1, ...] in the dtype and on the device of `like`."""
    return per_sample(values[t.to(values.device)], like)


def steps(alpha_bars: Tensor) -> tuple[Tensor, Tensor]:
    """[T] betas, and [T] alpha bars of the step before: all signal before the first."""
    before = torch.cat([alpha_bars.new_ones(1), alpha_bars[:-1]])
    return 1 - alpha_bars / before, before


def log_variances(alpha_bars: Tensor) -> tuple[Tensor, Tensor]:
    """[T] smallest and [T] largest log variance of a step back: of x[t-1] given x[0], and of the step itself.

    The smallest at t = 0 is nothing; that of t = 1 stands in.
    """
    betas, before = steps(alpha_bars)
    posterior = betas * (1 - before) / (1 - alpha_bars)
    return torch.cat([posterior[1:2], posterior[1:]]).log(), betas.log()


def posterior_mean(latents: Tensor, noisy: Tensor, alpha_bars: Tensor, t: Tensor) -> Tensor:
    """[B, C, h, w] the mean of x[t-1] given x[0] and x[t]: equation 7 of https://arxiv.org/abs/2006.11239."""
    betas, before = steps(alpha_bars)
    of_latents = betas * before.sqrt() / (1 - alpha_bars)
    of_noisy = (1 - before) * (1 - betas).sqrt() / (1 - alpha_bars)
    return at(of_latents, t, noisy) * latents + at(of_noisy, t, noisy) * noisy


def gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """Nats by which a Gaussian differs from another, for each element."""
    ratio = log_variance - other_log_variance
    return 0.5 * (ratio.exp() - ratio - 1 + (mean - other_mean) ** 2 * (-other_log_variance).exp())


def binned_log_likelihood(values: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the probability that a Gaussian gives to the bin of each value; the outermost bins are open."""
    scale = (-0.5 * log_variance).exp()
    below = normal_cdf(scale * (values - mean - HALF_BIN))
    above = normal_cdf(scale * (values - mean + HALF_BIN))
    inside = torch.where(values < -0.999, above, torch.where(values > 0.999, 1 - below, above - below))
    return inside.clamp(min=SMALLEST).log()


def normal_cdf(x: Tensor) -> Tensor:
    """The approximation that the weights were trained with (Page 1977), within 2e-4 of the true one."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
