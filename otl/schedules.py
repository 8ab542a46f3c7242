"""Learning rate schedules: the factor of the learning rate at an optimizer step. Imports no torch."""

from __future__ import annotations

import math


def warmup_steps(warmup: float, total_steps: int) -> int:
    """Steps of the warm-up: `warmup` itself, or that share of the run where it is below 1."""
    return round(warmup * total_steps) if warmup < 1 else int(warmup)


def ramp(step: int, steps: int) -> float:
    """1/steps at step 0, so that no step is without effect; 1 from the end of the warm-up on."""
    return min(1.0, (step + 1) / steps) if steps else 1.0


def progress(step: int, total_steps: int, warmup: int) -> float:
    """Share of the run after the warm-up that is over, 0..1."""
    return min(1.0, max(0.0, (step - warmup) / max(1, total_steps - warmup)))


def constant(step: int, total_steps: int, *, warmup: float = 0) -> float:
    """1 after the warm-up."""
    return ramp(step, warmup_steps(warmup, total_steps))


def linear(step: int, total_steps: int, *, warmup: float = 0, end: float = 0.0) -> float:
    """Straight from 1 after the warm-up to `end` at the end, and `end` from there on."""
    first = warmup_steps(warmup, total_steps)
    return ramp(step, first) * (1 - (1 - end) * progress(step, total_steps, first))


def cosine(step: int, total_steps: int, *, warmup: float = 0, end: float = 0.0) -> float:
    """Half a cosine from 1 after the warm-up to `end` at the end, and `end` from there on."""
    first = warmup_steps(warmup, total_steps)
    half = 0.5 * (1 + math.cos(math.pi * progress(step, total_steps, first)))
    return ramp(step, first) * (end + (1 - end) * half)
