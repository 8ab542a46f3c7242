import hashlib
import multiprocessing
import pickle
import tracemalloc

import numpy as np
import pytest
import torch

from otl.config import SettingsError
from otl.datamodules.cache import Cache
from otl.datamodules.entries import Entries, Files, Lookup, packed
from otl.datamodules.shards import Origin

ORIGIN = Origin("image", "Family", "vae")


def keys(count: int) -> list[str]:
    return [hashlib.sha1(str(number).encode()).hexdigest() for number in range(count)]


def filled(folder, count: int, *, shards: int = 1) -> Cache:
    """Entry i is [i, i]."""
    cache = Cache(folder)
    for number, key in enumerate(keys(count)):
        cache.put(key, {"x": torch.full((2,), float(number))}, ORIGIN)
        if (number + 1) % (count // shards) == 0:
            cache.flush()
    return cache


def test_a_key_is_found_among_keys_that_begin_alike():
    """Against a dict. Three first bytes in all, so that most keys share their first eight."""
    draw = np.random.default_rng(0)
    for _ in range(20):
        here, others = (draw.integers(0, 3, (draw.integers(0, 60), 20)).astype(np.uint8) for _ in range(2))
        here[:, 1:19] = others[:, 1:19] = 0
        expected = {}
        for number, key in enumerate(here):
            expected.setdefault(key.tobytes(), number)
        assert Lookup(here).positions(others).tolist() == [expected.get(key.tobytes(), -1) for key in others]


def test_entries_come_in_the_order_asked_for_from_any_shard(tmp_path):
    cache = filled(tmp_path, 12, shards=4)
    entries = cache.entries(reversed(keys(12)))
    assert len(set(entries.shard.tolist())) == 4
    assert entries.read([0, 11, 5, 0])["x"].tolist() == [[11, 11], [0, 0], [6, 6], [11, 11]]


def test_the_place_of_an_entry_takes_29_bytes(tmp_path):
    """20 of the key, 4 of the shard, 4 of the row, 1 whether it was compared; what it takes to find it is let go."""
    filled(tmp_path, 20_000)
    wanted = packed(keys(20_000))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    entries = Entries(Cache(tmp_path), wanted)
    kept = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    arrays = (entries.keys, entries.shard, entries.row, entries.intact)
    assert sum(array.nbytes for array in arrays) == 29 * 20_000
    assert kept < 9 * 20_000 + 50_000  # the keys were there before


def test_an_entry_has_the_number_of_its_key(tmp_path):
    entries = filled(tmp_path, 9, shards=3).entries(keys(9))
    assert entries.numbers([keys(9)[number] for number in (4, 0, 8, 4)]) == [4, 0, 8, 4]


def test_a_checksum_is_compared_once(tmp_path):
    cache = filled(tmp_path, 2)
    entries = cache.entries(keys(2))
    entries.read([0])
    assert entries.intact.tolist() == [True, False]
    (path,) = tmp_path.glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-2 * 28 - 2 * 8] ^= 1  # in entry 0
    path.write_bytes(content)
    assert entries.read([0])["x"].tolist() != [[0, 0]]
    with pytest.raises(SettingsError, match=f"{keys(1)[0]} is gone or damaged"):
        cache.entries(keys(1)).read([0])


def test_an_entry_is_found_again_when_its_shard_was_merged(tmp_path):
    entries = filled(tmp_path, 6, shards=3).entries(keys(6))
    old = list(tmp_path.iterdir())
    filled(tmp_path, 6)
    for path in old:
        path.unlink()
    assert entries.read(range(6))["x"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]


def test_an_open_shard_is_read_on_when_it_is_gone(tmp_path):
    entries = filled(tmp_path, 2).entries(keys(2))
    entries.read([0])
    for path in tmp_path.iterdir():
        path.unlink()
    assert entries.read([1])["x"].tolist() == [[1, 1]]


def test_an_entry_that_is_gone_is_named(tmp_path):
    entries = filled(tmp_path, 2).entries(keys(2))
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(SettingsError, match=rf"data\.cache_dir={tmp_path}: entry {keys(2)[1]} is gone or damaged"):
        entries.read([1])


def test_only_so_many_files_stay_open(tmp_path):
    cache = filled(tmp_path, 6, shards=6)
    cache.files.limit = 2
    assert cache.entries(keys(6)).read([0, 1, 2, 3, 0, 4])["x"][:, 0].tolist() == [0, 1, 2, 3, 0, 4]
    assert len(cache.files.opened) == 2


def read_all(entries: Entries, rounds: int) -> None:
    for _ in range(rounds):
        assert entries.read(range(len(entries)))["x"][:, 0].tolist() == list(range(len(entries)))


def test_forked_processes_read_at_the_same_time(tmp_path):
    """They inherit the open files; each must have a place in them of its own."""
    entries = filled(tmp_path, 50).entries(keys(50))
    read_all(entries, 1)
    children = [multiprocessing.get_context("fork").Process(target=read_all, args=(entries, 40)) for _ in range(2)]
    for child in children:
        child.start()
    read_all(entries, 40)
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]


def test_processes_that_are_not_forked_can_have_the_entries(tmp_path):
    entries = filled(tmp_path, 3).entries(keys(3))
    read_all(entries, 1)
    copy = pickle.loads(pickle.dumps(entries))
    read_all(copy, 1)
    assert isinstance(copy.cache.files, Files)
