"""A run that stops and goes on is the run that never stopped."""

from __future__ import annotations

import csv
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from otl.callbacks.checkpoint import Checkpoint, Stopped, newest
from otl.callbacks.ema import EMA
from otl.callbacks.guard import NonFinite
from otl.callbacks.metrics import Metrics
from otl.callbacks.sampling import Sampling
from otl.config import SettingsError

from .conftest import Run, TinyModule


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def metrics(folder: Path, column: str) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row[column] for row in csv.DictReader(file)]


def same_weights(one: TinyModule, other: TinyModule) -> bool:
    pairs = zip(one.trained_parameters().values(), other.trained_parameters().values())
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


class Signal(Callback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, number: int, batch: int) -> None:
        self.number, self.batch = number, batch

    def on_before_backward(self, trainer: Any, pl_module: TinyModule, loss: Any) -> None:
        if len(pl_module.losses) == self.batch:
            os.kill(os.getpid(), self.number)


# An epoch has 3 batches: steps 2 and 5 are inside one, 3 and 6 at its end. With accumulation an epoch has 2 steps.
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [2, 3, 4, 5, 6])
def test_a_resumed_run_ends_with_the_same_weights(run: Run, tmp_path: Path, stop: int, accumulate: int) -> None:
    whole = run(Checkpoint(every=stop, keep=9), EMA(0.9), steps=8, folder="whole", accumulate=accumulate)
    path = tmp_path / "whole/checkpoints" / f"step-{stop:08d}.ckpt"
    torch.manual_seed(99)
    resumed = run(Checkpoint(), EMA(0.9), steps=8, folder="resumed", ckpt=path, accumulate=accumulate)
    assert resumed.losses == [pair for pair in whole.losses if pair[0] >= stop]
    assert same_weights(resumed, whole)


@pytest.mark.parametrize("stop", [1, 2, 3])  # inside an epoch, at its end, inside
def test_a_finished_run_can_be_made_longer(run: Run, tmp_path: Path, stop: int) -> None:
    whole = run(Checkpoint(every=None), Metrics(), steps=8, accumulate=2, folder="whole")
    run(Checkpoint(every=None), Metrics(), steps=stop, accumulate=2)
    path = newest(tmp_path / "run/checkpoints")
    longer = run(Checkpoint(every=None), Metrics(), steps=8, accumulate=2, ckpt=path)
    assert same_weights(longer, whole)
    for column in ("step", "epoch", "loss"):
        assert metrics(tmp_path / "run", column) == metrics(tmp_path / "whole", column)


def test_names_count_optimizer_steps(run: Run, tmp_path: Path) -> None:
    run(Checkpoint(every=2, keep=9), steps=5, accumulate=2)
    expected = ["step-00000002.ckpt", "step-00000004.ckpt", "step-00000005.ckpt"]
    assert names(tmp_path / "run/checkpoints") == expected


def test_the_end_is_saved_where_training_stops_early(run: Run, tmp_path: Path) -> None:
    run(Checkpoint(every=None), steps=3, total=100)
    assert names(tmp_path / "run/checkpoints") == ["step-00000003.ckpt"]


