"""A run that stops and goes on is the run that never stopped."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from otl.callbacks.backups import INDEX, newest
from otl.callbacks.checkpoint import Checkpoint
from otl.callbacks.ema import EMA
from otl.callbacks.guard import NonFinite
from otl.callbacks.metrics import Metrics
from otl.callbacks.sampling import Sampling
from otl.callbacks.stops import AtOnce, Stopped
from otl.config import SettingsError
from otl.formats.files import DiskError

from .conftest import Run, TinyLoader, TinyModule


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != INDEX)


def metrics(folder: Path, column: str) -> list[str]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [row[column] for row in csv.DictReader(file)]


def same_weights(one: TinyModule, other: TinyModule) -> bool:
    pairs = zip(one.trained_parameters().values(), other.trained_parameters().values())
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


class Copy(Callback):
    """Keeps a file as it is after an optimizer step and the validation that follows it."""

    def __init__(self, file: Path, copy: Path, step: int) -> None:
        self.file, self.copy, self.step = file, copy, step

    def on_train_batch_start(self, trainer: Any, pl_module: TinyModule, *rest: Any) -> None:
        if trainer.global_step == self.step and not self.copy.exists():
            metrics_callback = next(each for each in trainer.callbacks if isinstance(each, Metrics))
            metrics_callback._flush()
            shutil.copy(self.file, self.copy)


class Fail(Callback):
    """Raises in a hook, at an optimizer step."""

    def __init__(self, hook: str, step: int, error: Exception) -> None:
        def fail(trainer: Any, *rest: Any) -> None:
            if trainer.global_step == step:
                raise error

        setattr(self, hook, fail)


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
    assert all(torch.equal(average, whole.average[name]) for name, average in resumed.average.items())


class Enough(Callback):
    """Asks Lightning to end the run, as its Timer does, after a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_end(self, trainer: Any, pl_module: TinyModule, *rest: Any) -> None:
        trainer.should_stop = len(pl_module.losses) == self.batch


@pytest.mark.parametrize(("batch", "step"), [(3, 2), (4, 3), (5, 3)])  # at an epoch's end, in an accumulation, after it
def test_a_run_that_ends_early_ends_between_two_steps(run: Run, tmp_path: Path, batch: int, step: int) -> None:
    whole = run(Checkpoint(every=None), EMA(0.9), steps=8, accumulate=2, folder="whole")
    run(Checkpoint(every=None), EMA(0.9), Enough(batch), steps=8, accumulate=2)
    path = newest(tmp_path / "run/checkpoints")
    assert path is not None and path.name == f"step-{step:08d}.ckpt"
    resumed = run(Checkpoint(every=None), EMA(0.9), steps=8, accumulate=2, ckpt=path)
    assert resumed.losses == [pair for pair in whole.losses if pair[0] >= step]
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


def test_every_so_many_epochs(run: Run, tmp_path: Path) -> None:
    run(Checkpoint(every=None, every_epochs=2, keep=9), steps=14)  # an epoch has 3
    assert names(tmp_path / "run/checkpoints") == [f"step-{step:08d}.ckpt" for step in (6, 12, 14)]


