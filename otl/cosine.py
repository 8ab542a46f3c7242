"""The cosine noise schedule over a continuous time (Wuerstchen, Stable Cascade)."""

from __future__ import annotations

import math

from torch import Tensor

from otl.moving import per_sample

OFFSET = 0.008  # s in https://arxiv.org/abs/2102.09672, equation 17
CLAMP = (0.0001, 0.9999)  # of the share of the signal


class Cosine:
    """alpha_bar(t) = cos^2((t + s) / (1 + s) * pi / 2), 1 at t = 0, clamped; the denoiser predicts the noise.

    Args:
        s: offset that keeps the first steps from being too small.
        stretch, start: t = stretch * share + start for shares of the schedule in 0..1, clamped to `limits`.
        limits: smallest and largest time that is trained.
    """

    prediction = "epsilon"

    def __init__(
        self,
        *,
        s: float = OFFSET,
        stretch: float = 1.0,
        start: float = 0.001,
        limits: tuple[float, float] = (0.001, 1.0),
    ) -> None:
        self.s, self.stretch, self.start, self.limits = s, stretch, start, limits
        self.initial = math.cos(s / (1 + s) * math.pi / 2) ** 2

    def time(self, alpha_bar: float) -> float:
        """The time at which so much of the signal is left: the inverse of `alpha_bars` between its clamps."""
        return math.acos(math.sqrt(alpha_bar * self.initial)) / (math.pi / 2) * (1 + self.s) - self.s

    def alpha_bars(self, t: Tensor) -> Tensor:
        """[B] times in 0..1 -> [B] float64 share of the signal that is left."""
        angle = (t.double() + self.s) / (1 + self.s) * math.pi / 2
        return (angle.cos() ** 2 / self.initial).clamp(*CLAMP)

    def sample(self, u: Tensor) -> Tensor:
        """[B] shares of the schedule in 0..1 -> [B] float32 times."""
        return (self.stretch * u + self.start).clamp(*self.limits).float()

    def share(self, t: Tensor) -> Tensor:
        """[B] times -> [B] float64 shares of the schedule."""
        return ((t.cpu().double() - self.start) / self.stretch).clamp(0, 1)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """[B] times -> the factors of signal and noise, each [B, 1, ...]."""
        bars = self.alpha_bars(t)
        return per_sample(bars.sqrt(), like), per_sample((1 - bars).sqrt(), like)

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """[B, ...] latents and noise, [B] times -> [B, ...] noisy latents."""
        signal, sigma = self.scales(t, latents)
        return signal * latents + sigma * noise

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """[B, ...] what the denoiser should predict."""
        return noise

    def snr(self, t: Tensor) -> Tensor:
        """[B] times -> [B] float64 signal to noise ratio, in 1e-4..1e4."""
        bars = self.alpha_bars(t)
        return bars / (1 - bars)
