"""The shared nouns: what the floors hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from otl.config import Problem as Problem

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

Cond = dict[str, Tensor]
"""What a family's text encoders give; axis 0 is the batch."""


class Size(NamedTuple):
    """Height and width in pixels."""

    h: int
    w: int

    @property
    def area(self) -> int:
        return self.h * self.w

    def __str__(self) -> str:
        return f"{self.h}x{self.w}"


class Crop(NamedTuple):
    """The offset of a crop in the scaled image, in pixels."""

    top: int
    left: int


class Batch(NamedTuple):
    """B images of one bucket. A NamedTuple, because Lightning moves it and torch pins it."""

    index: Tensor  # type: ignore[assignment]  # [B] int64, sample numbers
    key: Tensor  # [B] int64, the random key of (seed, epoch, sample, repeat): see otl/rng.py
    captions: list[str]  # as trained: after dropout
    original_size: Tensor  # [B, 2] int64 height, width of the file, pixels, upright
    crop: Tensor  # [B, 2] int64 top, left in the scaled image, pixels
    target_size: Tensor  # [B, 2] int64 height, width of the bucket, pixels
    weight: Tensor  # [B] float32 loss multiplier
    pixels: Tensor | None = None  # [B, 3, H, W] float32 in -1..1; None once cached
    latents: Tensor | None = None  # [B, C, h, w] float32, scaled as the denoiser expects
    cond: Cond | None = None  # None where text encoders train or nothing is cached
    noise: Tensor | None = None  # [B, C, h, w] float32, drawn by the loader where the latents are cached
    mask: Tensor | None = None  # [B, 1, H, W] float32, 1 is to be painted: for inpainting models
    masked: Tensor | None = None  # [B, C, h, w] float32, latents of the masked pixels where masks never change


class Noise(Protocol):
    """A noise schedule: how a family's latents are noised and what its denoiser predicts."""

    def sample(self, u: Tensor) -> Tensor:
        """[B] uniform in 0..1 -> [B] timesteps as the denoiser takes them."""
        ...

    def add(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    def target(self, latents: Tensor, noise: Tensor, t: Tensor) -> Tensor: ...

    def snr(self, t: Tensor) -> Tensor:
        """[B] timesteps -> [B] signal to noise ratio."""
        ...


class Encoder(Protocol):
    """All that a cache asks of a model."""

    @property
    def device(self) -> torch.device: ...

    def encode_image(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> latents [B, C, h, w], scaled as the denoiser expects."""
        ...

    def encode_prompt(self, captions: list[str]) -> Cond:
        """B captions -> conditioning, axis 0 is the batch."""
        ...

    def image_identity(self) -> str:
        """A hash of all that `encode_image` depends on besides the pixels: weights, dtype, scaling."""
        ...

    def prompt_identity(self) -> str:
        """A hash of all that `encode_prompt` depends on besides the captions."""
        ...


@dataclass
class ParamGroup:
    """Parameters that share a learning rate."""

    name: str  # "unet", "text_encoder", ...
    params: list[nn.Parameter]
    lr: float | None = None  # None: the optimizer's own


class Method(Protocol):
    """What trains. Every part of the model arrives frozen."""

    whole_parts: tuple[str, ...]
    """Parts that train whole: loaded in fp32, since rounding them first would lose what the checkpoint holds."""

    def attach(self, module: DiffusionModule) -> list[ParamGroup]:
        """Make trainable what this method trains, and say in which groups."""
        ...

    def export(self, module: DiffusionModule, path: Path) -> Path:
        """Write what was trained to `path` plus a suffix, read it back, compare, and return the file or folder."""
        ...


@dataclass
class Sample:
    """One image of the dataset as the scan found it: headers only, no pixels."""

    path: Path
    size: Size  # upright: EXIF orientation applied
    captions: list[str]  # one is chosen each time; [""] where there is none
    concept: str = "data"
    repeats: int = 1  # times an epoch
    weight: float = 1.0  # loss multiplier
    validation: bool = False
    caption_missing: bool = False
    bytes: int = 0  # of the file
    mask: Path | None = None  # a file whose white is to be painted: for inpainting models

    @property
    def name(self) -> str:
        return self.path.name


Progress = Callable[[Iterable[Any], str, int], Iterator[Any]]
"""(items, what is done, how many) -> the same items, shown as a bar."""


@dataclass
class LoraLayer:
    """One adapted layer of a LoRA: delta = alpha / rank * up @ down."""

    down: Tensor  # [rank, in] or [rank, in, kh, kw]
    up: Tensor  # [out, rank] or [out, rank, 1, 1]
    alpha: float


LoraState = dict[str, dict[str, LoraLayer]]
"""part ("unet", "text_encoder", ...) -> module path inside the part -> layer."""
