"""Settings of the dataset that make no sense together are refused, with what to do."""

import pytest

from otl.check import check

CAT = "data.concepts.cat.path=."


def found(settings, *lines: str) -> dict[str, str]:
    """Key -> message of what is wrong with the dataset."""
    return {each.key: each.message for each in check(settings(*lines)) if each.key.startswith("data")}


@pytest.mark.parametrize(
    "lines",
    [
        ["data.path=."],
        [CAT, "data.concepts.cat.repeats=2.5", "data.concepts.cat.seed=3"],
        [CAT, "data.concepts.cat.samples=100"],
        [CAT, "data.path=.", "data.concepts.cat.type=validation"],
    ],
)
def test_what_makes_sense_is_accepted(settings, lines):
    assert found(settings, *lines) == {}


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        (["repeats=2", "samples=10"], "samples", "10 and data.concepts.cat.repeats=2.0: leave one of them out"),
        (["type=validation", "repeats=2"], "repeats", "2.0 would have no effect: data.concepts.cat.type=validation"),
        (["type=validation", "samples=9"], "samples", "9 would have no effect"),
        (["type=validation", "loss_weight=0.5"], "loss_weight", "0.5 would have no effect"),
        (["repeats=0"], "repeats", "above 0"),
        (["repeats=-1.5"], "repeats", "above 0"),
        (["samples=0"], "samples", "at least 1"),
        (["seed=-1"], "seed", "at least 0"),
    ],
)
def test_a_concept_that_makes_no_sense_is_refused(settings, lines, key, message):
    problems = found(settings, "data.path=.", CAT, *(f"data.concepts.cat.{line}" for line in lines))
    assert list(problems) == [f"data.concepts.cat.{key}"]
    assert message in problems[f"data.concepts.cat.{key}"]


def test_a_concept_is_not_named_as_the_images_of_the_path(settings):
    assert found(settings, "data.concepts.data.path=.") == {}
    assert list(found(settings, "data.concepts.data.path=.", "data.path=.")) == ["data.concepts.data"]
