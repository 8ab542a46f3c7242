"""The shared nouns: what the floors hand to each other."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from otl.config import Problem as Problem
from otl.epochs import StopAfter
from otl.sizes import Crop as Crop
from otl.sizes import Size as Size

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from otl.modules.base import DiffusionModule

Dtype = Literal["auto", "fp32", "bf16", "fp16"]
"""Of frozen weights; auto: the precision's own."""

Prediction = Literal["epsilon", "v_prediction", "sample"]
"""What a denoiser over discrete timesteps predicts."""

Cond = dict[str, Tensor]
"""What a family's text encoders give; axis 0 is the batch."""


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
    prior: Tensor | None = None  # [B] bool, the target is what the frozen model predicts; None: of no sample


class Noise(Protocol):
    """A noise schedule: how a family's latents are noised and what its denoiser predicts."""

    prediction: str
    """What the denoiser predicts: "epsilon", "v_prediction", "sample", or "flow" (noise minus latents)."""

    def sample(self, u: Tensor) -> Tensor:
        """[B] shares of the schedule, 0 the picture and 1 noise -> [B] timesteps as the denoiser takes them.

        The settings of `noise`, distribution and range, have made `u` already: see otl/timesteps.py.
        """
        ...

    def share(self, t: Tensor) -> Tensor:
        """[B] timesteps -> [B] float64 shares of the schedule."""
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
    stop_after: StopAfter | None = None  # None: never


@runtime_checkable
class Captions(Protocol):
    """A method that has captions for images without any."""

    def captions(self, concept: str) -> list[str]:
        """Of the images of a concept, one of which is chosen each time; empty: it has none."""
        ...


@runtime_checkable
class Advising(Protocol):
    """A method that knows which of its settings do not fit the layers that it has found."""

    def advice(self, module: DiffusionModule) -> Iterator[Problem]:
        """What is wrong or strange; `module` is at least a skeleton."""
        ...


class Captioner(Protocol):
    """What `task=caption` asks."""

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Get the weights, there and in that dtype.

        Raises:
            SettingsError: that cannot be.
        """
        ...

    def captions(self, images: list[Image]) -> list[str]:
        """RGB images -> a caption for each."""
        ...


class Masker(Protocol):
    """What `task=mask` asks."""

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """As a captioner's."""
        ...

    def masks(self, images: list[Image]) -> list[np.ndarray]:
        """RGB images -> bool [h, w] for each, in its size: what is white."""
        ...


class Method(Protocol):
    """What trains. Every part of the model arrives frozen."""

    whole_parts: tuple[str, ...]
    """Parts that train whole: loaded in fp32, since rounding them first would lose what the checkpoint holds."""
    output_settings: tuple[str, ...]
    """The fields of `output` that are for its kind of file alone, of `format`, `checkpoint_format` and `trigger`."""

    def attach(self, module: DiffusionModule) -> list[ParamGroup]:
        """Make trainable what this method trains, and say in which groups."""
        ...

    def export(self, module: DiffusionModule, path: Path) -> Path:
        """Write what was trained to `path` plus a suffix, read it back, compare, and return the file or folder."""
        ...


class File(Protocol):
    """Of a dataset: a `Path`, or what has the same few methods and lies elsewhere. Read through these alone."""

    @property
    def name(self) -> str: ...

    @property
    def stem(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    def __str__(self) -> str: ...

    def read_bytes(self) -> bytes: ...

    def open(self, mode: str) -> IO[bytes]:
        """To be read, mode "rb", a part at a time."""
        ...


@dataclass(slots=True)
class Sample:
    """One image of the dataset as the scan found it: headers only, no pixels."""

    path: File
    size: Size  # upright: EXIF orientation applied
    captions: list[str]  # one is chosen each time; [""] where there is none
    concept: str = "data"
    weight: float = 1.0  # loss multiplier
    validation: bool = False
    prior: bool = False  # the target is what the model predicts without its adapters
    caption_missing: bool = False
    bytes: int = 0  # of the file
    mask: File | None = None  # a file whose white is to be painted: for inpainting models

    @property
    def name(self) -> str:
        return self.path.name


Progress = Callable[[Iterable[Any], str, int], Iterator[Any]]
"""(items, what is done, how many) -> the same items, shown as a bar."""


@dataclass
class LoraLayer:
    """One layer of a LoRA: delta = alpha / rank * up @ down (https://arxiv.org/abs/2106.09685).

    With a magnitude it is a DoRA: weight + delta, each output's row brought to the length that the magnitude says
    (https://arxiv.org/abs/2402.09353).
    """

    down: Tensor  # [rank, in] or [rank, in, kh, kw]
    up: Tensor  # [out, rank] or [out, rank, 1, 1]
    alpha: float
    magnitude: Tensor | None = None  # [out]
    frozen_lengths: bool = False  # rows are divided by their frozen length, not their adapted one: ComfyUI's DoRA


@dataclass
class LohaLayer:
    """One layer of a LoHa: delta = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b) (https://arxiv.org/abs/2108.06098).

    A convolution's kernel is flattened, or carried by t1 and t2 (Tucker), and then w1_a and w2_a lie [rank, out].
    """

    w1_a: Tensor  # [out, rank]
    w1_b: Tensor  # [rank, in * kh * kw], Tucker [rank, in]
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None  # [rank, rank, kh, kw]
    t2: Tensor | None = None


@dataclass
class LokrLayer:
    """One layer of a LoKr: delta = alpha / rank * kron(w1, w2) (https://arxiv.org/abs/2309.14859).

    Each factor is whole or a product of two. Where both are whole there is no rank, and alpha does nothing.
    """

    alpha: float
    w1: Tensor | None = None  # [a, c] with out = a * b and in = c * d
    w1_a: Tensor | None = None  # [a, rank]
    w1_b: Tensor | None = None  # [rank, c]
    w2: Tensor | None = None  # [b, d] or [b, d, kh, kw]
    w2_a: Tensor | None = None  # [b, rank], Tucker [rank, b]
    w2_b: Tensor | None = None  # [rank, d * kh * kw], Tucker [rank, d]
    t2: Tensor | None = None  # [rank, rank, kh, kw]


@dataclass
class OftLayer:
    """One layer of an OFT: the outputs' weights rotated block by block (https://arxiv.org/abs/2306.07280).

    With Q = blocks - blocks^T, which is skew, the rotation is Cayley's (I + Q) (I - Q)^-1.
    """

    blocks: Tensor  # [out / size, size, size]


AdapterLayer = LoraLayer | LohaLayer | LokrLayer | OftLayer
AdapterState = dict[str, dict[str, AdapterLayer]]
"""part ("unet", "text_encoder", ...) -> module path inside the part -> layer."""
LoraState = AdapterState
