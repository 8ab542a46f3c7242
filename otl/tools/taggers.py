"""Tags by the WD taggers: an ONNX network and the list of its tags, as SmilingWolf publishes them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from otl.config import SettingsError
from otl.tools.checkpoints import file_of
from otl.tools.onnx import Onnx
from otl.wording import meant

if TYPE_CHECKING:
    from PIL.Image import Image

KEY = "captioner.checkpoint"
GENERAL, CHARACTER, RATING = 0, 4, 9  # the column `category`


class Tag(NamedTuple):
    """One output of the network."""

    name: str
    category: int


class Tagger:
    """A network that knows the tags of a list.

    Args:
        checkpoint: hub name or local folder, with model.onnx and selected_tags.csv.
        general_threshold: probability from which a general tag is taken, 0..1.
        character_threshold: probability from which the name of a character is taken, 0..1.
        rating: whether the likeliest rating is one of the tags.
        underscores: whether they stay; else they become spaces.
        exclude: tags that are never taken.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        general_threshold: float = 0.35,
        character_threshold: float = 0.85,
        rating: bool = False,
        underscores: bool = False,
        exclude: Sequence[str] = (),
    ) -> None:
        self.checkpoint = checkpoint
        self.thresholds = {GENERAL: general_threshold, CHARACTER: character_threshold}
        self.rating, self.underscores, self.exclude = rating, underscores, exclude
        self.tags: list[Tag] = []  # this and the network come with `load`
        self.network: Any = None

    def load(self, device: torch.device, dtype: torch.dtype) -> None:
        """Raises SettingsError: the files do not fit each other, or a tag to exclude is not in the list."""
        self.tags = read_tags(file_of(KEY, self.checkpoint, "selected_tags.csv"))
        self.network = Onnx(KEY, file_of(KEY, self.checkpoint, "model.onnx"), device)
        taken, given = self.network.takes, self.network.gives
        if taken[1:] != [taken[1], taken[1], 3] or given[1:] != [len(self.tags)]:
            raise SettingsError(
                f"{KEY}={self.checkpoint}: model.onnx makes {given} of {taken}; it should make [N, {len(self.tags)}], "
                "the tags of selected_tags.csv, of [N, H, H, 3]"
            )
        names = [plain(tag.name) for tag in self.tags]
        for tag in self.exclude:
            if plain(tag) not in names:
                raise SettingsError(f"captioner.exclude: there is no tag {tag}{meant(plain(tag), names)}")

    def captions(self, images: list[Image]) -> list[str]:
        """One for each image: its tags, the surest first, characters before all others."""
        probabilities = self.network.run([levels(image, self.network.takes[1]) for image in images])
        return [", ".join(self.spelled(tag) for tag in self.chosen(row)) for row in probabilities]

    def chosen(self, probabilities: np.ndarray) -> list[Tag]:
        """[T] in 0..1 -> the tags that are taken, in their order."""
        ranked = [self.tags[index] for index in np.argsort(-probabilities, kind="stable")]
        probability = dict(zip(self.tags, probabilities))
        excluded = {plain(tag) for tag in self.exclude}
        wanted = [tag for tag in ranked if plain(tag.name) not in excluded]
        ratings = [tag for tag in ranked if tag.category == RATING][: int(self.rating)]
        sure = {
            kind: [tag for tag in wanted if tag.category == kind and probability[tag] >= threshold]
            for kind, threshold in self.thresholds.items()
        }
        return [*ratings, *sure[CHARACTER], *sure[GENERAL]]

    def spelled(self, tag: Tag) -> str:
        return tag.name if self.underscores or is_face(tag.name) else plain(tag.name)


def read_tags(file: Path) -> list[Tag]:
    """The rows of selected_tags.csv, in the order of the network's outputs.

    Raises:
        SettingsError: it has other columns.
    """
    with file.open(encoding="utf-8-sig", newline="") as lines:
        try:
            return [Tag(row["name"], int(row["category"])) for row in csv.DictReader(lines)]
        except (KeyError, ValueError) as error:
            raise SettingsError(f"{file}: not a list of tags with the columns name and category ({error})") from error


def plain(tag: str) -> str:
    """A tag as one writes it in a caption."""
    return tag.replace("_", " ")


def is_face(tag: str) -> bool:
    """Whether a tag draws a face, such as ^_^ or o_o, so that its underscore is no space."""
    return "_" in tag and all(sum(map(str.isalpha, part)) <= 1 for part in tag.split("_"))


def levels(image: Image, side: int) -> np.ndarray:
    """[side, side, 3] float32 blue, green, red in 0..255: the image in the middle of a white square."""
    from PIL import Image as images

    longer = max(image.size)
    square = images.new("RGB", (longer, longer), "white")
    square.paste(image, ((longer - image.width) // 2, (longer - image.height) // 2))
    scaled = square.resize((side, side), images.Resampling.BICUBIC)
    return np.ascontiguousarray(np.asarray(scaled, np.float32)[:, :, ::-1])
