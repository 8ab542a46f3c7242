import itertools
import os
import time

import numpy as np
import pytest
from safetensors.torch import load_file

from otl.config import SettingsError
from otl.datamodules import uses

KEYS = np.arange(60, dtype=np.uint8).reshape(3, 20)
DAY = 86400


def aged(path, days):
    """As if a run had last said so many days ago that it uses it."""
    then = time.time() - days * DAY
    os.utime(path, (then, then))
    return path


def counted(folder, days=None):
    """Days since a run of each record that counts, rounded."""
    now = time.time()
    return [round((now - use.last) / DAY) for use in uses.counting(uses.records(folder), now=now, days=days)]


def test_a_record_lists_the_keys_of_a_dataset(tmp_path):
    uses.record(tmp_path, "photos at 512 px", KEYS)
    (use,) = uses.records(tmp_path)
    assert (use.dataset, use.count) == ("photos at 512 px", 3)
    assert np.array_equal(use.keys(), KEYS)
    assert np.array_equal(load_file(use.path)["otl.key"].numpy(), KEYS)


def test_a_run_of_the_same_dataset_refreshes_its_record(tmp_path):
    aged(uses.record(tmp_path, "photos", KEYS).path, 9)
    uses.record(tmp_path, "photos", KEYS)
    assert counted(tmp_path) == [0]


def test_of_a_dataset_that_changed_the_newest_record_counts(tmp_path):
    for number, days in enumerate((5, 3, 9)):
        aged(uses.record(tmp_path, "photos", KEYS + number).path, days)
    aged(uses.record(tmp_path, "others", KEYS).path, 7)
    assert counted(tmp_path) == [3, 7]


def test_a_record_of_the_last_day_counts_whatever_else_there_is(tmp_path):
    """A run of what the dataset was before may be going on."""
    for number in range(3):
        uses.record(tmp_path, "photos", KEYS + number)
    assert counted(tmp_path, days=1) == [0, 0, 0]


def test_after_so_many_days_a_dataset_does_not_count(tmp_path):
    for number, days in enumerate((2, 29, 31)):
        aged(uses.record(tmp_path, f"photos {number}", KEYS).path, days)
    assert counted(tmp_path, days=30) == [2, 29]
    assert counted(tmp_path) == [2, 29, 31]


def test_a_run_says_now_and_then_that_it_goes_on(tmp_path, monkeypatch):
    pulse = uses.record(tmp_path, "photos", KEYS)
    aged(pulse.path, 2)
    pulse.beat()
    assert counted(tmp_path) == [2]
    monkeypatch.setattr(uses, "PAUSE", 0.0)
    pulse.beat()
    assert counted(tmp_path) == [0]
    pulse.path.unlink()
    pulse.beat()  # someone has emptied the cache


def test_a_record_that_cannot_be_read_is_an_error(tmp_path):
    """What it lists would be taken for unused."""
    path = uses.record(tmp_path, "photos", KEYS).path
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SettingsError, match=str(path)):
        uses.records(tmp_path)


def test_the_state_changes_with_every_record_and_refreshment(tmp_path):
    states = [uses.state(tmp_path)]
    path = uses.record(tmp_path, "photos", KEYS).path
    states.append(uses.state(tmp_path))
    aged(path, 1)
    states.append(uses.state(tmp_path))
    uses.record(tmp_path, "photos", KEYS)
    states.append(uses.state(tmp_path))
    assert all(one != other for one, other in itertools.pairwise(states))


def test_a_record_is_not_forgotten_where_a_run_has_just_refreshed_it(tmp_path):
    path = aged(uses.record(tmp_path, "photos", KEYS).path, 9)
    (use,) = uses.records(tmp_path)
    uses.record(tmp_path, "photos", KEYS)
    uses.forget(use)
    assert counted(tmp_path) == [0]
    aged(path, 9)
    uses.forget(uses.records(tmp_path)[0])
    uses.forget(use)  # somebody else was faster
    assert uses.records(tmp_path) == [] and list((tmp_path / "uses").iterdir()) == []
