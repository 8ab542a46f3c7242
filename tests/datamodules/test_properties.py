"""Whatever the images and resolutions: where an image goes, and under which key it lies in the cache; by hypothesis."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from otl.datamodules.buckets import assigned, nearest
from otl.datamodules.cache import image_key, masked_key, prompt_key, weights_key
from otl.datamodules.grid import grid
from otl.datamodules.views import Colours, View
from otl.types import Crop, Size


def numbers(low: float, high: float) -> Any:
    """Without the zero below zero, which equals the other one and is written otherwise."""
    return st.floats(low, high).map(lambda number: number + 0.0)


sides = st.integers(1, 20_000)
images = st.builds(Size, sides, sides)
grids = st.tuples(st.integers(8, 256), st.sampled_from([8, 16, 32, 64, 128])).map(
    lambda drawn: (max(drawn[0] * 8, drawn[1]), drawn[1])
)
names = st.text(max_size=9)
sizes = st.builds(Size, st.integers(1, 4096), st.integers(1, 4096))
seen = st.builds(
    View,
    bucket=sizes,
    scaled=sizes,
    crop=st.builds(Crop, st.integers(0, 99), st.integers(0, 99)),
    mirrored=st.booleans(),
    angle=numbers(-180, 180),
    colours=st.builds(Colours, numbers(0, 2), numbers(0, 2), numbers(0, 2), numbers(-180, 180)),
)


def distance(size: Size, bucket: Size) -> float:
    """How far a ratio is from another, as much too wide as too tall."""
    return abs(math.log(size.h / size.w) - math.log(bucket.h / bucket.w))


@given(grids)
def test_sides_are_multiples_of_the_step_and_the_area_is_the_square_s_but_for_rounding(drawn):
    resolution, step = drawn
    for bucket in grid(resolution, step):
        assert bucket.h % step == bucket.w % step == 0
        least, most = ((bucket.h + by) * (bucket.w + by) for by in (-step / 2, step / 2))
        assert least <= resolution**2 * (1 + 1e-9) and resolution**2 <= most * (1 + 1e-9)


@given(grids, st.lists(images, min_size=1, max_size=9))
def test_every_image_has_one_bucket_and_none_is_nearer(drawn, some):
    buckets = grid(*drawn)
    places = assigned(np.array(some), buckets)
    assert len(places) == len(some)
    for size, number in zip(some, places, strict=True):
        assert 0 <= number < len(buckets)
        assert distance(size, buckets[number]) <= min(distance(size, bucket) for bucket in buckets) + 2e-9


@given(grids, images)
def test_an_image_on_its_side_has_the_bucket_on_its_side(drawn, size):
    buckets = grid(*drawn)
    bucket, turned = nearest(size, buckets), nearest(Size(size.w, size.h), buckets)
    assert turned == Size(bucket.w, bucket.h)


@given(st.lists(st.tuples(names, sizes, seen, names, names), min_size=2, max_size=2))
def test_latents_have_the_same_key_exactly_where_everything_is_the_same(drawn):
    """Each input by itself is exchanged for the other one's."""
    one, other = drawn
    for number in range(len(one)):
        changed = (*one[:number], other[number], *one[number + 1 :])
        assert (image_key(*one) == image_key(*changed)) == (one == changed)


@given(seen, seen)
def test_each_part_of_a_view_is_in_the_key(one, other):
    for name in ("bucket", "scaled", "crop", "mirrored", "angle", "colours"):
        changed = replace(one, **{name: getattr(other, name)})
        keys = [image_key("a", Size(1, 2), view, "white", "vae") for view in (one, changed)]
        assert (keys[0] == keys[1]) == (one == changed)


masked = st.tuples(names, names, st.integers(0, 9), numbers(-1, 1))
weights = st.tuples(st.none() | names, st.integers(0, 9), seen | sizes, names)
prompts = st.tuples(names, names)


@given(st.data())
def test_masks_and_captions_have_the_same_key_exactly_where_everything_is_the_same(data: Any):
    for key, inputs in ((masked_key, masked), (weights_key, weights), (prompt_key, prompts)):
        one, other = data.draw(inputs), data.draw(inputs)
        for number in range(len(one)):
            changed = (*one[:number], other[number], *one[number + 1 :])
            assert (key(*one) == key(*changed)) == (one == changed)
