"""A run that its folder has no room for does not begin."""

import shutil
from types import SimpleNamespace

import pytest

from otl.formats.files import DiskError
from otl.tasks import disk
from otl.tasks.disk import Need, lacking
from otl.tasks.memory import Encoded
from otl.tasks.train import train
from tests.formats.test_files import files_end_at

MADE = {
    "weights": [{"parameters": 1000, "trained": 10}, {"parameters": 500, "trained": 0}],
    "memory": {"optimizer": 80},
    "total_steps": 1000,
    "resolution": 512,
    "pixels_cached": 3 * 64 * 64,
    "images_to_draw": 0,
    "captions": {"distinct": 2},
}
ROWS = 1000 * disk.ROW


def estimate(settings, *overrides, whole=(), encoded=None):
    module = SimpleNamespace(method=SimpleNamespace(whole_parts=whole))
    return disk.estimate(MADE, module, settings("data.path=x", "logger=none", *overrides), encoded)


@pytest.mark.parametrize(
    ("overrides", "checkpoint", "checkpoints", "results"),
    [
        ([], 4 * 10 + 80, 3, 1),  # keep=2, and the one that is being written
        (["callbacks.checkpoint.keep=4", "callbacks.checkpoint.best=true"], 120, 6, 1),
        (["callbacks.ema.decay=0.9", "callbacks.export.every=300"], 160, 3, 4),
        (["callbacks.checkpoint=null"], 120, 0, 1),
    ],
)
def test_checkpoints_hold_weights_optimizer_and_average(settings, overrides, checkpoint, checkpoints, results):
    found = estimate(settings, "output.dtype=fp32", *overrides)
    assert (found["checkpoint"], found["checkpoints"], found["results"]) == (checkpoint, checkpoints, results)
    assert (found["result"], found["total"]) == (40, checkpoint * checkpoints + 40 * results + ROWS)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("fp16", 2)])
def test_a_whole_model_is_written_whole(settings, dtype, size):
    assert estimate(settings, f"output.dtype={dtype}", whole=("unet",))["result"] == 1500 * size


@pytest.mark.parametrize(
    ("overrides", "drawing", "drawings"),
    [
        ([], 0, 3),  # before, after 500 and at the end; nothing is drawn
        (["sample.prompts=[a, b]"], 2 * 3 * (512**2 + 512**2), 3),  # and each as large again on the sheet
        (["sample.prompts=[a]", "sample.seeds=[0, 1]", "logger=tensorboard"], 2 * 3 * 3 * 512**2, 3),
        (["sample.prompts=[a]", "sample.height=256", "callbacks.sampling.first=false"], 3 * 512 * (256 + 512), 2),
        (["sample.prompts=[a]", "callbacks.sampling.every=300"], 6 * 512**2, 5),
        (["sample.prompts=[a]", "callbacks.sampling.every=null"], 6 * 512**2, 2),
        (["sample.prompts=[a]", "callbacks.sampling=null"], 6 * 512**2, 0),
    ],
)
def test_pictures_are_counted_with_their_sheets_and_events(settings, overrides, drawing, drawings):
    found = estimate(settings, "callbacks.checkpoint=null", "output.dtype=fp32", *overrides)
    assert (found["drawing"], found["drawings"]) == (drawing, drawings)
    assert found["run"] == drawing * drawings + 40 + ROWS


def test_the_cache_holds_every_pixel_and_caption(settings):
    found = estimate(settings, encoded=Encoded(pixel=0.25, caption=100))
    assert found["cache"] == 3 * 64 * 64 // 4 + 200 == found["total"] - found["run"]


@pytest.mark.parametrize("free", [100, 399, 400])
def test_without_room_the_run_does_not_begin(settings, tmp_path, monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    needs = estimate(settings, "output.dtype=fp32") | {"run": 400}
    composed = settings("output.name=x", f"data.cache_dir={tmp_path}/cache")
    found = disk.problems(needs, composed, tmp_path)
    assert [problem.fatal for problem in found] == ([True] if free < 400 else [])
    if found:
        assert "3 checkpoints of 0 kB and 1 results of 0 kB" in found[0].message
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-00000001.ckpt").write_bytes(b"x")  # of this run: 1 byte to be freed
    assert bool(disk.problems(needs, composed, tmp_path)) == (free < 399)


def test_what_lies_on_one_disk_is_counted_together(tmp_path, monkeypatch):
    """300 bytes are free on each disk."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=300))
    run, cache = tmp_path / "run", tmp_path / "cache"
    needs = [Need("hydra.run.dir", run, 200, 0, "results"), Need("data.cache_dir", cache, 400, 200, "images")]
    assert lacking(needs, disk_of=str) == []
    (together,) = lacking(needs)
    assert (together.key, f"data.cache_dir={cache}" in together.message) == ("hydra.run.dir", True)
    (alone,) = lacking([needs[0], needs[1]._replace(there=99)], disk_of=str)
    assert alone.key == "data.cache_dir" and "needs about 0 kB there, for images" in alone.message


def test_what_the_cache_has_may_be_of_these_images(settings, tmp_path, monkeypatch):
    """Which is known when the encoders are: a run is not refused for what may be there."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10**6))
    needs = estimate(settings) | {"cache": 10**6 + 8}
    composed = settings(f"data.cache_dir={tmp_path}/cache")
    assert [problem.key for problem in disk.problems(needs | {"run": 0}, composed, tmp_path)] == ["data.cache_dir"]
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "1.safetensors").write_bytes(bytes(8))
    assert disk.problems(needs | {"run": 0}, composed, tmp_path) == []


def test_a_disk_that_is_full_before_the_run_has_begun_is_told(settings, tmp_path):
    with files_end_at(0), pytest.raises(DiskError, match=f"{tmp_path} cannot be written: File too large"):
        train(settings("model.checkpoint=x", "data.path=x"), tmp_path)
