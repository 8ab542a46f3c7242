"""What a line says twice, or with a number where true or false is meant, is told."""

import pytest

from otl.mistakes import compose_settings
from otl.overrides import misread, of_ranks


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


BY_CLOCK = {"run": {"dir": "runs/${now:%Y}"}, "sweep": {"dir": "multirun/${now:%Y}"}}
OF_ALL = {"run": {"dir": "runs/a"}, "sweep": {"dir": "multirun/a"}}


@pytest.mark.parametrize(
    ("world", "hydra", "task", "sweeps", "key"),
    [
        ("2", BY_CLOCK, "train", False, "hydra.run.dir"),
        ("2", BY_CLOCK, "repeat", False, "hydra.run.dir"),
        ("2", BY_CLOCK, "cache", False, "hydra.run.dir"),
        ("2", BY_CLOCK | {"run": OF_ALL["run"]}, "train", True, "hydra.sweep.dir"),
        ("2", BY_CLOCK, "plan", False, None),
        ("2", OF_ALL, "train", False, None),
        ("2", OF_ALL, "train", True, None),
        ("1", BY_CLOCK, "train", False, None),
        (None, BY_CLOCK, "train", False, None),
    ],
)
def test_processes_started_from_outside_must_share_a_folder(monkeypatch, world, hydra, task, sweeps, key):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:  # as torchrun sets it
        monkeypatch.setenv("WORLD_SIZE", world)
    found = list(of_ranks(hydra, f"otl.tasks.{task}.{task}", sweeps=sweeps))
    assert [each.key for each in found] == ([key] if key else [])
    assert all(f"add {key}=FOLDER" in each.message for each in found)