@pytest.mark.parametrize("jump", [0.0, -1e6, 1e6])
def test_every_so_many_minutes_whatever_the_wall_clock_says(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    """Each step takes 40 seconds; the wall clock jumps at the third."""
    start, now = time.monotonic(), [0.0]
    monkeypatch.setattr("otl.callbacks.checkpoint.time.monotonic", lambda: start + now[0])
    monkeypatch.setattr(time, "time", lambda: 1e9 + now[0] + (jump if now[0] > 100 else 0))

    class Slow(Callback):
        def on_train_batch_start(self, *rest: Any) -> None:
            now[0] += 40

    run(Checkpoint(every=None, every_minutes=1, keep=9), Slow(), steps=7)
    assert names(tmp_path / "run/checkpoints") == [f"step-{step:08d}.ckpt" for step in (2, 4, 6, 7)]


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


def test_the_best_by_its_validation_loss_is_kept(run: Run, tmp_path: Path) -> None:
    """After each epoch of three steps; the second validates best."""
    losses = iter([0.5, 0.5, 0.3, 0.3, 0.4, 0.4, float("nan"), float("nan")])  # two batches each time

    def change(module: TinyModule) -> None:
        module.validation_step = lambda batch, batch_idx: module.log(  # type: ignore[method-assign]
            "val_loss", next(losses), on_epoch=True, batch_size=1
        )

    run(Checkpoint(every=5, keep=1, best=True), steps=12, validate=True, change=change)
    assert names(tmp_path / "run/checkpoints") == ["step-00000006.ckpt", "step-00000012.ckpt"]
    index = json.loads((tmp_path / "run/checkpoints" / INDEX).read_text())
    assert index["best"] == {"name": "step-00000006.ckpt", "val_loss": pytest.approx(0.3)}


def test_after_a_resume_only_a_lower_validation_loss_is_a_better_one(run: Run, tmp_path: Path) -> None:
    """After each epoch of three steps; the first is the best, and no checkpoint is made of the second."""
    losses = iter([0.3, 0.3, 0.5, 0.5])

    def change(module: TinyModule) -> None:
        module.validation_step = lambda batch, batch_idx: module.log(  # type: ignore[method-assign]
            "val_loss", next(losses), on_epoch=True, batch_size=1
        )

    for steps, path in ((3, None), (7, tmp_path / "run/checkpoints/step-00000003.ckpt")):
        run(Checkpoint(every=None, best=True), steps=steps, total=7, validate=True, change=change, ckpt=path)
    assert names(tmp_path / "run/checkpoints") == ["step-00000003.ckpt", "step-00000007.ckpt"]
    assert json.loads((tmp_path / "run/checkpoints" / INDEX).read_text())["best"]["name"] == "step-00000003.ckpt"


def test_the_best_is_of_no_effect_without_held_out_images(run: Run) -> None:
    with pytest.raises(SettingsError, match=r"callbacks\.checkpoint\.best=true has no effect.*validation_share"):
        run(Checkpoint(best=True), steps=1)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("stop", [3, 4, 6])
def test_a_validation_is_in_the_checkpoint_of_its_step(run: Run, tmp_path: Path, stop: int, accumulate: int) -> None:
    """The resumed run finds the validation loss in the table, and does not measure it again."""
    options = {"accumulate": accumulate, "validate": True}
    whole = run(Checkpoint(every=1, keep=9), EMA(0.9), Metrics(), steps=7, folder="whole", **options)
    path, seen = tmp_path / "whole/checkpoints" / f"step-{stop:08d}.ckpt", tmp_path / "run/metrics.csv"
    seen.parent.mkdir()
    run(Copy(tmp_path / "again/metrics.csv", seen, stop), Metrics(), steps=7, folder="again", **options)
    resumed = run(Checkpoint(), EMA(0.9), Metrics(), steps=7, ckpt=path, **options)
    assert resumed.losses == [pair for pair in whole.losses if pair[0] >= stop]
    for column in ("step", "epoch", "loss", "val_loss"):
        assert metrics(tmp_path / "run", column) == metrics(tmp_path / "whole", column)


def test_training_goes_on_while_a_checkpoint_is_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk takes the first one only once two more steps are done; what it takes is of the step it was made at."""
    gate, torch_save = threading.Event(), torch.save

    def slow(checkpoint: Any, file: Any) -> None:
        assert gate.wait(60)
        torch_save(checkpoint, file)

    class Open(Callback):
        def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 4:
                gate.set()

    whole = run(Checkpoint(every=2, keep=9, asynchronous=False), steps=6, folder="whole")
    monkeypatch.setattr(torch, "save", slow)
    run(Open(), Checkpoint(every=2, keep=9), steps=6)
    a, b = (torch.load(tmp_path / f / "checkpoints/step-00000002.ckpt", weights_only=True) for f in ("whole", "run"))
    assert torch.equal(a["state_dict"]["net.weight"], b["state_dict"]["net.weight"])
    assert same_weights(run(Checkpoint(), steps=6, ckpt=tmp_path / "run/checkpoints/step-00000002.ckpt"), whole)


def test_without_room_in_memory_training_waits_for_the_disk(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch_save, threads = torch.save, []

    def seen(checkpoint: Any, file: Any) -> None:
        threads.append(threading.current_thread() is threading.main_thread())
        torch_save(checkpoint, file)

    monkeypatch.setattr(torch, "save", seen)
    run(Checkpoint(every=2), steps=2)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1000))
    run(Checkpoint(every=2), steps=2)
    assert threads == [False, True]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failed_save_ends_the_run_and_leaves_no_file(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    def failing(checkpoint: Any, file: Any) -> None:
        file.write(b"half a checkpoint")
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    run(Checkpoint(every=2), steps=2, total=9)
    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(DiskError, match=r"step-0000000\d\.ckpt cannot be written: Input/output error"):
        run(Checkpoint(every=2, asynchronous=asynchronous), steps=9)
    assert names(tmp_path / "run/checkpoints") == ["step-00000002.ckpt"]


def test_a_save_that_failed_beside_the_training_ends_it_after_the_next_step(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk fails once: what was done until then is saved all the same."""
    failures, torch_save, checkpoint = [OSError(errno.EIO, os.strerror(errno.EIO))], torch.save, Checkpoint(every=2)

    def once(content: Any, file: Any) -> None:
        if failures:
            raise failures.pop()
        torch_save(content, file)

    class Wait(Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            if trainer.global_step == 2:
                checkpoint._writer._thread.join()

    monkeypatch.setattr(torch, "save", once)
    with pytest.raises(DiskError, match=r"step-00000002\.ckpt cannot be written: Input/output error"):
        run(Wait(), checkpoint, steps=9)
    assert names(tmp_path / "run/checkpoints") == ["step-00000003.ckpt"]


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


@pytest.mark.parametrize("moved", [-1e9, 1e9])
def test_no_clock_says_which_is_the_newest(run: Run, tmp_path: Path, moved: float) -> None:
    """Neither what an earlier run left there, nor what was written before the clock jumped."""
    folder = tmp_path / "run/checkpoints"
    run(Checkpoint(), steps=5)
    run(Checkpoint(every=1, keep=9), steps=3)
    now = time.time()
    for name in ("step-00000005.ckpt", "step-00000001.ckpt", "step-00000002.ckpt"):
        os.utime(folder / name, (now + moved, now + moved))
    assert newest(folder) == folder / "step-00000003.ckpt"


def test_a_run_that_goes_on_from_an_earlier_checkpoint_is_not_drawn_to_the_later_ones(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / "run/checkpoints"
    run(Checkpoint(every=1, keep=9), steps=5, total=9)
    run(Checkpoint(every=None), steps=3, total=9, ckpt=folder / "step-00000002.ckpt")
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


def test_a_second_ctrl_c_stops_at_once(run: Run, tmp_path: Path) -> None:
    with pytest.raises(AtOnce):
        run(Checkpoint(every=None), Signal(signal.SIGINT, batch=2), Signal(signal.SIGINT, batch=2), steps=6)
    assert names(tmp_path / "run/checkpoints") == []


def test_a_cluster_may_send_several_signals(run: Run, tmp_path: Path) -> None:
    with pytest.raises(Stopped, match="SIGUSR1") as stopped:
        run(Checkpoint(every=None), Signal(signal.SIGUSR1, batch=2), Signal(signal.SIGTERM, batch=2), steps=6)
    assert stopped.value.exit_code == 128 + signal.SIGUSR1
    assert names(tmp_path / "run/checkpoints") == ["step-00000002.ckpt"]


@pytest.mark.parametrize(
    ("hook", "step"),
    [("on_train_batch_end", 2), ("on_train_batch_end", 3), ("on_train_epoch_start", 3), ("on_validation_start", 3)],
)
def test_an_error_between_two_steps_loses_nothing(run: Run, tmp_path: Path, hook: str, step: int) -> None:
    """Such as a full disk that takes no picture."""
    whole = run(Checkpoint(every=None), steps=7, folder="whole", accumulate=1, validate=True)
    with pytest.raises(ValueError, match="the reason"):
        run(Checkpoint(every=None), Fail(hook, step, ValueError("the reason")), steps=7, validate=True)
    path = tmp_path / "run/checkpoints" / f"step-{step:08d}.ckpt"
    assert names(path.parent) == [path.name]
    resumed = run(Checkpoint(), steps=7, ckpt=path, validate=True)
    assert resumed.losses == [pair for pair in whole.losses if pair[0] >= step]
    assert same_weights(resumed, whole)


@pytest.mark.parametrize(("step", "every"), [(3, 1), (6, 5), (9, 1)])  # the last is the run's; steps between rows
@pytest.mark.parametrize("hook", ["on_validation_start", "on_validation_batch_end", "on_validation_end"])
def test_a_validation_that_failed_is_made_when_the_run_goes_on(
    run: Run, tmp_path: Path, hook: str, step: int, every: int
) -> None:
    """Its loss stands in the table, and the best checkpoint is the same."""

    def part(*callbacks: Callback, **options: Any) -> None:
        run(*callbacks, Checkpoint(every=1, best=True), Metrics(every), steps=9, validate=True, **options)

    part(folder="whole")
    with pytest.raises(ValueError, match="the reason"):
        part(Fail(hook, step, ValueError("the reason")))
    part(ckpt=newest(tmp_path / "run/checkpoints"))
    for column in ("step", "epoch", "loss", "val_loss"):
        assert metrics(tmp_path / "run", column) == metrics(tmp_path / "whole", column)
    indices = [json.loads((tmp_path / folder / "checkpoints" / INDEX).read_text()) for folder in ("run", "whole")]
    assert indices[0]["best"] == indices[1]["best"]


def test_a_loader_that_fails_between_two_steps_loses_nothing(run: Run, tmp_path: Path) -> None:
    class Broken(TinyLoader):
        def __iter__(self) -> Any:
            for batch in super().__iter__():
                if self.epoch == 1 and self.delivered == 2:
                    self.delivered = 1
                    raise RuntimeError("DataLoader worker (pid 1) is killed")
                yield batch

    whole = run(Checkpoint(every=None), steps=7, folder="whole")
    with pytest.raises(RuntimeError, match="is killed"):
        run(Checkpoint(every=None), steps=7, loader=Broken())
    path = tmp_path / "run/checkpoints/step-00000004.ckpt"
    assert names(path.parent) == [path.name]
    assert same_weights(run(Checkpoint(), steps=7, ckpt=path), whole)


def test_within_a_step_there_is_nothing_to_save(run: Run, tmp_path: Path) -> None:
    error = ValueError("the reason")
    for hook, accumulate in (("on_before_backward", 1), ("on_train_batch_start", 2), ("on_before_backward", 2)):
        with pytest.raises(ValueError, match="the reason"):
            run(Checkpoint(every=None), Fail(hook, 1, error), steps=7, accumulate=accumulate)
        assert names(tmp_path / "run/checkpoints") == []


def test_weights_that_are_not_numbers_are_not_saved(run: Run, tmp_path: Path) -> None:
    class Break(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: TinyModule, *rest: Any) -> None:
            pl_module.net.bias.data[0] = float("inf")

    with pytest.raises(NonFinite, match=r"net\.bias"):
        run(Checkpoint(every=1), Break(), steps=2)
    assert names(tmp_path / "run/checkpoints") == []


def test_it_runs_after_the_others(run: Run) -> None:
    order: list[list[type]] = []

    class Look(Callback):
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            order.append([type(callback) for callback in trainer.callbacks])

    run(Checkpoint(), Look(), Sampling(), steps=1)
    assert order == [[Look, Sampling, Checkpoint]]


@pytest.mark.parametrize("wrong", [{"every": 0}, {"keep": 0}, {"every_epochs": 0}])
def test_impossible_numbers_are_refused(run: Run, wrong: dict[str, int]) -> None:
    with pytest.raises(SettingsError, match=f"callbacks.checkpoint.{next(iter(wrong))}=0"):
        run(Checkpoint(**wrong), steps=1)
