import pickle
from pathlib import Path

import numpy as np
import pytest

from otl.datamodules.files import Part, Remote
from otl.datamodules.samples import Samples
from otl.datamodules.sources.table import Cell
from otl.types import Sample, Size

TABLE = Remote("s3://bucket/a.parquet", 1000, "etag")
SAMPLES = [
    Sample(Path("photos/a.png"), Size(3, 4), ["one", "two"]),
    Sample(Remote("s3://bucket/b.png", 7, "x"), Size(5, 6), [""], concept="cat", weight=0.5, caption_missing=True),
    Sample(Part(Path("c.tar"), "sub/c.png", 512, 99), Size(7, 8), ["three"], validation=True, mask=Path("m.png")),
    Sample(Cell(TABLE, "image", 1, 2, 3, "d.png", "ab"), Size(9, 10), ["four"], concept="cat", prior=True, bytes=12),
]


def test_samples_come_back_as_they_were():
    samples = Samples(SAMPLES)
    assert list(samples) == [samples[number] for number in range(len(samples))] == SAMPLES
    assert list(pickle.loads(pickle.dumps(samples))) == SAMPLES  # for workers that are not forked
    assert samples[-1] == SAMPLES[-1] and list(Samples([])) == []
    with pytest.raises(IndexError):
        samples[len(SAMPLES)]


def test_what_is_asked_for_most_is_known_without_them():
    samples = Samples(SAMPLES).take(np.array([3, 0, 3]))
    assert samples.sizes.tolist() == [[9, 10], [3, 4], [9, 10]] and samples.size(1) == Size(3, 4)
    assert samples.concepts.tolist() == [samples.concept(number) for number in range(3)] == ["cat", "data", "cat"]


def test_some_of_them_are_taken_in_any_order_without_a_copy():
    samples = Samples(SAMPLES)
    taken = samples.take(np.array([2, 0, 2]))
    assert list(taken) == [SAMPLES[2], SAMPLES[0], SAMPLES[2]] and taken.content is samples.content
    assert list(taken.take(np.array([1]))) == [SAMPLES[0]] and list(samples[1:3]) == SAMPLES[1:3]
    assert Samples.of(taken) is taken and list(Samples.of(SAMPLES)) == SAMPLES


def test_a_sample_takes_a_third_of_a_kilobyte():
    """The arrays are all that there is: nothing of each sample is left for forked workers to copy."""
    samples = Samples(
        Sample(Remote(f"s3://bucket/photos/{n:010}.jpg", n, "0" * 32), Size(1, n), ["word " * 12]) for n in range(100)
    )
    arrays = [value for value in vars(samples).values() if isinstance(value, np.ndarray)]
    others = [value for value in vars(samples).values() if not isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) < 100 * 341 and others == [["data"], {}]


def test_no_more_than_so_many_are_kept_as_objects(monkeypatch):
    monkeypatch.setattr("otl.datamodules.samples.KEPT", 2)
    samples = Samples(SAMPLES)
    assert [samples[number] for number in range(4)] == SAMPLES and samples[3] is samples[3]
    assert len(samples._made) == 2
