"""Files appear whole or not at all, and are on the disk before they have their name."""

import errno
import json
import os
import resource
import shutil
import zipfile
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from otl.config import SettingsError
from otl.formats import stored
from otl.formats.files import FAILING, DiskError, named, read, read_any, sweep, whole, whole_folder, write


@pytest.fixture
def calls(monkeypatch):
    """What is asked of the operating system, in order: the name each fsync and replace is about."""
    seen = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(number):
        seen.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{number}"))))
        fsync(number)

    def seen_replace(source, target):
        seen.append(("replace", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    return seen


@contextmanager
def files_end_at(count):
    """For the system, a file of more bytes is an error: as a full disk is, but for this process alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_on_the_disk_before_it_has_its_name_and_its_name_afterwards(tmp_path, calls):
    with whole(tmp_path / "a.txt") as aside:
        aside.write_text("x")
    assert calls == [("fsync", aside.name), ("replace", "a.txt"), ("fsync", tmp_path.name)]


def test_so_is_a_folder_with_all_that_is_in_it(tmp_path, calls):
    with whole_folder(tmp_path / "final") as aside:
        (aside / "unet").mkdir()
        (aside / "unet" / "weights").write_text("x")
    assert {name for call, name in calls[:3] if call == "fsync"} == {"unet", "weights", aside.name}
    assert calls[3:] == [("replace", "final"), ("fsync", tmp_path.name)]


def test_a_folder_takes_the_place_of_another_and_nothing_is_left_over(tmp_path):
    for text in ("old", "new"):
        with whole_folder(tmp_path / "final") as aside:
            (aside / text).write_text(text)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["final", "final/new"]


@pytest.mark.parametrize("failing", [1, 2])
def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path, monkeypatch, failing):
    with whole_folder(tmp_path / "final") as aside:
        (aside / "old").write_text("")
    replace, count = os.replace, [0]

    def fail(source, target):
        count[0] += 1
        if count[0] == failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with (
        pytest.raises(DiskError, match="final cannot be written: Input/output error"),
        whole_folder(tmp_path / "final"),
    ):
        pass
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["final", "final/old"]


def test_a_full_disk_is_told_by_the_name_of_the_file_and_leaves_nothing(tmp_path):
    """By Python's own writing, by that of safetensors, and one file within another's."""
    for number, writing in enumerate((in_python, in_safetensors, nested)):
        path = tmp_path / f"{number}.safetensors"
        with files_end_at(1000), pytest.raises(DiskError, match=rf"/{number}\.safetensors cannot be written: File too"):
            writing(path)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_breaks_for_good_is_told_by_the_name_of_the_file_too(tmp_path, monkeypatch):
    """What was written aside cannot be deleted, nor the old folder put back."""
    with whole_folder(tmp_path / "folder") as aside:
        (aside / "old").write_text("x")
    replace, targets = os.replace, []

    def broken(source, *target):
        targets.extend(target)
        if len(targets) != 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        replace(source, *target)  # of the old folder to where it waits

    monkeypatch.setattr(os, "unlink", broken)
    monkeypatch.setattr(os, "replace", broken)
    with (
        pytest.raises(DiskError, match="folder cannot be written: Input/output"),
        whole_folder(tmp_path / "folder") as aside,
    ):
        (aside / "new").write_text("x")
    with pytest.raises(DiskError, match="file cannot be written: Input/output"), whole(tmp_path / "file") as aside:
        aside.write_text("x")


@pytest.mark.parametrize("kind", [str, Path])  # as it was given to the system
def test_a_disk_that_fails_elsewhere_is_told_by_the_name_of_what_lies_there(tmp_path, kind):
    """Such as that of the cache, while the run's has room."""
    error = OSError(errno.EROFS, os.strerror(errno.EROFS), kind(tmp_path / "cache"))
    with pytest.raises(DiskError, match=f"^{tmp_path}/cache cannot be written"), named(tmp_path / "run", FAILING):
        raise error


def test_what_says_itself_which_file_it_is_about_stays_as_it_is(tmp_path):
    """Such as the index of a cache without room, by the setting that names it."""
    with pytest.raises(SettingsError, match=r"^data\.cache_dir"), named(tmp_path / "run", FAILING):
        raise SettingsError("data.cache_dir=c: cannot be written") from OSError(errno.ENOSPC, "full")


def in_python(path):
    with whole(path) as aside:
        aside.write_bytes(bytes(2000))


def in_safetensors(path):
    write(path, {"x": torch.zeros(500)}, {})


def nested(path):
    with whole(path) as aside:
        in_safetensors(aside)


def test_what_killed_processes_left_is_swept_away_and_nothing_else(tmp_path):
    for name in (".a.ckpt.123.writing", "a.ckpt", ".hidden", "b.123.writing", ".c.writing"):
        (tmp_path / name).write_text("")
    (tmp_path / ".final.45.writing" / "unet").mkdir(parents=True)
    assert sorted(path.name for path in sweep(tmp_path)) == [".a.ckpt.123.writing", ".final.45.writing"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".c.writing", ".hidden", "a.ckpt", "b.123.writing"]
    assert sweep(tmp_path / "absent") == []


def test_read_gives_what_was_written(tmp_path):
    tensor = torch.arange(6).reshape(2, 3).T.float()  # not contiguous
    write(tmp_path / "a.safetensors", {"x": tensor}, {"title": "Größe"})
    tensors, header = read(tmp_path / "a.safetensors")
    assert torch.equal(tensors["x"], tensor) and header == {"title": "Größe"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), whole(path) as aside:
        aside.write_bytes(b"half")
        raise RuntimeError
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_new_file_takes_the_place_of_the_old_one_in_one_step(tmp_path):
    path, reader = tmp_path / "a.safetensors", tmp_path / "reader"
    write(path, {"x": torch.zeros(1)}, {})
    reader.hardlink_to(path)  # A program that still has the old file open.
    write(path, {"x": torch.ones(1)}, {})
    assert read(reader)[0]["x"] == 0 and read(path)[0]["x"] == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"layer\.down would hold NaN or infinity"):
        write(tmp_path / "a.safetensors", {"layer.down": torch.tensor([1.0, value])}, {})
    assert not list(tmp_path.iterdir())


def test_header_fields_are_strings(tmp_path):
    with pytest.raises(ValueError, match="ss_network_dim"):
        write(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, {"ss_network_dim": 4})


def test_half_a_file_is_an_error_that_names_it(tmp_path):
    write(tmp_path / "a.safetensors", {"x": torch.zeros(64)}, {})
    (tmp_path / "b.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-8])
    for name in ("b.safetensors", "absent.safetensors"):
        with pytest.raises(ValueError, match=name):
            read(tmp_path / name)


@pytest.mark.parametrize("free", [399, 400])
def test_what_needs_more_room_than_there_is_is_not_begun(tmp_path, monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with nullcontext() if free == 400 else pytest.raises(DiskError, match="No space left on device, it needs 0 kB"):
        write(tmp_path / "a.safetensors", {"a": torch.zeros(100)}, {})
    assert (tmp_path / "a.safetensors").exists() == (free == 400)


def laid(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_a_packed_file_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    """Of an adapter or embedding: torch packs nothing, and what a stranger has packed could fill the memory."""
    torch.save({"a": torch.zeros(1000, 1000)}, tmp_path / "whole.bin")
    with zipfile.ZipFile(tmp_path / "whole.bin") as whole, zipfile.ZipFile(tmp_path / "packed.bin", "w") as packed:
        for info in whole.infolist():
            packed.writestr(info.filename, whole.read(info), zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was unpacked"))
    with pytest.raises(SettingsError, match=r"packed\.bin: says it holds 4\d{6} bytes"):
        read_any(tmp_path / "packed.bin")


FORGED = {
    "overlapping": json.dumps({"a": laid([8], 0, 32), "b": laid([8], 16, 48)}),
    "out of range": json.dumps({"a": laid([2**20], 0, 2**22)}),
    "a hole": json.dumps({"a": laid([4], 48, 64)}),
    "negative": json.dumps({"a": laid([-4, -4], 0, 64)}),
    "another length": json.dumps({"a": laid([3], 0, 64)}),
    "overflow": json.dumps({"a": laid([2**40, 2**40], 0, 64)}),
    "twice": f'{{"a": {json.dumps(laid([8], 0, 32))}, "a": {json.dumps(laid([8], 32, 64))}}}',
    "no dtype": json.dumps({"a": laid([16], 0, 64, "X32")}),
    "no words": json.dumps({"__metadata__": {"x": 1}, "a": laid([16], 0, 64)}),
    "deep": '{"a":' + "[" * 10**5 + "]" * 10**5 + "}",
    "a list": "[]",
}


@pytest.mark.parametrize("header", FORGED.values(), ids=FORGED)
def test_a_header_that_cannot_be_true_is_refused(tmp_path, header):
    """Of adapters, embeddings, checkpoints: before anything is allocated for what it says."""
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header.encode() + bytes(64))
    for way in (read, stored.in_file):
        with pytest.raises(SettingsError, match=r"a\.safetensors: not a whole safetensors file"):
            way(path)


@pytest.mark.parametrize("length", [99 * 10**6, 2**62, 2**64 - 1])
def test_a_header_that_says_it_is_endless_is_refused(tmp_path, length):
    path = tmp_path / "a.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + bytes(64))
    with pytest.raises(SettingsError, match="not a whole safetensors file"):
        read(path)
