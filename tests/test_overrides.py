"""What a line says twice, or with a number where true or false is meant, is told."""

import pytest

from otl.mistakes import compose_settings
from otl.overrides import misread


def told(*line: str) -> dict[str, str]:
    return {problem.key: problem.message for problem in misread(line, compose_settings(line, name="config"))}


@pytest.mark.parametrize(
    "group", [("model=sd15", "model=sdxl"), ("experiment=quickstart", "experiment=quickstart_dora")]
)
def test_of_two_options_of_a_group_neither_is_passed_over(group):
    key, first = group[0].split("=")
    assert told(*group) == {key: f"{first} and {group[1].partition('=')[2]}: one of them at a time; leave one out"}


@pytest.mark.parametrize("key", ["data.buckets", "loss.masked", "allow_changes"])
def test_a_number_is_neither_true_nor_false(key):
    assert told(f"{key}=2") == {key: "2 is not accepted: must be true or false"}


def test_what_says_one_thing_is_accepted():
    line = ["model=sdxl", "model=sdxl", "seed=2", "data.buckets=false", "loss.masked=yes", "data.batch_size=1"]
    assert told(*line) == {}
