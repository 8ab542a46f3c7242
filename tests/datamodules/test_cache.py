import logging
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
from torch import Tensor

from otl.config import SettingsError
from otl.datamodules.cache import Cache, image_key, prompt_key
from otl.datamodules.shards import LENGTH, Damaged, Origin, Shard
from otl.datamodules.views import View
from otl.formats.files import DiskError
from otl.types import Crop, Size

KEY, OTHER = "ab" + "0" * 38, "cd" + "1" * 38
ENTRY = {"hidden": torch.arange(12.0).reshape(3, 4), "pooled": torch.ones(2, dtype=torch.bfloat16)}
ORIGIN = Origin("prompt", "Family", "clip")
GEOMETRY = {
    "content": "c",
    "original": Size(100, 200),
    "view": View(Size(64, 112), Size(64, 128), Crop(0, 8)),
    "background": "white",
    "identity": "vae",
}
FORK = multiprocessing.get_context("fork")


def put(folder: Path, *keys: str, entry: dict[str, Tensor] = ENTRY) -> Path:
    """One shard with an entry for each key."""
    cache, before = Cache(folder), set(folder.glob("*"))
    for key in keys:
        cache.put(key, entry, ORIGIN)
    cache.flush()
    (path,) = set(folder.glob("*")) - before
    return path


def got(folder: Path, key: str) -> dict[str, Tensor]:
    """As a process that has just begun reads it."""
    return {name: tensor[0] for name, tensor in Cache(folder).entries([key]).read([0]).items()}


def same(entry: dict[str, Tensor], other: dict[str, Tensor] = ENTRY) -> bool:
    return entry.keys() == other.keys() and all(torch.equal(entry[name], other[name]) for name in other)


def absent(folder: Path, key: str) -> bool:
    return Cache(folder).missing([key]) == [key]


def test_what_is_put_is_got(tmp_path):
    put(tmp_path, KEY)
    assert same(got(tmp_path, KEY))


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "int64", "bool"])
def test_every_dtype_and_shape_comes_back(tmp_path, name):
    dtype = getattr(torch, name)
    entry = {"a": torch.ones(3, 1, 2).to(dtype), "scalar": torch.tensor(1).to(dtype), "b": torch.zeros(5).byte()}
    put(tmp_path, KEY, OTHER, entry=entry)
    read = got(tmp_path, OTHER)
    assert {name: tensor.dtype for name, tensor in read.items()} == {"a": dtype, "scalar": dtype, "b": torch.uint8}
    assert same({name: tensor.double() for name, tensor in read.items()}, {n: t.double() for n, t in entry.items()})


def test_a_shard_is_a_safetensors_file_that_says_what_it_is(tmp_path):
    path = put(tmp_path, KEY, OTHER)
    with safetensors.safe_open(path, "pt") as file:
        about = file.metadata()
    tensors = safetensors.torch.load_file(path)
    assert about == {"format": "otl cache", "version": "1", "count": "2", **ORIGIN._asdict()}
    assert all(torch.equal(tensors[name], torch.stack([ENTRY[name]] * 2)) for name in ENTRY)
    assert bytes(tensors["otl.key"].flatten().tolist()).hex() == KEY + OTHER


def test_what_was_never_put_is_missing_once(tmp_path):
    put(tmp_path, KEY)
    assert Cache(tmp_path).missing([OTHER, KEY, "ef" * 20, OTHER]) == [OTHER, "ef" * 20]


def test_a_folder_that_is_not_there_has_nothing(tmp_path):
    assert absent(tmp_path / "none", KEY) and not (tmp_path / "none").exists()


def test_entries_of_one_origin_and_shape_share_a_file(tmp_path):
    cache = Cache(tmp_path)
    for number in range(20):
        cache.put(f"{number:040x}", {"x": torch.zeros(2 + number % 2)}, Origin(f"{number % 4 // 2}", "", ""))
    cache.flush()
    assert len(list(tmp_path.iterdir())) == 4
    assert cache.missing(f"{number:040x}" for number in range(20)) == []


def test_nothing_is_there_before_it_is_flushed(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, ENTRY, ORIGIN)
    assert absent(tmp_path, KEY)
    cache.flush()
    assert not absent(tmp_path, KEY)


def test_a_shard_closes_when_it_is_large(tmp_path):
    cache = Cache(tmp_path, shard_bytes=3 * 400)
    for number in range(10):
        cache.put(f"{number:040x}", {"x": torch.zeros(100)}, ORIGIN)
    assert len(list(tmp_path.iterdir())) == 3


