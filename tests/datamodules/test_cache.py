import multiprocessing
from pathlib import Path

import pytest
import torch

from otl.config import SettingsError
from otl.datamodules.cache import Cache, image_key, prompt_key
from otl.datamodules.views import View
from otl.types import Crop, Size

KEY = "ab" + "0" * 38
ENTRY = {"hidden": torch.arange(12.0).reshape(3, 4), "pooled": torch.ones(2, dtype=torch.bfloat16)}
GEOMETRY = {
    "content": "c",
    "original": Size(100, 200),
    "view": View(Size(64, 112), Size(64, 128), Crop(0, 8)),
    "background": "white",
    "identity": "vae",
}


def same(entry: dict[str, torch.Tensor] | None) -> bool:
    return entry is not None and entry.keys() == ENTRY.keys() and all(torch.equal(entry[k], ENTRY[k]) for k in ENTRY)


def test_what_is_put_is_got(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, ENTRY)
    assert same(cache.get(KEY))
    assert cache.path(KEY) == tmp_path / "ab" / f"{KEY}.safetensors"


def test_what_was_never_put_is_missing(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, ENTRY)
    assert cache.get("cd") is None
    assert cache.missing(["cd", KEY, "ef", "cd"]) == ["cd", "ef"]


def test_a_file_cut_anywhere_counts_as_absent(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, ENTRY)
    whole = cache.path(KEY).read_bytes()
    for length in range(len(whole)):
        cache.path(KEY).write_bytes(whole[:length])
        assert cache.get(KEY) is None and cache.missing([KEY]) == [KEY], length


def test_a_file_with_a_changed_byte_counts_as_absent(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, ENTRY)
    whole = bytearray(cache.path(KEY).read_bytes())
    whole[-1] ^= 1
    cache.path(KEY).write_bytes(whole)
    assert cache.get(KEY) is None


def test_a_file_of_zeros_counts_as_absent(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, ENTRY)
    cache.path(KEY).write_bytes(bytes(cache.path(KEY).stat().st_size))
    assert cache.get(KEY) is None and cache.missing([KEY]) == [KEY]


def test_a_part_of_a_batch_takes_only_its_own_room(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, {"latents": torch.zeros(1000, 4)[3]})
    assert cache.path(KEY).stat().st_size < 500


def test_nothing_but_entries_is_left_behind(tmp_path):
    cache = Cache(tmp_path)
    cache.put(KEY, ENTRY)
    cache.put(KEY, ENTRY)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{KEY}.safetensors"]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SettingsError, match=r"data\.cache_dir="):
        Cache(tmp_path / "file").put(KEY, ENTRY)


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


def put_many(folder: Path) -> None:
    cache = Cache(folder)
    for number in range(60):
        cache.put(f"{number % 6:02d}{'f' * 38}", ENTRY)


def test_two_processes_share_a_folder(tmp_path):
    """A reader meets whole entries only, while two others write the same ones over and over."""
    spawn = multiprocessing.get_context("fork")
    writers = [spawn.Process(target=put_many, args=(tmp_path,)) for _ in range(2)]
    for writer in writers:
        writer.start()
    cache = Cache(tmp_path)
    while any(writer.is_alive() for writer in writers):
        for number in range(6):
            path = cache.path(f"{number:02d}{'f' * 38}")
            assert not path.exists() or same(cache.get(path.stem))
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 6
