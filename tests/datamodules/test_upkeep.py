import contextlib
import hashlib
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from otl.datamodules import shards, upkeep, uses
from otl.datamodules.cache import Cache
from otl.datamodules.entries import packed
from otl.datamodules.shards import Origin

DAY = 86400


def key(number: int) -> str:
    return hashlib.sha1(str(number).encode()).hexdigest()


def put(folder: Path, *numbers: int, kind: str = "image") -> Path:
    """One shard; entry i is [i, i]."""
    cache, before = Cache(folder), set(folder.glob("*.safetensors"))
    for number in numbers:
        cache.put(key(number), {"x": torch.full((2,), float(number))}, Origin(kind, "Family", "vae"))
    cache.flush()
    (path,) = set(folder.glob("*.safetensors")) - before
    return path


def use(folder: Path, *numbers: int, dataset: str = "photos", days: float = 0) -> Path:
    """A dataset that was last used so many days ago."""
    path = uses.record(folder, dataset, packed(map(key, numbers))).path
    os.utime(path, (time.time() - days * DAY,) * 2)
    return path


def spoil(path: Path, row: int) -> None:
    """One bit of an entry."""
    content = bytearray(path.read_bytes())
    content[shards.Shard.open(path).columns[0] + 8 * row] ^= 1
    path.write_bytes(content)


def there(folder: Path) -> list[int]:
    """The entries that can be read, each as often as there are copies of it."""
    found = []
    for path in folder.glob("*.safetensors"):
        shard = shards.Shard.open(path)
        for entry in upkeep.intact(Cache(folder), shard, range(shard.count), []):
            found.append(int(entry.data[0].view(np.float32)[0]))
    return sorted(found)


def shard_count(folder: Path) -> int:
    return len(list(folder.glob("*.safetensors")))


def test_contents_are_counted_by_what_made_them(tmp_path):
    put(tmp_path, 1, 2), put(tmp_path, 3), put(tmp_path, 4, kind="prompt")
    found = upkeep.contents(Cache(tmp_path))
    assert [(each.origin.kind, each.shards, each.entries) for each in found] == [("image", 2, 3), ("prompt", 1, 1)]
    assert sum(each.nbytes for each in found) == sum(path.stat().st_size for path in tmp_path.iterdir())


# Verify


def test_an_intact_cache_passes(tmp_path):
    put(tmp_path, 1, 2), put(tmp_path, 3)
    assert upkeep.verify(Cache(tmp_path)) == []


def test_what_is_damaged_is_named_and_out_of_use(tmp_path):
    path, cut = put(tmp_path, 1, 2, 3), put(tmp_path, 4)
    spoil(path, 1)
    cut.write_bytes(cut.read_bytes()[:-1])
    lines = upkeep.verify(Cache(tmp_path))
    assert len(lines) == 2
    assert lines[0].startswith(f"{cut}: ") and lines[1].startswith(f"{path}: entry 1 ({key(2)}): ")
    assert Cache(tmp_path).missing(map(key, (1, 2, 3, 4))) == [key(2), key(4)]


# Compact


def test_small_shards_become_one(tmp_path):
    for number in range(5):
        put(tmp_path, number)
    put(tmp_path, 9, kind="prompt")
    assert upkeep.compact(Cache(tmp_path)) == (5, 1)
    assert shard_count(tmp_path) == 2 and there(tmp_path) == [0, 1, 2, 3, 4, 9]
    assert upkeep.compact(Cache(tmp_path)) == (0, 0)


def test_full_shards_stay_as_they_are(tmp_path):
    paths = {put(tmp_path, 1, 2), put(tmp_path, 3, 4)}
    size = next(iter(paths)).stat().st_size
    assert upkeep.compact(Cache(tmp_path, shard_bytes=2 * size - 1)) == (0, 0)
    assert set(tmp_path.iterdir()) == paths


def test_a_merged_shard_is_no_larger_than_a_shard_may_be(tmp_path):
    sizes = {put(tmp_path, number).stat().st_size for number in range(6)}
    assert upkeep.compact(Cache(tmp_path, shard_bytes=3 * max(sizes))) == (6, 2)


