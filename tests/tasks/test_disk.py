"""A run that its folder has no room for does not begin."""

import shutil
from types import SimpleNamespace

import pytest

from otl.formats.files import DiskError
from otl.tasks import disk
from otl.tasks.train import train
from tests.formats.test_files import files_end_at

MADE = {
    "weights": [{"parameters": 1000, "trained": 10}, {"parameters": 500, "trained": 0}],
    "memory": {"optimizer": 80},
    "total_steps": 1000,
}


def estimate(settings, *overrides, whole=()):
    module = SimpleNamespace(method=SimpleNamespace(whole_parts=whole))
    return disk.estimate(MADE, module, settings("data.path=x", "logger=none", *overrides))


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
    assert (found["result"], found["total"]) == (40, checkpoint * checkpoints + 40 * results)


@pytest.mark.parametrize(("dtype", "size"), [("fp32", 4), ("fp16", 2)])
def test_a_whole_model_is_written_whole(settings, dtype, size):
    assert estimate(settings, f"output.dtype={dtype}", whole=("unet",))["result"] == 1500 * size


@pytest.mark.parametrize("free", [399, 400])
def test_without_room_the_run_does_not_begin(settings, tmp_path, monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    needs = estimate(settings, "output.dtype=fp32")
    found = disk.problems(needs, settings("output.name=x"), tmp_path)
    assert [problem.fatal for problem in found] == ([True] if free < 400 else [])
    if found:
        assert "3 checkpoints of 0 kB and 1 results of 0 kB" in found[0].message
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "checkpoints" / "step-00000001.ckpt").write_bytes(b"x")  # of this run: 1 byte to be freed
        assert disk.problems(needs, settings("output.name=x"), tmp_path) == []


def test_a_disk_that_is_full_before_the_run_has_begun_is_told(settings, tmp_path):
    with files_end_at(0), pytest.raises(DiskError, match=f"{tmp_path} cannot be written: File too large"):
        train(settings("model.checkpoint=x", "data.path=x"), tmp_path)
