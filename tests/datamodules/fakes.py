"""Tiny pictures on disk, and an encoder that counts what it is asked for."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional

from otl.config import Data, Inpaint
from otl.datamodules.bucketed import BucketedDataModule
from otl.types import Batch, Cond


class CountingEncoder:
    """Latents are pixels at a quarter of the sides; conditioning is the lengths of the captions."""

    def __init__(self, image: str = "vae", prompt: str = "clip") -> None:
        self.image, self.prompt = image, prompt
        self.images = 0
        self.prompts: list[str] = []
        self.batches: list[int] = []

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def encode_image(self, pixels: Tensor) -> Tensor:
        self.images += len(pixels)
        self.batches.append(len(pixels))
        return functional.avg_pool2d(pixels, 4)

    def encode_prompt(self, captions: list[str]) -> Cond:
        self.prompts += captions
        return {"hidden": torch.tensor([[len(caption)] * 3 for caption in captions], dtype=torch.float32)}

    def image_identity(self) -> str:
        return self.image

    def prompt_identity(self) -> str:
        return self.prompt


def picture(path: Path, *, h: int = 64, w: int = 64, shade: int = 0, caption: str | None = "a picture") -> Path:
    """One flat picture, with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (w, h), (shade, 255 - shade, 128)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def folder(path: Path, count: int) -> Path:
    """Pictures in two buckets, two square ones for each tall one, every one with a caption of its own length."""
    for number in range(count):
        h = 128 if number % 3 == 2 else 64
        picture(path / f"{number}.png", h=h, shade=number * 5, caption="x" * (number + 1))
    return path


def data(path: Path, **settings: object) -> Data:
    return Data(path=str(path), **({"cache_dir": str(path.parent / "cache"), "workers": 0} | settings))


def module(
    settings: Data, *, resolution: int = 64, seed: int = 7, inpaint: Inpaint | None = None
) -> BucketedDataModule:
    """Scanned."""
    made = BucketedDataModule(settings, resolution=resolution, step=8, seed=seed, inpaint=inpaint)
    made.setup("fit")
    return made


def same(one: Batch, other: Batch) -> bool:
    """Whether two batches agree bit for bit."""

    def equal(a: object, b: object) -> bool:
        if isinstance(a, Tensor):
            return isinstance(b, Tensor) and torch.equal(a, b)
        if isinstance(a, dict):
            return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
        return a == b

    return all(equal(a, b) for a, b in zip(one, other, strict=True))
