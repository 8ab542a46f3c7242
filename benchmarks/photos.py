"""Folders of made-up photographs with captions: smooth shapes and grain, which compress about as photographs do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

GRAIN = 6.0  # standard deviation, of 255 levels
BLOBS = 24  # pixels per side of the picture that is enlarged


def write(folder: Path, count: int, *, height: int, width: int) -> Path:
    """`count` JPEG files of one size, each with a caption; made once."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        path = folder / f"photo-{number:04d}.jpg"
        if not path.is_file():
            path.with_suffix(".txt").write_text(f"a photo, number {number}")
            photo(number, height, width).save(path, quality=92)
    return folder


def photo(number: int, height: int, width: int) -> Image.Image:
    """A picture that depends on its number alone."""
    draw = np.random.default_rng(number)
    blobs = Image.fromarray(draw.integers(0, 256, (BLOBS, BLOBS, 3), dtype=np.uint8))
    smooth = np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC), dtype=np.float32)
    grain = draw.normal(0, GRAIN, (height, width, 1)).astype(np.float32)
    return Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
