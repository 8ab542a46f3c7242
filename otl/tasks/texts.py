"""What a plan says of captions: what images are called, how many texts are encoded, and what of them is not read."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from otl.config import Data
from otl.datamodules.texts import Texts
from otl.modules import tokenizers
from otl.modules.base import DiffusionModule
from otl.types import Problem, Sample

SHOWN = 80  # letters of what is cut off a caption


class Called:
    """What the images of a run are called.

    Args:
        data: the settings.
        seed: of the run.
        cached: whether texts are encoded ahead, a number of them for each caption.
    """

    def __init__(self, data: Data, *, seed: int, cached: bool) -> None:
        self.cached = cached
        self.training = Texts.of_dataset(data, seed=seed, training=True, cached=True)
        self.held_out = Texts.of_dataset(data, seed=seed, training=False, cached=True)
        self.distinct = {""} if data.caption_dropout > 0 else set()

    def row(self, sample: Sample) -> dict[str, Any]:
        """The first text of an image, unvaried; and how many there are: None, another one each time."""
        first = self.held_out.variant(sample.concept, sample.captions[0], 0)
        varies = any(map(self.training.writers[sample.concept].varies, sample.captions))
        if varies and not self.cached:
            return {"caption": first, "texts": None}
        texts = (self.held_out if sample.validation else self.training).all_of(sample)
        self.distinct.update(texts)
        return {"caption": first, "texts": len(texts)}

    def unvaried(self, sample: Sample) -> list[str]:
        """All of an image's captions as they are read where nothing is dropped, in every choice."""
        return self.held_out.all_of(sample)

    def summary(self, held_out: Iterable[Sample]) -> dict[str, Any]:
        """Once every image to train on had its row."""
        for sample in held_out:
            self.row(sample)
        return {"cached": self.cached, "distinct": len(self.distinct) if self.cached else None}


def cut_off(samples: list[Sample], called: Called, module: DiffusionModule) -> list[Problem]:
    """The captions that are longer than the family reads, the longest first."""
    room = module.prompt_room()
    if room is None:
        return []
    tokenizer = tokenizers.at_hand(module)
    if tokenizer is None:
        message = (
            f"whether any is longer than the {room} tokens that are read is not known: the tokenizer of "
            f"{module.checkpoint} is not here yet, and does not ship with OTL"
        )
        return [Problem("data.captions", message, fatal=False)]
    texts = {text: None for sample in samples for text in called.unvaried(sample)}
    long = tokenizers.too_long(module, tokenizer, list(texts))
    if not long:
        return []
    worst = {}
    for sample in samples:
        cuts = [long[text] for text in called.unvaried(sample) if text in long]
        if cuts:
            worst[str(sample.path)] = max(cuts)
    ordered = sorted(worst.items(), key=lambda each: -each[1].tokens)
    most = ordered[0][1].tokens
    message = (
        f"{len(worst)} of {len(samples)} images have captions of more than {room} tokens (up to {most}), of which the "
        f"rest is not read: shorten them{module.prompt_advice(most)}"
    )
    return [Problem("data.captions", message, False, [f"{path}: {shown(cut)}" for path, cut in ordered])]


def shown(cut: tokenizers.Cut) -> str:
    """In words, the beginning of what is cut off."""
    rest = cut.rest if len(cut.rest) <= SHOWN else f"{cut.rest[:SHOWN]}…"
    return f"{cut.tokens} tokens, not read: {rest!r}"
