"""What of augmentation has no effect is refused, with the reason."""

from __future__ import annotations

from dataclasses import fields

import pytest

from otl.augmentation import STRENGTHS
from otl.check import check
from otl.cli import spelled_out
from otl.config import Augment

VARIATIONS = "data.image_variations=4"
CONCEPT = "data.concepts.cat.augment"


def found(settings, *lines: str) -> dict[str, str]:
    """Key -> message of what is wrong with the augmentation."""
    problems = check(settings(*spelled_out(lines)))
    return {each.key: each.message for each in problems if "augment" in each.key or "variations" in each.key}


def test_every_setting_is_a_strength_a_share_or_fixed():
    names = [field.name for field in fields(Augment)]
    assert {name for name in names if not name.startswith("fixed_")} == {*STRENGTHS, "flip"}


@pytest.mark.parametrize(
    "lines",
    [
        [VARIATIONS, "data.augment.flip=0.5", "data.path=x"],
        [VARIATIONS, f"{CONCEPT}.hue=20"],
        [VARIATIONS, "data.augment.hue=20", f"{CONCEPT}.flip=0"],
        ["data.concepts.cat.type=validation", f"{CONCEPT}.fixed_hue=20", f"{CONCEPT}.flip=1"],
        ["data.concepts.cat.type=validation", "data.augment.hue=20", "data.path=x", VARIATIONS],
    ],
)
def test_what_makes_sense_is_accepted(settings, lines):
    assert found(settings, *lines) == {}


@pytest.mark.parametrize(
    ("lines", "key", "why"),
    [
        ([VARIATIONS, "data.path=x"], "data.image_variations", "nothing in data.augment is random"),
        ([VARIATIONS, "data.augment.flip=1", "data.path=x"], "data.image_variations", "is random"),
        ([VARIATIONS, "data.augment.fixed_hue=9", "data.path=x"], "data.image_variations", "is random"),
        ([VARIATIONS, "data.augment.hue=20", f"{CONCEPT}.hue=0"], "data.image_variations", "is random"),
        ([VARIATIONS, "data.augment.hue=20", "data.cache=false"], "data.image_variations", "data.cache=true"),
        (["data.concepts.cat.type=validation", f"{CONCEPT}.flip=0.5"], f"{CONCEPT}.flip", "are held out"),
        (["data.concepts.cat.type=validation", f"{CONCEPT}.hue=5"], f"{CONCEPT}.hue", "are held out"),
        (["data.augment.flip=1.5"], "data.augment.flip", "at most 1"),
        (["data.augment.rotation=181"], "data.augment.rotation", "at most 180"),
        ([f"{CONCEPT}.fixed_brightness=-1"], f"{CONCEPT}.fixed_brightness", "at least 0"),
    ],
)
def test_what_has_no_effect_is_refused(settings, lines, key, why):
    problems = found(settings, *lines)
    assert problems.keys() == {key} and why in problems[key]