def test_of_several_open_shards_the_largest_closes(tmp_path):
    cache = Cache(tmp_path, shard_bytes=3 * 400)
    for number, length in enumerate((100, 99, 100, 100)):
        cache.put(f"{number:040x}", {"x": torch.zeros(length)}, ORIGIN)
    assert cache.missing(f"{number:040x}" for number in range(4)) == [f"{1:040x}"]


def test_an_entry_waits_no_longer_than_it_may(tmp_path):
    cache = Cache(tmp_path, seconds=0)
    cache.put(KEY, ENTRY, ORIGIN)
    assert not absent(tmp_path, KEY)


def test_a_part_of_a_batch_takes_only_its_own_room(tmp_path):
    assert put(tmp_path, KEY, entry={"latents": torch.zeros(1000, 4)[3]}).stat().st_size < 500


def test_the_same_key_twice_does_no_harm(tmp_path):
    put(tmp_path, KEY), put(tmp_path, KEY, OTHER)
    assert same(got(tmp_path, KEY)) and Cache(tmp_path).missing([KEY, OTHER, KEY]) == []
    assert list(Cache(tmp_path).entries([KEY, OTHER, KEY]).absent()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    cache = Cache(tmp_path / "file")
    cache.put(KEY, ENTRY, ORIGIN)
    with pytest.raises(SettingsError, match=r"data\.cache_dir="):
        cache.flush()


def test_a_shard_that_has_no_room_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=51))  # of 12 * 4 + 2 * 2
    cache = Cache(tmp_path)
    cache.put(KEY, ENTRY, ORIGIN)
    with pytest.raises(DiskError, match="No space left on device, it needs"):
        cache.flush()
    assert list(tmp_path.iterdir()) == []


# Damage


def test_a_file_cut_anywhere_counts_as_absent_and_is_named(tmp_path, caplog):
    path = put(tmp_path, KEY)
    whole = path.read_bytes()
    lengths = [*range(0, len(whole), 7), len(whole) - 1]
    for length in lengths:
        path.write_bytes(whole[:length])
        assert absent(tmp_path, KEY), length
    assert caplog.text.count(f"{path}: ") == len(lengths)


def test_whatever_byte_changes_nothing_else_is_ever_read(tmp_path):
    path = put(tmp_path, OTHER, KEY)
    whole = path.read_bytes()
    data = len(whole) - 2 * (12 * 4 + 2 * 2 + 8 + 20)
    lost = []
    for place in [*range(0, data, 5), *range(data, len(whole))]:
        for file in tmp_path.glob("*.damaged"):
            file.unlink()
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            assert same(got(tmp_path, KEY)), place
        except SettingsError:
            lost.append(place)
    assert len([place for place in lost if place >= data]) == 12 * 4 + 2 * 2 + 8 + 20  # of KEY, and nothing of OTHER


def test_a_file_of_zeros_counts_as_absent(tmp_path):
    path = put(tmp_path, KEY)
    path.write_bytes(bytes(path.stat().st_size))
    assert absent(tmp_path, KEY)


def test_a_damaged_entry_is_named_once_and_made_again(tmp_path, caplog):
    path = put(tmp_path, OTHER, KEY)
    with path.open("rb+") as file:
        file.seek(path.stat().st_size - 2 * 28 - 1)  # the last byte of data: of KEY
        file.write(b"x")
    with pytest.raises(SettingsError, match=f"{KEY} is gone or damaged"):
        got(tmp_path, KEY)
    assert f"{path}: entry 1 is damaged" in caplog.text
    assert absent(tmp_path, KEY) and same(got(tmp_path, OTHER))
    caplog.clear()
    put(tmp_path, KEY)
    assert same(got(tmp_path, KEY)) and not caplog.text


def test_another_copy_takes_the_place_of_a_damaged_one(tmp_path):
    copies = {put(tmp_path, KEY), put(tmp_path, KEY)}
    entries = Cache(tmp_path).entries([KEY])
    used = entries.shards[entries.shard[0]].path
    for path in (used, *(copies - {used})):
        assert same(got(tmp_path, KEY))
        content = path.read_bytes()
        path.write_bytes(content[:-29] + bytes([content[-29] ^ 1]) + content[-28:])
    with pytest.raises(SettingsError, match="gone or damaged"):
        got(tmp_path, KEY)


