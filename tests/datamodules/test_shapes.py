"""Which buckets the settings ask for."""

import pytest

from otl.config import Concept, Data, SettingsError
from otl.datamodules import shapes
from otl.datamodules.grid import grid, square
from otl.types import Size


def test_a_resolution_is_its_grid_or_its_square():
    assert shapes.ladder(Data(), 512, 8) == [grid(512, 8)]
    assert shapes.ladder(Data(buckets=False), 512, 8) == [square(512, 8)]


@pytest.mark.parametrize(("step", "below"), [(8, [256, 192, 128, 64]), (64, [256, 192, 128, 64]), (128, [256, 128])])
def test_without_enlarging_smaller_grids_follow(step, below):
    grids = [[size for size in grid(each, step) if min(size) >= 64] for each in (300, *below)]
    assert shapes.ladder(Data(no_upscale=True), 300, step) == grids


def test_smaller_grids_do_not_repeat_the_resolution():
    assert shapes.ladder(Data(no_upscale=True), 128, 64) == [grid(128, 64), grid(64, 64)]


def test_sides_are_kept_within_limits():
    (kept,) = shapes.ladder(Data(min_bucket_side=768, max_bucket_side=1280), 1024, 64)
    assert kept == [size for size in grid(1024, 64) if min(size) >= 768 and max(size) <= 1280]
    assert Size(1024, 1024) in kept and Size(1280, 832) in kept and Size(1344, 768) not in kept


def test_limits_that_leave_no_bucket_are_refused():
    with pytest.raises(SettingsError, match=r"data\.resolution=512 has no bucket with sides of 768 to any number of"):
        shapes.ladder(Data(min_bucket_side=768), 512, 64)


def test_smaller_grids_end_at_the_limit():
    rungs = shapes.ladder(Data(no_upscale=True, min_bucket_side=256), 512, 64)
    assert min(min(size) for rung in rungs for size in rung) == 256


def test_given_buckets_are_the_buckets_whatever_the_resolution():
    data = Data(bucket_sizes=["1344x768", "768x1344", "768x1344"])
    assert shapes.ladder(data, 512, 64) == [[Size(768, 1344), Size(1344, 768)]]


def test_a_given_bucket_of_another_family_is_refused_with_the_nearest():
    with pytest.raises(SettingsError, match=r"data\.bucket_sizes=760x1344 .* multiples of 64 .* nearest is 768x1344"):
        shapes.ladder(Data(bucket_sizes=["760x1344"]), 512, 64)
    assert shapes.ladder(Data(bucket_sizes=["760x1344"]), 512, 8) == [[Size(760, 1344)]]


def test_concepts_have_their_own_resolutions_or_the_common_ones():
    data = Data(resolution=[512, 768], concepts={"a": Concept(), "b": Concept(resolution=1024)})
    assert shapes.by_concept(data, 640, 64) == {"data": [512, 768], "a": [512, 768], "b": [1024]}
    assert shapes.shown_at(data, 640, 64) == [512, 768, 1024]
    assert shapes.by_concept(Data(concepts={"a": Concept()}), 640, 64) == {"data": [640], "a": [640]}


def test_resolutions_with_the_same_buckets_are_refused():
    with pytest.raises(SettingsError, match=r"data\.concepts\.a\.resolution: 1024 and 1032 have the same buckets"):
        shapes.by_concept(Data(concepts={"a": Concept(resolution=[1024, 1032])}), 512, 64)
    assert shapes.by_concept(Data(resolution=[1024, 1032]), 512, 8)["data"] == [1024, 1032]


@pytest.mark.parametrize(
    ("data", "side"),
    [
        (Data(), 640),
        (Data(resolution=512), 512),
        (Data(resolution=[512, 1024, 768]), 1024),
        (Data(resolution=1000), 1024),
        (Data(bucket_sizes=["768x1344", "512x512"]), 1024),
    ],
)
def test_what_is_drawn_has_the_largest(data, side):
    assert shapes.side(data, 640, 64) == side
