"""What of an image is shown this time: everything that is done between decoding and tensor. Pure geometry."""

from __future__ import annotations

from dataclasses import dataclass

from otl.datamodules import buckets
from otl.datamodules.layout import Place
from otl.types import Crop, Size


@dataclass(frozen=True)
class View:
    """What of an image is shown. A mask follows the same one; the cache's keys contain all of it."""

    bucket: Size  # what is shown, pixels
    scaled: Size  # of the whole image, before the bucket is cut out
    crop: Crop  # of the bucket in the scaled image


def centred(size: Size, bucket: Size) -> View:
    """The middle of an image of that size, as much as just fills the bucket."""
    return View(bucket, *buckets.fit(size, bucket))


def plain(place: Place) -> View:
    """The image as the layout has it."""
    return View(place.bucket, place.scaled, place.crop)