def test_damaged_entries_are_left_out_with_their_marks(tmp_path):
    spoil(put(tmp_path, 1, 2, 3), 2)
    upkeep.verify(Cache(tmp_path))
    assert upkeep.compact(Cache(tmp_path)) == (1, 1)
    assert there(tmp_path) == [1, 2]
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


# Prune


def test_what_no_dataset_uses_is_deleted(tmp_path):
    put(tmp_path, 1, 2, 3), put(tmp_path, 4, 5)
    use(tmp_path, 1, 3)
    removal = upkeep.prune(Cache(tmp_path), days=None, really=True)
    assert there(tmp_path) == [1, 3]
    assert (removal.entries, removal.nbytes, removal.files, removal.records) == (3, 3 * 8, 0, 0)


def test_unless_really_nothing_is_touched(tmp_path):
    put(tmp_path, 1, 2, 3), put(tmp_path, 4, 5), use(tmp_path, 1, days=40)
    (tmp_path / ".x.1.writing").touch()
    os.utime(tmp_path / ".x.1.writing", (0, 0))
    before = sorted(tmp_path.rglob("*"))
    removal = upkeep.prune(Cache(tmp_path), days=30, really=False)
    assert sorted(tmp_path.rglob("*")) == before
    assert (removal.entries, removal.files, removal.records) == (5, 1, 1)


def test_a_dataset_that_is_long_unused_counts_unless_days_are_given(tmp_path):
    put(tmp_path, 1, 2)
    use(tmp_path, 1, days=40), use(tmp_path, 2, dataset="others", days=20)
    upkeep.prune(Cache(tmp_path), days=None, really=True)
    assert there(tmp_path) == [1, 2]
    upkeep.prune(Cache(tmp_path), days=30, really=True)
    assert there(tmp_path) == [2]
    assert [each.dataset for each in uses.records(tmp_path)] == ["others"]


