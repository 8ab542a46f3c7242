"""Losses and their weights: pure functions, one number per sample."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from otl.config import HuberSchedule, Loss, LossWeight
from otl.moving import per_sample
from otl.types import Noise

SNR_LIMIT = 1000.0  # debiased weights: above it the weight stays as it is
HUBER_DELTA, HUBER_DELTA_SCHEDULED = 1.0, 0.1  # where none is given; the second is kohya's
GAMMAS = {LossWeight.min_snr: 5.0, LossWeight.p2: 1.0}  # where none is given; those of the papers


def distance(
    predicted: Tensor,
    target: Tensor,
    *,
    factors: Mapping[str, float],
    huber_delta: float | Tensor = 1.0,
    weights: Tensor | None = None,
) -> Tensor:
    """Two [B, ...] -> [B] float32, the mean over all axes but the first.

    Args:
        factors: of "mse", "mae", "huber" and "log_cosh", which are added up.
        huber_delta: where huber turns from half the square to straight; a number, or [B].
        weights: [B, 1, ...] of each position, broadcast over the channels; None: all alike.
    """
    predicted, target = predicted.float(), target.float()
    each: Tensor | None = None
    for type, factor in factors.items():
        one = elementwise(predicted, target, type=type, huber_delta=huber_delta)
        one = one if factor == 1 else factor * one
        each = one if each is None else each + one
    assert each is not None
    if weights is not None:
        each = each * weights.to(each)
    return each.flatten(1).mean(1)


def elementwise(predicted: Tensor, target: Tensor, *, type: str, huber_delta: float | Tensor = 1.0) -> Tensor:
    """Two [B, ...] float32 -> the distance of each pair of numbers."""
    if type == "mse":
        return F.mse_loss(predicted, target, reduction="none")
    if type == "mae":
        return F.l1_loss(predicted, target, reduction="none")
    if type == "huber" and not isinstance(huber_delta, Tensor):
        return F.huber_loss(predicted, target, reduction="none", delta=huber_delta)
    difference = (predicted - target).abs()
    if type == "huber":
        inside = torch.minimum(difference, per_sample(torch.as_tensor(huber_delta), difference))
        return inside * (difference - 0.5 * inside)
    if type == "log_cosh":
        return difference + F.softplus(-2 * difference) - math.log(2)
    raise ValueError(f"loss.type={type} is not one of mse, mae, huber, log_cosh")


def factors(options: Loss) -> dict[str, float]:
    """Which distances are added up: `loss.mix`, or else `loss.type` alone."""
    return {name: factor for name, factor in vars(options.mix).items() if factor} or {options.type.value: 1.0}


def huber_delta(options: Loss, schedule: Noise, t: Tensor) -> float | Tensor:
    """Where huber turns straight at timesteps [B]: one number, or [B] float64.

    Both schedules fall from 1 at the picture to the delta of the settings at pure noise. Source: kohya's sd-scripts,
    `huber_schedule`, after https://arxiv.org/abs/2403.16728.
    """
    if options.huber_schedule is HuberSchedule.constant:
        return HUBER_DELTA if options.huber_delta is None else options.huber_delta
    last = HUBER_DELTA_SCHEDULED if options.huber_delta is None else options.huber_delta
    if options.huber_schedule is HuberSchedule.exponential:
        return last ** schedule.share(t)
    sigma = schedule.snr(t).rsqrt()
    return last + (1 - last) / (1 + sigma) ** 2


def timestep_weight(options: Loss, schedule: Noise, t: Tensor) -> Tensor | None:
    """[B] timesteps -> [B] multipliers of the loss; None where all are 1."""
    if options.weight is LossWeight.constant:
        return None
    snr = schedule.snr(t)
    if options.weight is LossWeight.sigma:
        return sigma_weight(snr)
    gamma = options.gamma if options.gamma is not None else GAMMAS.get(options.weight, 0.0)
    return snr_weight(snr, weight=options.weight.value, gamma=gamma, prediction=schedule.prediction)


def snr_weight(snr: Tensor, *, weight: str, gamma: float, prediction: str) -> Tensor:
    """[B] signal to noise ratios -> [B] multipliers of the loss.

    Finite for every ratio, also 0 (zero-terminal-SNR). The loss of a sample prediction is 1 / snr of that of an
    epsilon prediction, so that its weights are snr times as large. With v-prediction snr + 1 stands in the divisor
    where snr does with epsilon, as OneTrainer has it.

    Args:
        weight: "min_snr" (https://arxiv.org/abs/2303.09556), "debiased" (https://arxiv.org/abs/2310.08442) or "p2"
            (https://arxiv.org/abs/2204.00227).
        gamma: the cap of min_snr, the exponent of p2.
        prediction: "epsilon", "v_prediction" or "sample".
    """
    v = prediction == "v_prediction"
    if weight == "min_snr":
        capped = snr.clamp(max=gamma)
        if prediction == "sample":
            return capped
        # At snr 0 the quotient's limit for epsilon is 1.
        return capped / (snr + 1) if v else torch.where(snr > 0, capped / snr.clamp(min=1e-12), torch.ones_like(snr))
    if weight == "debiased":
        if prediction == "sample":
            return snr.clamp(max=SNR_LIMIT).sqrt()
        return (snr.clamp(1e-8, SNR_LIMIT) + (1 if v else 0)).rsqrt()
    if weight == "p2":
        return ((2 if v else 1) + snr) ** -gamma * (snr if prediction == "sample" else 1)
    raise ValueError(f"loss.weight={weight} is not one of min_snr, debiased, p2")


def sigma_weight(snr: Tensor) -> Tensor:
    """[B] signal to noise ratios -> [B] shares of noise in latents of the form (1 - sigma) latents + sigma noise.

    OneTrainer's SIGMA: little weight where a flow is nearly the picture.
    """
    return 1 / (1 + snr.sqrt())


def position_weights(mask: Tensor, size: tuple[int, int], *, unmasked: float, normalize: bool) -> Tensor:
    """[B, 1, H, W] masks in 0..1 -> [B, 1, h, w] weights of the latents' positions; finite for a mask of zeros.

    Args:
        size: h and w; a position's mask is the mean over its pixels.
        unmasked: the least weight.
        normalize: divide by each image's mean weight, so that small masks count as much as large ones.
    """
    mask = mask.float()
    if mask.shape[-2:] != size:
        mask = F.interpolate(mask, size=size, mode="area")
    weights = mask.clamp(min=unmasked)
    if not normalize:
        return weights
    return weights / weights.mean(dim=(1, 2, 3), keepdim=True).clamp(min=1e-6)
