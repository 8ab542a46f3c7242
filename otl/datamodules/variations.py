"""Which view of an image a draw gets: one of the variations in the cache, or another one every time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from otl.config import Augment, Data, overridden
from otl.datamodules import views
from otl.datamodules.layout import Layout
from otl.datamodules.views import View
from otl.types import Sample


def augments(data: Data) -> dict[str, Augment]:
    """Concept -> how its images are varied; those of `data.path` are called "data"."""
    own = {name: overridden(data.augment, concept.augment) for name, concept in data.concepts.items()}
    return {"data": data.augment} | own


def copies(samples: Iterable[Sample], data: Data) -> list[int]:
    """Of each image, how many variations of it a cache holds."""
    varying = {concept for concept, augment in augments(data).items() if views.varies(augment)}
    varied = (sample.concept in varying and not sample.validation for sample in samples)
    return [data.image_variations if each else 1 for each in varied]


class Variations:
    """The views of a dataset's images.

    Args:
        layout: the samples and their places.
        augments: by concept, how images are varied.
        count: of each image in the cache.
        pace: by concept, how often each image is drawn in a round at most; once where a name is not among them.
    """

    def __init__(
        self, layout: Layout, augments: Mapping[str, Augment], count: int = 1, pace: Mapping[str, int] | None = None
    ) -> None:
        self.samples, self.places, self.augments, self.count = layout.samples, layout.places, augments, count
        self.pace = pace or {}
        self.varying = {concept for concept, augment in augments.items() if views.varies(augment)}
        self.plain = {concept for concept, augment in augments.items() if augment == Augment()}

    def fresh(self, index: int, key: int) -> View:
        """Of a draw with this key."""
        return self._varied(index, views.chance(key))

    def kept(self, index: int, mark: int) -> list[View]:
        """Those in the cache, `count` of them; all the same where nothing varies.

        Args:
            mark: a number that depends on the seed and on what the image shows.
        """
        if not self._varies(index):
            return [self._varied(index, views.chance(0))] * self.count
        return [self.view(index, number, mark) for number in range(self.count)]

    def view(self, index: int, number: int, mark: int) -> View:
        """One of those in the cache."""
        return self._varied(index, views.spread(number, self.count, mark))

    def number(self, index: int, round_number: int | str, draw: int, mark: int) -> int:
        """Which of those in the cache comes at a draw: all of them before any comes again.

        Args:
            round_number: from 0; anything where nothing varies.
            draw: which of the round's draws of this image, from 0.
        """
        if self.count == 1 or not self._varies(index):
            return 0
        return views.turn(int(round_number) * self.pace.get(self.samples.concept(index), 1) + draw, self.count, mark)

    def _varies(self, index: int) -> bool:
        return self.samples.concept(index) in self.varying

    def _varied(self, index: int, chance: views.Chance) -> View:
        concept, place = self.samples.concept(index), self.places[index]
        return views.plain(place) if concept in self.plain else views.varied(place, self.augments[concept], chance)