def test_files_left_by_killed_processes_go_and_those_of_others_stay(tmp_path):
    cut = put(tmp_path, 1)
    cut.write_bytes(cut.read_bytes()[:-1])
    safetensors.torch.save_file({"a": torch.zeros(1)}, tmp_path / "lora.safetensors")
    (tmp_path / f"{'0' * 32}.safetensors").write_bytes((tmp_path / "lora.safetensors").read_bytes())
    for name, age in ((".old.12.writing", 3601), (".new.12.writing", 0)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    upkeep.prune(Cache(tmp_path), days=None, really=True)
    assert {path.name for path in tmp_path.iterdir()} == {
        "lora.safetensors", f"{'0' * 32}.safetensors", ".new.12.writing"
    }  # fmt: skip


def test_what_was_hidden_when_pruning_was_cut_short_comes_back(tmp_path, monkeypatch):
    path = put(tmp_path, 1)
    path.rename(shards.hidden(path))
    use(tmp_path, 1)
    upkeep.prune(Cache(tmp_path), days=None, really=True)
    assert there(tmp_path) == []  # it may be another process that is at it
    monkeypatch.setattr(upkeep, "STALE", 0)
    upkeep.prune(Cache(tmp_path), days=None, really=True)
    assert there(tmp_path) == [1]


@pytest.mark.parametrize("recorded", [(2,), (7,)])
def test_a_run_that_begins_while_a_shard_is_deleted_keeps_what_it_uses(tmp_path, monkeypatch, recorded):
    """It records and looks after pruning has looked, and before the shard is hidden."""
    put(tmp_path, 1, 2, 3), use(tmp_path, 1)
    real, entries = os.replace, []

    def replace(*arguments: Any) -> None:
        if not entries and str(arguments[1]).endswith(shards.HIDDEN):
            entries.append(None)
            use(tmp_path, *recorded, dataset="others")
            entries.append(Cache(tmp_path).entries(map(key, recorded)))
        real(*arguments)

    monkeypatch.setattr(os, "replace", replace)
    upkeep.prune(Cache(tmp_path), days=None, really=True)
    if recorded == (2,):
        assert entries[1].read([0])["x"].tolist() == [[2, 2]]
        assert there(tmp_path) == [1, 2]
    else:
        assert list(entries[1].absent()) == [0] and there(tmp_path) == [1]


def test_a_reader_finds_what_is_hidden_for_a_moment(tmp_path):
    path = put(tmp_path, 1, 2)
    entries = Cache(tmp_path).entries(map(key, (1, 2)))
    path.rename(shards.hidden(path))
    assert entries.read([1, 0])["x"][:, 0].tolist() == [2, 1]
    assert Cache(tmp_path).missing([key(1)]) == [key(1)]  # a run that begins now makes it anew


# All together


@pytest.mark.parametrize("seed", range(8))
def test_upkeep_never_loses_what_is_used(tmp_path, seed):
    """Random shards with second copies and damage, random datasets: against sets."""
    draw = np.random.default_rng(seed)
    copies: dict[int, int] = {}
    for _ in range(draw.integers(1, 7)):
        numbers = draw.choice(20, draw.integers(1, 8), replace=False).tolist()
        damaged = draw.integers(0, len(numbers)) if draw.random() < 0.5 else None
        path = put(tmp_path, *numbers)
        if damaged is not None:
            spoil(path, damaged)
        for row, number in enumerate(numbers):
            copies[number] = copies.get(number, 0) + (row != damaged)
    upkeep.verify(Cache(tmp_path))
    intact = {number for number, count in copies.items() if count}
    wanted: set[int] = set()
    for number in range(draw.integers(0, 4)):
        chosen = draw.choice(25, 6, replace=False).tolist()
        days = float(draw.choice([0.5, 10, 50]))
        use(tmp_path, *chosen, dataset=f"photos {number}", days=days)
        wanted |= set(chosen) if days < 30 else set()
    if draw.random() < 0.5:
        upkeep.compact(Cache(tmp_path))
        assert sorted(set(there(tmp_path))) == sorted(intact)
    said = upkeep.prune(Cache(tmp_path), days=30, really=False)
    assert upkeep.prune(Cache(tmp_path), days=30, really=True) == said
    assert there(tmp_path) == sorted(intact & wanted)
    assert upkeep.prune(Cache(tmp_path), days=30, really=True) == upkeep.Removal()
    upkeep.compact(Cache(tmp_path))
    assert there(tmp_path) == sorted(intact & wanted) and shard_count(tmp_path) <= 1


def runs(folder: Path, seed: int, rounds: int) -> None:
    """Runs one after the other: each records, makes what is missing, and reads all."""
    draw, records = np.random.default_rng(seed), []
    for number in range(rounds):
        numbers = draw.choice(12, 5, replace=False).tolist()
        cache, keys = Cache(folder), [key(each) for each in numbers]
        records.append(uses.record(folder, f"run {seed} {number % 3}", packed(keys)).path)
        for missing in cache.missing(keys):
            value = float(numbers[keys.index(missing)])
            cache.put(missing, {"x": torch.full((2,), value)}, Origin("image", "Family", "vae"))
        cache.flush()
        entries = cache.entries(keys)
        for _ in range(3):
            cache.files.close()
            assert entries.read(range(5))["x"][:, 0].tolist() == numbers
        while number % 4 == 0 and records:
            with contextlib.suppress(FileNotFoundError):
                os.utime(records.pop(), (0, 0))  # long ago, so that there is something to prune


def test_runs_come_and_go_while_others_merge_and_prune(tmp_path):
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=runs, args=(tmp_path, seed, 25)) for seed in range(2)]
    for process in processes:
        process.start()
    pruned = 0
    while any(process.is_alive() for process in processes):
        pruned += upkeep.prune(Cache(tmp_path), days=30, really=True).entries
        upkeep.compact(Cache(tmp_path))
    assert [process.exitcode for process in processes] == [0, 0]
    assert pruned > 0
    assert upkeep.verify(Cache(tmp_path)) == []
