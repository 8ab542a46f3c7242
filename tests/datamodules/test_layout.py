from pathlib import Path

import pytest

from otl.config import Concept, Data
from otl.datamodules.layout import Layout, layout
from otl.types import Sample, Size

SHAPES = [Size(64, 64), Size(128, 64), Size(64, 128), Size(64, 256)]


def made(counts: list[int]) -> Layout:
    """So many samples in each of some buckets."""
    sizes = [size for size, count in zip(SHAPES, counts) for _ in range(count)]
    samples = [Sample(Path(f"{n}.png"), size, [""]) for n, size in enumerate(sizes)]
    return layout(samples, Data(), resolution=64, step=8)


def test_every_sample_has_its_place():
    place = layout([Sample(Path("a"), Size(1080, 1920), [""])], Data(), resolution=1024, step=64).places[0]
    assert (place.bucket, place.scaled, place.crop) == (Size(768, 1344), Size(768, 1365), (0, 10))
    assert place.scale == pytest.approx(768 / 1080)
    assert place.cropped_fraction == pytest.approx(1 - 1344 / (1920 * 768 / 1080))


def test_without_buckets_all_is_one_square():
    samples = [Sample(Path("a"), size, [""]) for size in SHAPES]
    assert list(layout(samples, Data(buckets=False), resolution=512, step=8).buckets) == [Size(512, 512)]


def test_buckets_list_their_samples():
    assert sorted(each.tolist() for each in made([2, 1, 3]).buckets.values()) == [[0, 1], [2], [3, 4, 5]]


# Several resolutions, and none


def placed(sizes: list[Size], *, step: int = 64, seed: int = 0, **settings) -> Layout:
    """Images named 0, 1 and so on."""
    samples = [Sample(Path(f"{number}.png"), size, [""]) for number, size in enumerate(sizes)]
    return layout(samples, Data(**settings), resolution=512, step=step, seed=seed)


def shown(of: Layout) -> dict[int, list[Size]]:
    """Image -> its buckets."""
    found: dict[int, list[Size]] = {}
    for number, place in zip(of.images.tolist(), of.places):
        found.setdefault(number, []).append(place.bucket)
    return found


def test_each_image_is_shown_at_each_resolution():
    of = placed([Size(1080, 1920), Size(700, 700)], resolution=[512, 1024])
    assert shown(of) == {0: [Size(384, 704), Size(768, 1344)], 1: [Size(512, 512), Size(1024, 1024)]}
    assert [sample.name for sample in of.samples] == ["0.png", "0.png", "1.png", "1.png"]


def test_each_image_is_shown_at_one_resolution_by_seed_and_name():
    squares, asked = [Size(2000, 2000)] * 60, {"resolution": [512, 768, 1024], "each_resolution": False}
    of, again, other, more = (
        placed(squares + extra, seed=seed, **asked) for seed, extra in ((1, []), (1, []), (2, []), (1, squares[:5]))
    )
    assert shown(of) == shown(again) != shown(other)
    assert all(shown(more)[number] == buckets for number, buckets in shown(of).items())
    counts = [len(members) for members in of.buckets.values()]
    assert sum(counts) == 60 and len(counts) == 3 and min(counts) >= 10


def test_a_concept_has_a_resolution_of_its_own():
    samples = [Sample(Path("a"), Size(900, 900), [""], concept=name) for name in ("data", "cat")]
    of = layout(samples, Data(concepts={"cat": Concept(resolution=768)}), resolution=512, step=64)
    assert shown(of) == {0: [Size(512, 512)], 1: [Size(768, 768)]}


def test_given_buckets_are_taken_by_ratio_and_then_without_enlarging():
    """Of two squares, a small image has the small one; one between has the one that enlarges it least."""
    sizes = ["512x512", "1024x1024", "768x1344"]
    of = placed([Size(3000, 3000), Size(800, 800), Size(300, 310), Size(1080, 1920)], bucket_sizes=sizes)
    assert shown(of) == {0: [Size(1024, 1024)], 1: [Size(512, 512)], 2: [Size(512, 512)], 3: [Size(768, 1344)]}


def test_no_image_is_enlarged_where_that_is_not_wanted():
    sizes = [Size(h, w) for h in (70, 200, 333, 512, 900, 2000) for w in (70, 250, 512, 700, 2000)]
    of = placed(sizes, step=8, no_upscale=True)
    assert all(place.scale <= 1 for place in of.places)
    assert max(place.scale for place in placed(sizes, step=8).places) > 5
    left_out = {path for problem in of.problems for path, _ in problem.left_out}
    assert len(shown(of)) + len(left_out) == len(sizes)


def test_images_large_enough_have_the_same_buckets_whether_or_not_others_may_be_enlarged():
    sizes = [Size(1080, 1920), Size(512, 512), Size(3000, 600)]
    assert shown(placed(sizes, no_upscale=True)) == shown(placed(sizes))


def test_a_small_image_goes_to_the_largest_square_that_it_fills():
    of = placed([Size(511, 511), Size(450, 450), Size(100, 99)], step=8, no_upscale=True)
    assert shown(of) == {0: [Size(448, 448)], 1: [Size(448, 448)], 2: [Size(64, 64)]}


def test_what_is_smaller_than_every_bucket_is_left_out_and_named():
    of = placed([Size(512, 512), Size(63, 500)], step=8, no_upscale=True)
    assert shown(of) == {0: [Size(512, 512)]}
    (problem,) = of.problems
    assert problem.key == "data.no_upscale" and not problem.fatal
    assert problem.left_out == [("1.png", "63x500 (height x width) is smaller than every bucket")]


def test_at_several_resolutions_no_image_is_twice_in_one_bucket():
    of = placed([Size(600, 600)], resolution=[512, 576, 1024], no_upscale=True)
    assert shown(of) == {0: [Size(512, 512), Size(576, 576)]}


def test_images_outside_of_the_limits_are_left_out_each_with_its_reason():
    of = placed([Size(400, 399), Size(400, 1001), Size(400, 1000), Size(100, 1000)], min_side=400, max_aspect=2.5)
    assert list(shown(of)) == [2]
    assert [(problem.key, problem.left_out) for problem in of.problems] == [
        (
            "data.min_side",
            [("0.png", "its shorter side has 399 pixels"), ("3.png", "its shorter side has 100 pixels")],
        ),
        ("data.max_aspect", [("1.png", "its longer side is 2.50 times the other")]),
    ]


def test_no_images_have_no_places():
    of = placed([], resolution=[512, 768], no_upscale=True, min_side=10)
    assert (list(of.samples), of.sizes, of.problems, dict(of.buckets)) == ([], [], [], {})