def test_only_its_own_old_checkpoints_are_deleted(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoints"
    folder.mkdir(parents=True)
    for foreign in ("step-00000001.ckpt.bak", "step-00000900.ckpt", "notes.txt", "last.ckpt"):
        (folder / foreign).write_text("mine")
    run(Checkpoint(every=1, keep=2), steps=5)
    own = ["step-00000004.ckpt", "step-00000005.ckpt"]
    assert names(folder) == sorted([*own, "step-00000001.ckpt.bak", "step-00000900.ckpt", "notes.txt", "last.ckpt"])


def test_retention_goes_on_after_a_resume(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoints"
    run(Checkpoint(every=1, keep=2), steps=3, total=6)
    run(Checkpoint(every=1, keep=2), steps=6, ckpt=folder / "step-00000003.ckpt")
    assert names(folder) == ["step-00000005.ckpt", "step-00000006.ckpt"]


def test_another_folders_checkpoints_are_left_alone(run: Run, tmp_path: Path) -> None:
    first, second = tmp_path / "first/checkpoints", tmp_path / "second/checkpoints"
    run(Checkpoint(every=1, keep=2), steps=3, folder="first", total=6)
    second.mkdir(parents=True)
    (second / "step-00000002.ckpt").write_text("not of this run, though its checkpoint knows the name")
    run(Checkpoint(every=1, keep=1), steps=6, folder="second", ckpt=first / "step-00000003.ckpt")
    assert names(first) == ["step-00000002.ckpt", "step-00000003.ckpt"]
    assert names(second) == ["step-00000002.ckpt", "step-00000006.ckpt"]


def test_a_failed_save_leaves_no_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full_disk(self: Any, checkpoint: Any, path: Path, storage_options: Any = None) -> None:
        Path(path).write_bytes(b"half a checkpoint")
        raise OSError("No space left on device")

    run(Checkpoint(every=2), steps=2, total=9)
    monkeypatch.setattr("lightning.fabric.plugins.io.torch_io.TorchCheckpointIO.save_checkpoint", full_disk)
    with pytest.raises(OSError, match="No space"):
        run(Checkpoint(every=2), steps=9)
    assert names(tmp_path / "run/checkpoints") == ["step-00000002.ckpt"]


def test_the_newest_whole_file_is_found(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "run/checkpoints"
    run(Checkpoint(every=1, keep=9), steps=4)
    cut = folder / "step-00000004.ckpt"
    cut.write_bytes(cut.read_bytes()[:-100])
    flipped = bytearray((folder / "step-00000003.ckpt").read_bytes())
    flipped[len(flipped) // 2] ^= 0xFF
    (folder / "step-00000003.ckpt").write_bytes(flipped)
    assert newest(folder) == folder / "step-00000002.ckpt"
    assert [record.levelname for record in caplog.records if "damaged" in record.message] == ["WARNING"] * 2


def test_what_an_earlier_run_left_is_not_the_newest(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoints"
    run(Checkpoint(), steps=5)
    os.utime(folder / "step-00000005.ckpt", (1e9, 1e9))
    run(Checkpoint(), steps=3)
    assert newest(folder) == folder / "step-00000003.ckpt"


def test_there_is_no_newest_in_an_empty_or_missing_folder(tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    assert newest(tmp_path / "nowhere") is None


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_run_can_go_on(run: Run, tmp_path: Path, number: int) -> None:
    whole = run(Checkpoint(every=None), steps=6, folder="whole", accumulate=2)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="resume=auto") as stopped:
        run(Checkpoint(every=None), Signal(number, batch=4), steps=6, accumulate=2)
    assert stopped.value.signal_number == number
    assert stopped.value.path == tmp_path / "run/checkpoints/step-00000003.ckpt"
    assert signal.getsignal(number) is before
    assert same_weights(run(Checkpoint(), steps=6, ckpt=stopped.value.path, accumulate=2), whole)


def test_weights_that_are_not_numbers_are_not_saved(run: Run, tmp_path: Path) -> None:
    class Break(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: TinyModule, *rest: Any) -> None:
            pl_module.net.bias.data[0] = float("inf")

    with pytest.raises(NonFinite, match=r"net\.bias"):
        run(Checkpoint(every=1), Break(), steps=2)
    assert not (tmp_path / "run/checkpoints").exists()


def test_it_runs_after_the_others(run: Run) -> None:
    order: list[list[type]] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            order.append([type(callback) for callback in trainer.callbacks])

    run(Checkpoint(), Look(), Sampling(), steps=1)
    assert order == [[Look, Sampling, Checkpoint]]


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}])
def test_impossible_numbers_are_refused(run: Run, wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=f"callbacks.checkpoint.{next(iter(wrong))}=0"):
        run(Checkpoint(**wrong), steps=1)
