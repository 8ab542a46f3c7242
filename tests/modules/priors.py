"""What the tests of Wuerstchen and Stable Cascade share."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from PIL import Image
from torch import Tensor

from otl.modules.cascaded import CascadedModule
from otl.modules.efficientnet import EfficientNetEncoder
from otl.types import Batch
from tests.tiny_priors import options

CAPTIONS = ["a small red circle", "a photo of a cat"]
H, W = 128, 256


def loaded(family: type[CascadedModule], folder: Path, **settings: Any) -> CascadedModule:
    module = family(str(folder), **options(folder) | settings)
    module.configure_model()
    module.data_resolution = 128
    return module


def pixels() -> Tensor:
    return torch.rand(2, 3, H, W, generator=torch.Generator().manual_seed(1)) * 2 - 1


def noise() -> Tensor:
    return torch.randn(2, 16, 3, 6, generator=torch.Generator().manual_seed(2))


def batch() -> Batch:
    return Batch(
        index=torch.arange(2),
        key=torch.tensor([5, 6]),
        captions=CAPTIONS,
        original_size=torch.tensor([[480, 640], [1080, 1920]]),
        crop=torch.zeros(2, 2, dtype=torch.long),
        target_size=torch.tensor([[H, W]] * 2),
        weight=torch.tensor([1.0, 2.0]),
        pixels=pixels(),
        noise=noise(),
    )


def shrunk(picture: Tensor) -> Tensor:
    """[3, H, W] -> three quarters of each side, by Pillow."""
    size = (picture.shape[2] * 3 // 4, picture.shape[1] * 3 // 4)
    channels = [Image.fromarray(each.numpy(), "F").resize(size, Image.Resampling.BILINEAR) for each in picture]
    return torch.stack([torch.from_numpy(numpy.asarray(each).copy()) for each in channels])


def features(folder: Path) -> Tensor:
    """[2, 16, 3, 6] the image encoder's output for the pictures of `batch`, by hand."""
    encoder = EfficientNetEncoder.from_pretrained(folder / "effnet").eval()
    small = torch.stack([shrunk((picture + 1) / 2) for picture in pixels()])
    mean = torch.tensor([0.485, 0.456, 0.406]).reshape(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).reshape(3, 1, 1)
    with torch.no_grad():
        return encoder.mapper(encoder.backbone((small - mean) / std))


class Recorder:
    """In the place of the decoders: notes what they would read."""

    decoder = SimpleNamespace(dtype=torch.float32)

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, *, image_embeddings: Tensor, generator: Any, **_: Any) -> SimpleNamespace:
        self.seen.append(image_embeddings)
        return SimpleNamespace(images=torch.zeros(1, 3, 8, 8))


def apart(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures, in levels of 0..255."""
    return int(numpy.abs(numpy.asarray(one, dtype=int) - numpy.asarray(other, dtype=int)).max())
