"""Losses: pure functions, one number per sample."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

SNR_LIMIT = 1000.0  # debiased weights: above it the weight stays as it is


def distance(predicted: Tensor, target: Tensor, *, type: str = "mse", huber_delta: float = 1.0) -> Tensor:
    """Two [B, ...] -> [B] float32, the mean over all axes but the first.

    Args:
        type: "mse", "mae", "huber" or "log_cosh".
        huber_delta: where huber turns from half the square to straight.
    """
    predicted, target = predicted.float(), target.float()
    if type == "mse":
        each = F.mse_loss(predicted, target, reduction="none")
    elif type == "mae":
        each = F.l1_loss(predicted, target, reduction="none")
    elif type == "huber":
        each = F.huber_loss(predicted, target, reduction="none", delta=huber_delta)
    elif type == "log_cosh":
        difference = (predicted - target).abs()
        each = difference + F.softplus(-2 * difference) - math.log(2)
    else:
        raise ValueError(f"loss.type={type} is not one of mse, mae, huber, log_cosh")
    return each.flatten(1).mean(1)


def snr_weight(snr: Tensor, *, weight: str, gamma: float, prediction: str) -> Tensor:
    """[B] signal to noise ratios -> [B] multipliers of the loss.

    Finite for every ratio, also 0 (zero-terminal-SNR). With v-prediction the loss already carries a factor of
    snr + 1 over that of epsilon, which the divisor takes back; with sample prediction a factor of snr.

    Args:
        weight: "constant", "min_snr" (https://arxiv.org/abs/2303.09556), "debiased"
            (https://arxiv.org/abs/2310.08442) or "p2" (https://arxiv.org/abs/2204.00227).
        gamma: the cap of min_snr, the exponent of p2.
    """
    v = prediction == "v_prediction"
    if weight == "constant":
        return torch.ones_like(snr)
    if weight == "min_snr":
        capped = snr.clamp(max=gamma)
        if prediction == "sample":
            return capped
        # At snr 0 the quotient's limit for epsilon is 1.
        return capped / (snr + 1) if v else torch.where(snr > 0, capped / snr.clamp(min=1e-12), torch.ones_like(snr))
    if weight == "debiased":
        return (snr.clamp(1e-8, SNR_LIMIT) + (1 if v else 0)).rsqrt()
    if weight == "p2":
        return ((2 if v else 1) + snr) ** -gamma
    raise ValueError(f"loss.weight={weight} is not one of constant, min_snr, debiased, p2")
