"""Which timesteps are trained: from a uniform number to a share of the noise schedule, 0 the picture and 1 noise.

Every distribution is given as its quantile function, which rises from 0 to 1. So a sample's timestep stays a function
of its one uniform number: resuming repeats it, and evenly spaced numbers are evenly spaced in the distribution.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from otl.config import NoiseOptions, TimestepDistribution

Quantile = Callable[[Tensor], Tensor]
"""[B] uniform in 0..1 -> [B] float64 in 0..1."""

BELOW_ONE = 1 - 1e-9  # keeps a share out of the first timestep above its range
POINTS = 1 << 16  # of the table of beta's quantiles
LOG_TAIL = -37.0  # of the probability that the table leaves out at either end: float64 cannot add less to 1


def logit_normal(u: Tensor, *, mean: float, std: float) -> Tensor:
    """The sigmoid of a normal number: https://arxiv.org/abs/2403.03206, equation 19."""
    return torch.sigmoid(mean + std * torch.special.ndtri(u.double()))


def heavy_tail(u: Tensor, *, scale: float) -> Tensor:
    """Mode sampling with heavy tails: https://arxiv.org/abs/2403.03206, equation 20, with 1 - u for u.

    Args:
        scale: -1..2 / (pi - 2); above 0 the middle is favoured, below 0 the ends.
    """
    u = u.double()
    return u + scale * (u - torch.sin(math.pi / 2 * u) ** 2)


def beta(alpha: float, beta: float) -> Quantile:
    """The beta distribution, density x^(alpha - 1) (1 - x)^(beta - 1), by a table of its quantiles.

    The density is integrated over z with x = sigmoid(z), where it is smooth whatever the parameters are.
    """
    log_norm = math.lgamma(alpha) + math.lgamma(beta) - math.lgamma(alpha + beta)
    first = min(-1.0, (LOG_TAIL + math.log(alpha) + log_norm) / alpha)
    last = max(1.0, -(LOG_TAIL + math.log(beta) + log_norm) / beta)
    z = torch.linspace(first, last, POINTS, dtype=torch.float64)
    log = torch.nn.functional.logsigmoid
    density = torch.exp(alpha * log(z) + beta * log(-z) - log_norm)
    below = torch.cat([density.new_zeros(1), torch.cumulative_trapezoid(density, z)])
    below = below / below[-1]

    def quantile(u: Tensor) -> Tensor:
        u = u.double().clamp(max=1 - 2**-53)
        above = torch.searchsorted(below, u.contiguous(), right=True)  # below[above - 1] <= u < below[above]
        share = (u - below[above - 1]) / (below[above] - below[above - 1])
        return torch.sigmoid(torch.lerp(z[above - 1], z[above], share))

    return quantile


def shifted(share: Tensor, shift: float) -> Tensor:
    """Moved towards noise (above 1) or the picture (below 1): https://arxiv.org/abs/2403.03206, equation 23.

    At `shift` times the side in pixels, it leaves as much of the picture visible as before.
    """
    return shift * share / (1 + (shift - 1) * share)


class Timesteps:
    """Uniform numbers to shares of the schedule: the distribution, then the shift, then the range.

    Args:
        quantile: of the distribution; None: uniform.
        shift: see `shifted`.
        low, high: the range in 0..1; what the distribution calls 0 and 1 lies there.
    """

    def __init__(
        self, quantile: Quantile | None = None, *, shift: float = 1.0, low: float = 0.0, high: float = 1.0
    ) -> None:
        self.quantile, self.shift, self.low, self.high = quantile, shift, low, high

    @classmethod
    def of(cls, options: NoiseOptions) -> Timesteps:
        return cls(quantile_of(options), shift=options.shift, low=options.min_timestep, high=options.max_timestep)

    def __call__(self, u: Tensor) -> Tensor:
        """[B] uniform in 0..1 -> [B] shares of the schedule in low..high."""
        share = u if self.quantile is None else self.quantile(u)
        if self.shift != 1:
            share = shifted(share, self.shift)
        if (self.low, self.high) == (0, 1):
            return share
        return self.low + (self.high - self.low) * share.double().clamp(max=BELOW_ONE)


def quantile_of(options: NoiseOptions) -> Quantile | None:
    """The distribution that the settings name; None for the uniform one."""
    if options.timesteps is TimestepDistribution.logit_normal:
        return lambda u: logit_normal(u, mean=options.logit_mean, std=options.logit_std)
    if options.timesteps is TimestepDistribution.heavy_tail:
        return lambda u: heavy_tail(u, scale=options.mode_scale)
    if options.timesteps is TimestepDistribution.beta:
        return beta(options.beta_alpha, options.beta_beta)
    return None
