"""Which images are drawn when, by plain counting; and by hypothesis, whatever the dataset."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from otl import rng
from otl.config import Concept, Data, PartialBatches
from otl.datamodules.layout import Layout, layout
from otl.datamodules.loader import Order
from otl.datamodules.rounds import Rounds, groups
from otl.types import Sample, Size

SHAPES = [Size(64, 64), Size(128, 64), Size(64, 128), Size(64, 256)]
ONETRAINER = [([5, 3, 1], 2, 6, 3), ([3, 3, 3], 4, 0, 0), ([7], 4, 4, 1), ([17, 10, 4, 1], 4, 28, 7)]


def made(*concepts: list[int]) -> Layout:
    """So many samples in each of some buckets, for each of the concepts "0", "1" and so on."""
    samples = [
        Sample(Path("x.png"), size, [""], concept=str(name))
        for name, counts in enumerate(concepts)
        for size, count in zip(SHAPES, counts)
        for _ in range(count)
    ]
    return layout(
        samples, Data(concepts=dict.fromkeys(map(str, range(len(concepts))), Concept())), resolution=64, step=8
    )


def stream(of: Layout, *concepts: Concept, batch_size: int = 4, partial: str = "keep", seed: int = 1) -> Rounds:
    named = {str(name): concept for name, concept in enumerate(concepts)}
    return Rounds(groups(of, named, seed), batch_size=batch_size, partial=PartialBatches(partial), seed=seed)


def epoch(of: Layout, number: int = 0, *, repeats: float = 1, rank: int = 0, world_size: int = 1, **options):
    return list(stream(of, Concept(repeats=repeats), **options).epoch(number, rank=rank, world_size=world_size))


def seen(requests) -> Counter[int]:
    return Counter(index for _, draws in requests for index, _ in draws)


# Whole numbers of draws: an epoch is a round


def test_a_batch_has_one_size():
    of = made([5, 3, 1])
    assert all(len({of.places[index].bucket for index, _ in draws}) == 1 for _, draws in epoch(of, batch_size=2))


@pytest.mark.parametrize("counts", [[5, 3, 1], [3, 3, 3], [7], [17, 10, 4, 1]])
@pytest.mark.parametrize("repeats", [1, 3])
def test_kept_batches_show_every_image_exactly_as_often_as_asked(counts, repeats):
    of_epoch = epoch(made(counts), repeats=repeats)
    assert seen(of_epoch) == dict.fromkeys(range(sum(counts)), repeats)
    assert all(1 <= len(draws) <= 4 for _, draws in of_epoch)
    everything = [draw for _, draws in of_epoch for draw in draws]
    assert len(set(everything)) == len(everything)


@pytest.mark.parametrize(("counts", "batch_size", "kept", "steps"), ONETRAINER)
def test_dropping_leaves_what_onetrainer_leaves(counts, batch_size, kept, steps):
    of_epoch = epoch(made(counts), batch_size=batch_size, partial="drop")
    assert (seen(of_epoch).total(), len(of_epoch)) == (kept, steps)


def test_dropping_leaves_out_other_images_every_epoch():
    of = made([5])
    everything: Counter[int] = sum((seen(epoch(of, number, partial="drop")) for number in range(30)), Counter())
    assert set(everything) == set(range(5))


def test_padding_fills_every_batch_with_images_of_the_same_bucket():
    of = made([5, 3, 1])
    of_epoch = epoch(of, partial="pad")
    assert [len(draws) for _, draws in of_epoch] == [4] * 4
    assert set(seen(of_epoch)) == set(range(9))
    assert all(len({of.places[index].bucket for index, _ in draws}) == 1 for _, draws in of_epoch)


def test_a_padding_image_is_another_draw():
    everything = [draw for _, draws in epoch(made([5, 3, 1]), repeats=2, partial="pad") for draw in draws]
    assert len(set(everything)) == len(everything)


def test_the_order_is_a_function_of_seed_and_epoch():
    of = made([17, 10, 4, 1])
    assert epoch(of, 3) == epoch(of, 3)
    assert seen(epoch(of, 3)) == seen(epoch(of, 4))
    assert [draws for _, draws in epoch(of, 3)] != [draws for _, draws in epoch(of, 4)]
    assert epoch(of, 3) != epoch(of, 3, seed=2)


def test_buckets_are_mixed():
    of = made([40, 40])
    first = [of.places[draws[0][0]].bucket for _, draws in epoch(of)[:10]]
    assert len(set(first)) == 2


def test_buckets_follow_each_other_otherwise_every_epoch():
    of = made([40, 40])
    orders = {tuple(of.places[draws[0][0]].bucket for _, draws in epoch(of, number)) for number in range(5)}
    assert len(orders) == 5


def test_the_order_is_that_of_runs_which_an_earlier_version_began():
    """That of 0.1: one list for each bucket, shuffled, cut into batches; then the batches shuffled."""
    of, repeats, seed = made([5, 3], [4, 0, 2]), (3, 2), 9
    for number in range(3):
        batches: list[list[tuple[int, int]]] = []
        for bucket, members in of.buckets.items():
            draws = [(int(i), n) for i in members for n in range(repeats[int(of.samples[i].concept)])]
            order = rng.permutation(len(draws), seed, number, "bucket", *bucket)
            mixed = iter(draws[k] for k in order)
            batches += iter(lambda mixed=mixed: list(islice(mixed, 4)), [])
        expected = [(number, batches[k]) for k in rng.permutation(len(batches), seed, number, "batches")]
        concepts = [Concept(repeats=each) for each in repeats]
        assert list(stream(of, *concepts, seed=seed).epoch(number)) == expected


def test_ranks_share_an_epoch_without_overlap():
    of = made([16, 16])
    ranks = [epoch(of, 2, rank=rank, world_size=4) for rank in range(4)]
    assert [len(rank) for rank in ranks] == [2] * 4
    assert sorted(batch for rank in ranks for batch in rank) == sorted(epoch(of, 2))


def test_ranks_get_equal_numbers_where_batches_do_not_divide():
    of = made([17, 10])
    alone = epoch(of, 2)
    ranks = [epoch(of, 2, rank=rank, world_size=5) for rank in range(5)]
    assert len(alone) == 8 and [len(rank) for rank in ranks] == [2] * 5
    together = [tuple(draws) for rank in ranks for _, draws in rank]
    assert {tuple(draws) for _, draws in alone} == set(together)


def test_more_ranks_than_batches_all_get_one():
    assert [len(epoch(made([2]), rank=rank, world_size=3)) for rank in range(3)] == [1, 1, 1]


def test_no_samples_are_no_batches():
    assert epoch(made([]), world_size=2) == []


# Shares of draws


def test_fractional_repeats_take_turns():
    """Four images seen 1.25 times, one at a time: every epoch has five draws, and after four each was seen five times.

    OneTrainer's 5.3: 0 1 2 3 0, then 1 2 3 0 1.
    """
    of = made([4])
    epochs = [epoch(of, number, repeats=1.25, batch_size=1) for number in range(4)]
    assert [len(each) for each in epochs] == [5] * 4
    for number in range(4):
        assert sorted(seen(epochs[number]).values()) == [1, 1, 1, 2]
    assert set(sum(map(seen, epochs), Counter()).values()) == {5}


def test_a_tenth_of_the_images_is_a_tenth_of_the_draws():
    """As decimals say it: 0.1 * 30 in binary is above 3, and 0.29 * 100 is below 29."""
    assert [len(epoch(made([30]), repeats=0.1, batch_size=1))] == [3]
    assert [len(epoch(made([100]), repeats=0.29, batch_size=1, number=n)) for n in range(3)] == [29] * 3


def test_hardly_any_repeats_are_still_some():
    """OneTrainer: 50 images with 0.01 repeats are none, in silence."""
    epochs = [epoch(made([50]), number, repeats=0.01) for number in range(50)]
    assert [seen(each).total() for each in epochs] == [1] * 50
    assert set(sum(map(seen, epochs), Counter()).values()) == {1}


def test_a_number_of_samples_is_drawn_by_turns_whatever_the_folder_holds():
    of = made([3, 2], [4])
    drawn = stream(of, Concept(samples=3), Concept(samples=12), batch_size=1)
    epochs = [seen(drawn.epoch(number)) for number in range(5)]
    assert [each.total() for each in epochs] == [15] * 5
    together = sum(epochs, Counter())
    assert [together[index] for index in range(5)] == [3] * 5
    assert [together[index] for index in range(5, 9)] == [15] * 4


def test_images_come_in_another_order_in_every_pass():
    halves = [set(seen(epoch(made([12]), number, repeats=0.5, batch_size=1))) for number in range(6)]
    assert all(halves[n] | halves[n + 1] == set(range(12)) for n in (0, 2, 4))
    assert len(set(map(frozenset, halves))) > 2


def test_a_concepts_own_seed_moves_its_turns_alone():
    of = made([10], [0, 10])
    half = Concept(repeats=0.5)
    one, two = (stream(of, half, Concept(repeats=0.5, seed=seed)).epoch(0) for seed in (3, 4))
    assert {i for i in seen(one) if i < 10} == {i for i in seen(two) if i < 10}
    assert {i for i in seen(one) if i >= 10} != {i for i in seen(two) if i >= 10}


def test_small_groups_do_not_come_up_in_the_same_rounds():
    """Four buckets of one image each, seen every fourth time."""
    of = made([1, 1, 1, 1])
    draws = stream(of, Concept(repeats=0.25)).draws(np.arange(8)).sum(1)
    assert draws.tolist() == [1] * 8


def test_far_epochs_are_found_without_making_the_earlier_ones():
    drawn = stream(made([50, 30], [20]), Concept(repeats=1.7), Concept(samples=7))
    far = drawn.epoch(100_000)
    assert len(far) == drawn.length
    assert abs(int(far.rounds[0]) - 100_000) < 0.01 * 100_000


# Whatever the dataset

REPEATS = st.sampled_from([1, 2, 3, 0.5, 2.5, 0.3, 1.1, 0.07])
CONCEPTS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 9), min_size=1, max_size=4),
        st.builds(Concept, repeats=REPEATS) | st.builds(Concept, samples=st.integers(1, 20)),
    ),
    min_size=1,
    max_size=3,
)
DATASETS = st.tuples(CONCEPTS, st.integers(1, 6), st.sampled_from(["keep", "pad"]), st.integers(0, 5))


def drawn_of(dataset) -> tuple[Layout, list[Concept], Rounds]:
    concepts, batch_size, partial, seed = dataset
    of = made(*(counts for counts, _ in concepts))
    kinds = [concept for _, concept in concepts]
    return of, kinds, stream(of, *kinds, batch_size=batch_size, partial=partial, seed=seed)


@settings(max_examples=60, deadline=None)
@given(dataset=DATASETS, count=st.integers(1, 30))
def test_every_image_is_seen_as_often_as_promised(dataset, count):
    """In one round as in the first ones together, less than two off; padding adds to that and takes nothing away.

    In a round, the images of a concept in one bucket differ by one draw at most.
    """
    of, concepts, drawn = drawn_of(dataset)
    sizes = Counter(sample.concept for sample in of.samples)
    times: Counter[int] = Counter()
    kept = dataset[2] == "keep"
    for number in range(count):
        draws, bounds = drawn.round(number)
        here = Counter(draws[:, 0].tolist())
        times += here
        assert sum(stop - start for start, stop in bounds.tolist()) == len(draws)
        for group in drawn.groups if kept else []:
            counts = [here[index] for index in group.members.tolist()]
            assert max(counts) - min(counts) <= 1
        for index, sample in enumerate(of.samples):
            promised = promise(concepts[int(sample.concept)], sizes[sample.concept])
            assert here[index] > promised - 2 and (not kept or here[index] < promised + 2)
            assert times[index] > (number + 1) * promised - 2
            assert not kept or times[index] < (number + 1) * promised + 2


def promise(concept: Concept, images: int) -> float:
    """Draws of each image in a round."""
    return concept.repeats if concept.samples is None else concept.samples / images


@settings(max_examples=60, deadline=None)
@given(dataset=DATASETS, number=st.integers(0, 40), world_size=st.integers(1, 4))
def test_epochs_have_one_length_and_ranks_share_them(dataset, number, world_size):
    of, _, drawn = drawn_of(dataset)
    whole = list(drawn.epoch(number))
    assert len(whole) == drawn.length
    for _, draws in whole:
        assert len({of.places[index].bucket for index, _ in draws}) == 1
        assert 1 <= len(draws) <= drawn.batch_size
    ranks = [list(drawn.epoch(number, rank=rank, world_size=world_size)) for rank in range(world_size)]
    assert {len(rank) for rank in ranks} == {math.ceil(drawn.length / world_size)}
    together = Counter(repr(batch) for rank in ranks for batch in rank)
    assert set(together) == {repr(batch) for batch in whole}
    assert together.total() - len(whole) < world_size


@settings(max_examples=40, deadline=None)
@given(dataset=DATASETS)
def test_epochs_follow_each_other_without_a_gap(dataset):
    _, _, drawn = drawn_of(dataset)
    epochs = [batch for number in range(6) for batch in drawn.epoch(number)]
    rounds: dict[int, list[object]] = defaultdict(list)
    for number, draws in epochs:
        rounds[number].append(draws)
    assert [number for number, _ in epochs] == sorted(number for number, _ in epochs)
    for number in sorted(rounds)[:-1]:
        draws, bounds = drawn.round(number)
        assert rounds[number] == [list(map(tuple, draws[start:stop].tolist())) for start, stop in bounds.tolist()]


@settings(max_examples=40, deadline=None)
@given(dataset=DATASETS, number=st.integers(0, 9), share=st.floats(0, 1))
def test_any_place_gives_the_same_rest(dataset, number, share):
    _, _, drawn = drawn_of(dataset)
    delivered = int(share * drawn.length)
    order = Order(drawn.epoch)
    order.epoch, order.delivered = number, delivered
    assert list(order) == list(drawn.epoch(number))[delivered:]
