"""Which caption an image is trained with this time: a function of its key."""

from __future__ import annotations

from collections.abc import Iterable

from otl import rng
from otl.types import Sample


def choose(captions: list[str], key: int) -> str:
    """One of the captions, each as likely."""
    return captions[int(rng.uniform(key, "caption") * len(captions))]


def dropped(key: int, share: float) -> bool:
    """Whether the caption is replaced by the empty one, in `share` (0..1) of all keys."""
    return rng.uniform(key, "caption dropout") < share


def all_prompts(samples: Iterable[Sample], dropout: float) -> list[str]:
    """Every caption that can come up, once, sorted; the empty one too where captions are dropped."""
    prompts = {caption for sample in samples for caption in sample.captions}
    return sorted(prompts | ({""} if dropout > 0 else set()))
