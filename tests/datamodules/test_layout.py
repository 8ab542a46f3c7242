from collections import Counter
from pathlib import Path

import pytest

from otl.config import PartialBatches
from otl.datamodules.bucketed import Layout, batches, layout
from otl.types import Sample, Size

SHAPES = [Size(64, 64), Size(128, 64), Size(64, 128), Size(64, 256)]
ONETRAINER = [([5, 3, 1], 2, 6, 3), ([3, 3, 3], 4, 0, 0), ([7], 4, 4, 1), ([17, 10, 4, 1], 4, 28, 7)]


def made(counts: list[int], *, repeats: int = 1) -> Layout:
    """So many samples in each of some buckets."""
    sizes = [size for size, count in zip(SHAPES, counts) for _ in range(count)]
    samples = [Sample(Path(f"{n}.png"), size, [""], repeats=repeats) for n, size in enumerate(sizes)]
    return layout(samples, resolution=64, step=8, buckets=True)


def epoch(of: Layout, number: int = 0, *, batch_size: int = 4, partial: str = "keep", seed: int = 1, **ranks: int):
    return batches(of, batch_size=batch_size, partial=PartialBatches(partial), seed=seed, epoch=number, **ranks)


def seen(of_epoch: list[list[tuple[int, int]]]) -> Counter[int]:
    return Counter(index for batch in of_epoch for index, _ in batch)


def test_every_sample_has_its_place():
    place = layout([Sample(Path("a"), Size(1080, 1920), [""])], resolution=1024, step=64, buckets=True).places[0]
    assert (place.bucket, place.scaled, place.crop) == (Size(768, 1344), Size(768, 1365), (0, 10))
    assert place.scale == pytest.approx(768 / 1080)
    assert place.cropped_fraction == pytest.approx(1 - 1344 / (1920 * 768 / 1080))


def test_without_buckets_all_is_one_square():
    samples = [Sample(Path("a"), size, [""]) for size in SHAPES]
    assert list(layout(samples, resolution=512, step=8, buckets=False).buckets) == [Size(512, 512)]


def test_buckets_list_their_samples():
    assert sorted(made([2, 1, 3]).buckets.values()) == [[0, 1], [2], [3, 4, 5]]


def test_a_batch_has_one_size():
    of = made([5, 3, 1])
    assert all(len({of.places[index].bucket for index, _ in batch}) == 1 for batch in epoch(of, batch_size=2))


@pytest.mark.parametrize("counts", [[5, 3, 1], [3, 3, 3], [7], [17, 10, 4, 1]])
@pytest.mark.parametrize("repeats", [1, 3])
def test_kept_batches_show_every_image_exactly_as_often_as_asked(counts, repeats):
    of_epoch = epoch(made(counts, repeats=repeats))
    assert seen(of_epoch) == dict.fromkeys(range(sum(counts)), repeats)
    assert all(1 <= len(batch) <= 4 for batch in of_epoch)
    draws = [draw for batch in of_epoch for draw in batch]
    assert len(set(draws)) == len(draws)


@pytest.mark.parametrize(("counts", "batch_size", "kept", "steps"), ONETRAINER)
def test_dropping_leaves_what_onetrainer_leaves(counts, batch_size, kept, steps):
    of_epoch = epoch(made(counts), batch_size=batch_size, partial="drop")
    assert (sum(map(len, of_epoch)), len(of_epoch)) == (kept, steps)


def test_dropping_leaves_out_other_images_every_epoch():
    of = made([5])
    everything: Counter[int] = sum((seen(epoch(of, number, partial="drop")) for number in range(30)), Counter())
    assert set(everything) == set(range(5))


def test_padding_fills_every_batch_with_images_of_the_same_bucket():
    of = made([5, 3, 1])
    of_epoch = epoch(of, partial="pad")
    assert [len(batch) for batch in of_epoch] == [4] * 4
    assert set(seen(of_epoch)) == set(range(9))
    assert all(len({of.places[index].bucket for index, _ in batch}) == 1 for batch in of_epoch)


def test_a_padding_image_has_a_repeat_number_of_its_own():
    draws = [draw for batch in epoch(made([5, 3, 1], repeats=2), partial="pad") for draw in batch]
    assert len(set(draws)) == len(draws)


def test_the_order_is_a_function_of_seed_and_epoch():
    of = made([17, 10, 4, 1])
    assert epoch(of, 3) == epoch(of, 3)
    assert epoch(of, 3) != epoch(of, 4)
    assert epoch(of, 3) != epoch(of, 3, seed=2)


def test_buckets_are_mixed():
    of = made([40, 40])
    first = [of.places[batch[0][0]].bucket for batch in epoch(of)[:10]]
    assert len(set(first)) == 2


def test_buckets_follow_each_other_otherwise_every_epoch():
    of = made([40, 40])
    orders = {tuple(of.places[batch[0][0]].bucket for batch in epoch(of, number)) for number in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("partial", ["keep", "pad", "drop"])
def test_every_epoch_has_as_many_batches(partial):
    assert len({len(epoch(made([17, 10, 4, 1]), number, partial=partial)) for number in range(10)}) == 1


def test_ranks_share_an_epoch_without_overlap():
    of = made([16, 16])
    ranks = [epoch(of, 2, rank=rank, world_size=4) for rank in range(4)]
    together = [batch for rank in ranks for batch in rank]
    assert [len(rank) for rank in ranks] == [2] * 4
    assert sorted(together) == sorted(epoch(of, 2))


def test_ranks_get_equal_numbers_where_batches_do_not_divide():
    of = made([17, 10])
    alone = epoch(of, 2)
    ranks = [epoch(of, 2, rank=rank, world_size=5) for rank in range(5)]
    assert len(alone) == 8 and [len(rank) for rank in ranks] == [2] * 5
    together = [tuple(batch) for rank in ranks for batch in rank]
    assert {tuple(batch) for batch in alone} == set(together)


def test_more_ranks_than_batches_all_get_one():
    assert [len(epoch(made([2]), rank=rank, world_size=3)) for rank in range(3)] == [1, 1, 1]


def test_no_samples_are_no_batches():
    assert epoch(made([]), world_size=2) == []
