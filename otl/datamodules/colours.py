"""Brightness, contrast, saturation and hue of an image: one linear function of its red, green and blue."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from otl.datamodules.views import UNCHANGED, Colours

# Luma and the two chroma axes of NTSC, from red, green and blue. Luma is ITU-R BT.601's, as Pillow has it.
YIQ = torch.tensor([[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]])


def adjusted(levels: Tensor, colours: Colours) -> Tensor:
    """float32 [3, H, W] in 0..255, red, green and blue -> the same.

    Brightness multiplies; contrast multiplies the distance from the image's mean luma; saturation multiplies the
    distance of each pixel from its own luma; so it is in Pillow's ImageEnhance. Hue turns the plane of chroma, from red
    towards yellow; luma stays.
    """
    if colours == UNCHANGED:
        return levels
    matrix = colours.brightness * colours.contrast * _chroma(colours.saturation, colours.hue)
    mean = colours.brightness * (YIQ[0] @ levels.mean(dim=(1, 2)))
    changed = (matrix @ levels.flatten(1)).add_(mean * (1 - colours.contrast)).clamp_(0, 255)
    return changed.reshape(levels.shape)


def _chroma(saturation: float, hue: float) -> Tensor:
    """[3, 3]: red, green and blue -> the same, with chroma scaled and turned."""
    along, across = saturation * math.cos(math.radians(hue)), saturation * math.sin(math.radians(hue))
    turned = torch.tensor([[1.0, 0, 0], [0, along, across], [0, -across, along]])
    return torch.linalg.inv(YIQ) @ turned @ YIQ
