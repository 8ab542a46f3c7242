from pathlib import Path

import pytest

from otl.datamodules.layout import Layout, layout
from otl.types import Sample, Size

SHAPES = [Size(64, 64), Size(128, 64), Size(64, 128), Size(64, 256)]


def made(counts: list[int]) -> Layout:
    """So many samples in each of some buckets."""
    sizes = [size for size, count in zip(SHAPES, counts) for _ in range(count)]
    samples = [Sample(Path(f"{n}.png"), size, [""]) for n, size in enumerate(sizes)]
    return layout(samples, resolution=64, step=8, buckets=True)


def test_every_sample_has_its_place():
    place = layout([Sample(Path("a"), Size(1080, 1920), [""])], resolution=1024, step=64, buckets=True).places[0]
    assert (place.bucket, place.scaled, place.crop) == (Size(768, 1344), Size(768, 1365), (0, 10))
    assert place.scale == pytest.approx(768 / 1080)
    assert place.cropped_fraction == pytest.approx(1 - 1344 / (1920 * 768 / 1080))


def test_without_buckets_all_is_one_square():
    samples = [Sample(Path("a"), size, [""]) for size in SHAPES]
    assert list(layout(samples, resolution=512, step=8, buckets=False).buckets) == [Size(512, 512)]


def test_buckets_list_their_samples():
    assert sorted(each.tolist() for each in made([2, 1, 3]).buckets.values()) == [[0, 1], [2], [3, 4, 5]]
