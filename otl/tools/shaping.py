"""What becomes of a mask before it is written: pure functions of arrays [h, w]."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageFilter


def grown(white: np.ndarray, radius: int) -> np.ndarray:
    """Bool [h, w]: white reaches `radius` pixels further in every direction; below 0 black does."""
    return ~_reached(~white, -radius) if radius < 0 else _reached(white, radius)


def _reached(white: np.ndarray, radius: int) -> np.ndarray:
    """The pixels that lie at most `radius` pixels from a white one."""
    h, w = white.shape
    columns = np.broadcast_to(np.arange(w), (h, w))
    left = np.maximum.accumulate(np.where(white, columns, -(h + w)), axis=1)
    right = np.minimum.accumulate(np.where(white, columns, 2 * w + h)[:, ::-1], axis=1)[:, ::-1]
    distance = np.minimum(columns - left, right - columns)  # to the nearest white pixel of the row
    found = np.zeros_like(white)
    for dy in range(-min(radius, h - 1), min(radius, h - 1) + 1):
        here, there = slice(max(0, dy), h + min(0, dy)), slice(max(0, -dy), h - max(0, dy))
        found[here] |= distance[there] <= math.isqrt(radius**2 - dy**2)
    return found


def smoothed(white: np.ndarray, radius: float) -> np.ndarray:
    """Bool [h, w] -> float32 in 0..1, blurred by a Gaussian whose standard deviation is `radius` pixels, 0: not."""
    grey = Image.fromarray(white.astype(np.uint8) * 255)
    return np.asarray(grey.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255


def combined(old: np.ndarray, new: np.ndarray, mode: str, alpha: float) -> np.ndarray:
    """What an image's mask becomes, float32 [h, w] in 0..1.

    Args:
        old: what it has.
        new: what was found.
        mode: add (white where either is), subtract (black where the new one is white), blend, or replace.
        alpha: share of the new one in a blend, 0..1.
    """
    match mode:
        case "add":
            return np.maximum(old, new)
        case "subtract":
            return np.minimum(old, 1 - new)
        case "blend":
            return old + alpha * (new - old)
    return new
