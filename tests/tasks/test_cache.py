"""task=cache: what it makes is what a run reads, and what it says and deletes is true."""

import os
import time
from typing import Any

import pytest
import torch
from PIL import Image

from otl.check import check
from otl.config import SettingsError
from otl.datamodules.cache import Cache
from otl.datamodules.shards import Origin
from otl.datamodules.upkeep import contents
from otl.tasks.cache import DamageFound, cache
from otl.tasks.run import build_data, build_module
from tests.commands import run_otl


@pytest.fixture
def photos(tmp_path):
    """Five pictures in two buckets."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64) if number < 3 else (96, 64), (40 * number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    return folder


@pytest.fixture
def line(photos, tmp_path, sd15_folder):
    """Settings of a run."""
    return [
        f"model.checkpoint={sd15_folder}",
        f"data.path={photos}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.resolution=64",
        "logger=none",
        "trainer.accelerator=cpu",
    ]


def entries(store: Cache) -> dict[str, int]:
    """Kind -> number of entries."""
    return {each.origin.kind: each.entries for each in contents(store)}


def put(store: Cache, key: str) -> None:
    store.put(key, {"latents": torch.zeros(4)}, Origin("image", "Family", "0123456789"))
    store.flush()


def written(settings: Any, line: list[str], tmp_path: Any, *more: str) -> int:
    """How many entries a run writes that begins now."""
    composed = settings(*line, *more)
    module = build_module(composed)
    module.configure_model()
    data = build_data(composed, module)
    data.setup("fit")
    before = sum(entries(Cache(tmp_path / "cache")).values())
    data.fill_cache(module, images=True, prompts=not module.trains_text)
    return sum(entries(Cache(tmp_path / "cache")).values()) - before


def test_a_run_finds_all_that_was_filled_ahead(settings, line, tmp_path, capsys):
    cache(settings(*line), folder=tmp_path)
    assert entries(Cache(tmp_path / "cache")) == {"image": 5, "prompt": 5}
    assert f"10 entries of {tmp_path / 'photos'} at 64 px for StableDiffusion\n" in capsys.readouterr().out
    assert written(settings, line, tmp_path) == 0


def test_where_a_text_encoder_trains_captions_are_not_cached(settings, line, tmp_path):
    trains = "method.parts={denoiser: {}, text_encoder: {}}"
    cache(settings(*line, trains), folder=tmp_path)
    assert entries(Cache(tmp_path / "cache")) == {"image": 5}
    assert written(settings, line, tmp_path, trains) == 0


def test_nothing_is_filled_from_a_dataset_with_mistakes(settings, line, photos, tmp_path):
    (photos / "0.txt").unlink()
    with pytest.raises(SettingsError, match=r"data\.missing_captions"):
        cache(settings(*line), folder=tmp_path)


@pytest.mark.slow
def test_every_rank_fills_its_share(line, tmp_path):
    done = run_otl("task=cache", *line, "trainer.devices=2", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.code == 0, done.err
    store = Cache(tmp_path / "cache")
    assert entries(store) == {"image": 5, "prompt": 5}
    prompts = sorted(shard.count for shard in store.shards if shard.origin.kind == "prompt")
    assert prompts == [2, 3]


def test_other_actions_need_neither_images_nor_a_model(settings, tmp_path):
    for action in ("show", "verify", "compact", "prune"):
        composed = settings(
            "task=cache", f"task.action={action}", f"data.cache_dir={tmp_path}", "model.checkpoint=none"
        )
        assert check(composed) == []
        cache(composed, action=action)


def test_damage_is_named_and_ends_with_an_error(settings, tmp_path, caplog):
    caplog.set_level("INFO")
    put(Cache(tmp_path), "ab" * 20)
    composed = settings(f"data.cache_dir={tmp_path}")
    cache(composed, action="verify")
    assert "1 entries are what was written" in caplog.text
    (path,) = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    content[-29] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamageFound, match=f"{path}: entry 0 .*\n.*1 damaged") as caught:
        cache(composed, action="verify")
    assert caught.value.exit_code != 0


def test_pruning_says_what_it_would_delete_before_it_does(settings, tmp_path, caplog):
    caplog.set_level("INFO")
    store = Cache(tmp_path)
    put(store, "ab" * 20), put(store, "cd" * 20)
    store.record("photos", ["ab" * 20])
    composed = settings(f"data.cache_dir={tmp_path}")
    cache(composed, action="prune")
    assert "would delete 1 entries that no dataset uses" in caplog.text
    assert sum(entries(store).values()) == 2
    cache(composed, action="prune", delete=True)
    assert store.missing(["ab" * 20, "cd" * 20]) == ["cd" * 20]
    (record,) = (tmp_path / "uses").iterdir()
    os.utime(record, (time.time() - 8 * 86400,) * 2)
    cache(composed, action="prune", delete=True, days=9)
    assert store.missing(["ab" * 20]) == []
    cache(composed, action="prune", delete=True, days=7)
    assert store.missing(["ab" * 20]) == ["ab" * 20]


def test_small_files_are_counted_and_merged(settings, tmp_path, capsys):
    store = Cache(tmp_path)
    put(store, "ab" * 20), put(store, "cd" * 20)
    composed = settings(f"data.cache_dir={tmp_path}")
    cache(composed, action="show")
    assert "small: 2 files" in capsys.readouterr().out
    cache(composed, action="compact")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    cache(composed, action="show")
    assert "small: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (["task.action=fill"], "data.path"),
        (["task.action=prune", "task.days=0"], "task.days"),
        (["task.action=verify", "task.delete=true"], "task.delete"),
        (["task.action=show", "task.days=3"], "task.days"),
        (["task.action=empty"], "task.action"),
        (["data.path=.", "data.cache=false"], "data.cache"),
    ],
)
def test_what_makes_no_sense_is_refused(settings, more, key):
    assert [problem.key for problem in check(settings("task=cache", *more))] == [key]
