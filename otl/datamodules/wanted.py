"""What the cache has to hold of a dataset's images, and under which keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from torch import Tensor

from otl import rng
from otl.datamodules import images, masks
from otl.datamodules.cache import image_key, masked_key
from otl.datamodules.files import content_hash
from otl.datamodules.variations import Variations
from otl.datamodules.views import View
from otl.types import File


@dataclass(frozen=True)
class Hole:
    """What of an image is hidden before it is encoded."""

    mask: File
    alpha: bool  # whether it is the file's alpha channel
    fill: float  # value of the masked pixels, -1..1


@dataclass(frozen=True)
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


@dataclass
class Wanted:
    """The entries of a dataset: of each sample all its variations, in their order."""

    pictures: list[Picture] = field(default_factory=list)
    masked: list[Picture] = field(default_factory=list)  # the same under their masks; none where masks may change
    marks: list[int] = field(default_factory=list)  # one for each sample, by content: its variations follow from it


def wanted(
    variations: Variations,
    contents: Sequence[str],
    *,
    seed: int,
    seeds: Mapping[str, int],
    background: str,
    identity: str,
    fill: float | None,
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
    """
    samples = variations.samples
    marks = [rng.key(seeds.get(sample.concept, seed), content) for sample, content in zip(samples, contents)]
    pictures = [
        Picture(image_key(content, sample.size, view, background, identity), sample.path, view)
        for index, (sample, content, mark) in enumerate(zip(samples, contents, marks))
        for view in variations.kept(index, mark)
    ]
    return Wanted(pictures, [] if fill is None else _masked(variations, pictures, fill), marks)


def _masked(variations: Variations, pictures: list[Picture], fill: float) -> list[Picture]:
    """The pictures with holes. Every sample has a mask."""
    holes = [Hole(s.mask, s.mask == s.path, fill) for s in variations.samples if s.mask is not None]
    with ThreadPoolExecutor() as pool:
        hashes = list(pool.map(lambda hole: f"{content_hash(hole.mask)}{' alpha' if hole.alpha else ''}", holes))
    found = []
    for number, picture in enumerate(pictures):
        sample = number // variations.count
        key = masked_key(picture.key, hashes[sample], masks.VERSION, fill)
        found.append(replace(picture, key=key, hole=holes[sample]))
    return found