def test_another_file_in_the_folder_is_named_and_left_alone(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    put(tmp_path, KEY)
    safetensors.torch.save_file(ENTRY, tmp_path / "lora.safetensors")
    (tmp_path / "notes.txt").write_text("mine")
    cache = Cache(tmp_path)
    cache.refresh(), cache.refresh()
    assert same(got(tmp_path, KEY))
    assert caplog.text.count("lora.safetensors: no shard of the cache's version 1") == 2  # once by each reader


# Writing is interrupted


def test_the_data_is_on_the_disk_before_the_file_has_its_name(tmp_path, monkeypatch):
    calls: list[str] = []

    def noted(name: str) -> Callable[..., None]:
        real = getattr(os, name)
        return lambda *arguments: (calls.append(name), real(*arguments))[1]

    monkeypatch.setattr(os, "fsync", noted("fsync"))
    monkeypatch.setattr(os, "replace", noted("replace"))
    put(tmp_path, KEY)
    assert calls[:2] == ["fsync", "replace"]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, call):
    before = put(tmp_path, OTHER)

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(DiskError, match="No space left on device"):
            put(tmp_path, KEY)
    assert list(tmp_path.iterdir()) == [before]
    assert absent(tmp_path, KEY) and same(got(tmp_path, OTHER))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_process_that_dies_while_it_writes_leaves_no_entry(tmp_path, monkeypatch, call):
    monkeypatch.setattr(os, call, lambda *arguments: os._exit(9))
    child = FORK.Process(target=put, args=(tmp_path, KEY))
    child.start(), child.join()
    assert child.exitcode == 9
    assert absent(tmp_path, KEY)
    assert [path.name.startswith(".") for path in tmp_path.iterdir()] == [True]


def put_for_ever(folder: Path) -> None:
    cache, number = Cache(folder, shard_bytes=100_000), 0
    while True:
        cache.put(f"{number:040x}", {"x": torch.full((1000,), float(number))}, ORIGIN)
        number += 1


def test_a_process_that_is_killed_at_any_moment_leaves_whole_entries_only(tmp_path):
    for shards in range(1, 13):
        folder = tmp_path / str(shards)
        child = FORK.Process(target=put_for_ever, args=(folder,))
        child.start()
        while not folder.is_dir() or len(list(folder.iterdir())) < shards:  # also those that are being written
            pass
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        whole = list(folder.glob("*.safetensors"))
        count = 25 * len(whole)  # a thousand numbers are 4000 bytes
        cache = Cache(folder)
        entries = cache.entries(f"{number:040x}" for number in range(count + 1))
        assert not cache.unreadable and list(entries.absent()) == [count]
        if count:
            assert entries.read(range(count))["x"][:, 0].tolist() == list(range(count))


def put_many(folder: Path) -> None:
    for start in range(0, 60, 3):
        cache = Cache(folder)
        for number in range(start, start + 3):
            cache.put(f"{number % 6:040x}", ENTRY, ORIGIN)
        cache.flush()


def test_two_processes_fill_one_folder_while_a_third_reads(tmp_path):
    writers = [FORK.Process(target=put_many, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    cache, keys = Cache(tmp_path), [f"{number:040x}" for number in range(6)]
    while any(writer.is_alive() for writer in writers):
        entries = cache.entries(keys)
        there = sorted(set(range(6)) - set(entries.absent().tolist()))
        assert all(same({name: each[0] for name, each in entries.read([number]).items()}) for number in there)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert not cache.unreadable and len(list(tmp_path.iterdir())) == 40
    assert cache.missing(keys) == []


# Keys


@pytest.mark.parametrize(
    ("part", "other"),
    [
        ("content", "d"),
        ("original", Size(200, 100)),
        ("view", View(Size(64, 112), Size(64, 129), Crop(0, 8))),
        ("view", View(Size(64, 112), Size(64, 128), Crop(8, 0))),
        ("view", View(Size(112, 64), Size(64, 128), Crop(0, 8))),
        ("background", "black"),
        ("identity", "vae bf16"),
    ],
)
def test_the_images_key_depends_on_every_part(part, other):
    assert image_key(**(GEOMETRY | {part: other})) != image_key(**GEOMETRY)


def test_the_prompts_key_depends_on_the_caption_and_the_encoder():
    keys = {prompt_key("a", "clip"), prompt_key("b", "clip"), prompt_key("a", "t5"), prompt_key("", "aclip")}
    assert len(keys) == 4


def test_a_header_nested_beyond_all_reason_is_damage(tmp_path):
    header = b"[" * 10**5
    (tmp_path / "a.safetensors").write_bytes(LENGTH.pack(len(header)) + header)
    with pytest.raises(Damaged, match="its header is no JSON"):
        Shard.open(tmp_path / "a.safetensors")
