"""What of an image is shown this time: everything that is done between decoding and tensor. Numbers only."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from otl import rng
from otl.augmentation import STRENGTHS
from otl.config import Augment
from otl.datamodules import buckets
from otl.datamodules.layout import Place
from otl.types import Crop, Size

Chance = Callable[[str], float]
"""What is to be chosen -> a number in 0..1, 1 excluded."""


class Colours(NamedTuple):
    """How colours are changed: otl/datamodules/colours.py has the formulas."""

    brightness: float = 1.0  # factor
    contrast: float = 1.0  # factor
    saturation: float = 1.0  # factor
    hue: float = 0.0  # degrees


UNCHANGED = Colours()


@dataclass(frozen=True, slots=True)
class View:
    """What of an image is shown. A mask follows the same one; the cache's keys contain all of it.

    The image is scaled, mirrored, turned about the middle of the crop, and cut.
    """

    bucket: Size  # what is shown, pixels
    scaled: Size  # of the whole image, before the bucket is cut out
    crop: Crop  # of the bucket in the scaled and mirrored image
    mirrored: bool = False  # left and right
    angle: float = 0.0  # degrees, counterclockwise
    colours: Colours = UNCHANGED


def centred(size: Size, bucket: Size) -> View:
    """The middle of an image of that size, as much as just fills the bucket."""
    return View(bucket, *buckets.fit(size, bucket))


def plain(place: Place) -> View:
    """The image as the layout has it."""
    return View(place.bucket, place.scaled, place.crop)


def varies(augment: Augment) -> bool:
    """Whether an image may look different from one time to the next."""
    return augment != settled(augment)


def settled(augment: Augment) -> Augment:
    """Only what is done to every image alike: for validation."""
    return replace(augment, flip=float(augment.flip == 1), **dict.fromkeys(STRENGTHS, 0.0))


def chance(*key: int | str) -> Chance:
    """Every choice of a draw, by the draw's key."""
    return lambda name: rng.uniform(*key, "view", name)


def spread(number: int, count: int, *key: int | str) -> Chance:
    """The choices of one of `count` variations of an image, evenly spaced: of two with flip=0.5 one is mirrored.

    Args:
        key: of the image.
    """
    return lambda name: (rng.uniform(*key, "view", name) + number / count) % 1.0


def turn(number: int, count: int, *key: int | str) -> int:
    """Which of `count` variations is shown when an image comes for the nth time: all of them before any comes again.

    Args:
        number: n, from 0.
        key: of the image.
    """
    again, place = divmod(number, count)
    return rng.permutation(count, *key, "variation", again)[place]


def varied(place: Place, augment: Augment, chance: Chance) -> View:
    """One of the views that the settings allow."""

    def around(name: str, middle: float, strength: float) -> float:
        return middle + strength * (2 * chance(name) - 1) if strength else middle

    def factor(name: str, fixed: float, strength: float) -> float:
        return fixed * around(name, 1.0, strength)

    angle = around("rotation", augment.fixed_rotation, augment.rotation)
    mirrored = chance("flip") < augment.flip
    scaled, crop = _cut(place, angle, mirrored, augment, chance)
    colours = Colours(
        factor("brightness", augment.fixed_brightness, augment.brightness),
        factor("contrast", augment.fixed_contrast, augment.contrast),
        factor("saturation", augment.fixed_saturation, augment.saturation),
        around("hue", augment.fixed_hue, augment.hue),
    )
    return View(place.bucket, scaled, crop, mirrored, angle, colours)


def overhang(bucket: Size, angle: float) -> Size:
    """How far a bucket that is turned reaches beyond an upright one, above and left as below and right, whole pixels.

    Negative where it does not reach as far.
    """
    sin, cos = abs(math.sin(math.radians(angle))), abs(math.cos(math.radians(angle)))
    h, w = bucket.h * cos + bucket.w * sin, bucket.h * sin + bucket.w * cos
    return Size(*(math.ceil(round((turned - own) / 2, 6)) for turned, own in ((h, bucket.h), (w, bucket.w))))


def _cut(place: Place, angle: float, mirrored: bool, augment: Augment, chance: Chance) -> tuple[Size, Crop]:
    """The size that the whole image is scaled to, and where the bucket lies in it."""
    beyond = overhang(place.bucket, angle)
    needed = [own + 2 * more for own, more in zip(place.bucket, beyond)]
    factor = max(1.0, *(need / there for need, there in zip(needed, place.scaled)))
    factor *= 1 + augment.resize_jitter * chance("resize")
    scaled = Size(*(max(need, round(side * factor)) for need, side in zip(needed, place.scaled)))
    top, left = (
        _offset(
            middle=(place.crop[axis] + place.bucket[axis] / 2) * scaled[axis] / place.scaled[axis],
            length=place.bucket[axis],
            low=beyond[axis],
            high=scaled[axis] - place.bucket[axis] - beyond[axis],
            jitter=augment.crop_jitter,
            u=chance(name),
        )
        for axis, name in enumerate(("top", "left"))
    )
    return scaled, Crop(top, scaled.w - place.bucket.w - left if mirrored else left)


def _offset(*, middle: float, length: int, low: int, high: int, jitter: float, u: float) -> int:
    """Where a crop begins.

    Args:
        middle: where the middle of it lies without jitter.
        length: of the crop.
        low, high: the least and the greatest it may be.
        jitter: share of the way from the middle to both that it may go.
        u: uniform in 0..1.
    """
    still = min(max(round(middle - length / 2), low), high)
    first, last = round(still - jitter * (still - low)), round(still + jitter * (high - still))
    return first + int(u * (last - first + 1))
