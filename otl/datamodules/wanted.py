"""What the cache has to hold of a dataset's images, and under which keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from otl import rng
from otl.datamodules import images, masks
from otl.datamodules.cache import image_key, masked_key, weights_key
from otl.datamodules.files import content_hash
from otl.datamodules.variations import Variations
from otl.datamodules.views import UNCHANGED, View
from otl.types import File, Sample, Size


@dataclass(frozen=True, slots=True)
class Hole:
    """What of an image is hidden before it is encoded."""

    mask: File
    alpha: bool  # whether it is the file's alpha channel
    fill: float  # value of the masked pixels, -1..1


@dataclass(frozen=True, slots=True)
class Picture:
    """One entry to make: what the key stands for."""

    key: str
    path: File
    view: View
    hole: Hole | None = None  # None: the whole image

    @property
    def kind(self) -> str:
        """For the cache."""
        return "image" if self.hole is None else "masked"

    def pixels(self, background: str) -> Tensor:
        """[3, H, W] in -1..1."""
        whole = images.pixels(self.path, self.view, background)
        if self.hole is None:
            return whole
        return masks.masked(whole, masks.read(self.hole.mask, self.view, alpha=self.hole.alpha), self.hole.fill)


@dataclass(frozen=True, slots=True)
class Weights:
    """One mask of a loss to make, in the size of the latents that it weighs."""

    key: str
    latents: str  # their key
    mask: File | None  # None: there is none, and all counts
    alpha: bool  # whether it is the file's alpha channel
    view: View

    def levels(self, size: Size) -> Tensor:
        """[1, h, w] float32 in 0..1, by the mean, as the loss itself would bring it to that size."""
        if self.mask is None:
            return torch.ones(1, *size)
        whole = masks.read(self.mask, self.view, alpha=self.alpha, soft=True)
        return functional.interpolate(whole[None], size=tuple(size), mode="area")[0]


@dataclass
class Wanted:
    """The entries of a dataset: of each sample all its variations, in their order."""

    pictures: list[Picture] = field(default_factory=list)
    masked: list[Picture] = field(default_factory=list)  # the same under their masks; none where masks may change
    marks: list[int] = field(default_factory=list)  # one for each sample, by content: its variations follow from it
    weights: list[Weights] = field(default_factory=list)  # of the same; none where masks do more than weigh the loss

    @property
    def keys(self) -> list[str]:
        return [each.key for each in (*self.pictures, *self.masked, *self.weights)]


def wanted(
    variations: Variations,
    contents: Sequence[str],
    *,
    seed: int,
    seeds: Mapping[str, int],
    background: str,
    identity: str,
    fill: float | None,
    weighs: bool,
) -> Wanted:
    """What the cache has to hold.

    Args:
        variations: of all samples.
        contents: hash of each sample's file.
        seed: of the run.
        seeds: by concept, of those that have one of their own.
        background: colour under transparent pixels.
        identity: of the image encoder.
        fill: value of the masked pixels, -1..1; None: masked images are not cached.
        weighs: whether masks weigh the loss and do nothing else.
    """
    samples = variations.samples
    marks = [rng.key(seeds.get(sample.concept, seed), content) for sample, content in zip(samples, contents)]
    pictures = [
        Picture(image_key(content, sample.size, view, background, identity), sample.path, view)
        for index, (sample, content, mark) in enumerate(zip(samples, contents, marks))
        for view in variations.kept(index, mark)
    ]
    masked = [] if fill is None else _masked(variations, pictures, fill)
    return Wanted(pictures, masked, marks, _weights(variations, pictures, identity) if weighs else [])


def _weights(variations: Variations, pictures: list[Picture], identity: str) -> list[Weights]:
    """The masks of the pictures; those of images without one are all alike."""
    hashes = _mask_hashes(variations)
    found = []
    for number, picture in enumerate(pictures):
        index = number // variations.count
        sample, view = variations.samples[index], picture.view
        seen = replace(view, colours=UNCHANGED) if sample.mask is not None else view.bucket
        key = weights_key(hashes[index], masks.VERSION, seen, identity)
        found.append(Weights(key, picture.key, sample.mask, sample.mask == sample.path, view))
    return found


def _mask_hashes(variations: Variations) -> list[str | None]:
    """Of each sample's mask; None where it has none."""

    def hashed(sample: Sample) -> str | None:
        if sample.mask is None:
            return None
        return f"{content_hash(sample.mask)}{' alpha' if sample.mask == sample.path else ''}"

    with ThreadPoolExecutor() as pool:
        return list(pool.map(hashed, variations.samples))


def _masked(variations: Variations, pictures: list[Picture], fill: float) -> list[Picture]:
    """The pictures with holes. Every sample has a mask."""
    holes = [Hole(s.mask, s.mask == s.path, fill) for s in variations.samples if s.mask is not None]
    hashes = _mask_hashes(variations)
    found = []
    for number, picture in enumerate(pictures):
        sample = number // variations.count
        key = masked_key(picture.key, str(hashes[sample]), masks.VERSION, fill)
        found.append(replace(picture, key=key, hole=holes[sample]))
    return found
