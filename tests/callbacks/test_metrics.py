"""metrics.csv reads as one run, however often it was stopped."""

from __future__ import annotations

import csv
import errno
import os
import re
import sys
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.summary.writer.record_writer import RecordWriter

from otl.callbacks.backups import newest
from otl.callbacks.checkpoint import Checkpoint
from otl.callbacks.guard import Guard, NonFinite
from otl.callbacks.metrics import Metrics, Row
from otl.callbacks.sampling import Sampling
from otl.callbacks.timing import Span
from otl.formats.files import DiskError
from otl.trust import hide_uncaught

from .conftest import Run, TinyLoader, TinyModule


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def column(folder: Path, name: str) -> list[str]:
    return [row[name] for row in table(folder)]


def test_the_columns(run: Run, tmp_path: Path) -> None:
    run(Metrics(), steps=2)
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert header == "step,epoch,loss,lr_unet,images_per_second,steps_per_second,data_wait,val_loss,seconds"


@pytest.mark.parametrize("accumulate", [1, 2])
def test_each_row_is_an_optimizer_step(run: Run, tmp_path: Path, accumulate: int) -> None:
    module = run(Metrics(), steps=25, accumulate=accumulate)
    sizes = [4, 4, 2] * 30
    for row, step in zip(table(tmp_path / "run"), range(25)):
        batches = [(loss, sizes[k]) for k, (s, loss) in enumerate(module.losses) if s == step]
        mean = sum(loss * images for loss, images in batches) / sum(images for _, images in batches)
        assert int(row["step"]) == step + 1
        assert float(row["loss"]) == pytest.approx(mean, rel=1e-5)
        assert float(row["lr_unet"]) == pytest.approx(0.05 / (1 + step))  # the one that the step was made with
        assert 0 <= float(row["data_wait"]) <= 1
    assert len(table(tmp_path / "run")) == 25
    epochs = column(tmp_path / "run", "epoch")
    assert epochs[:4] == (["0", "0", "0", "1"] if accumulate == 1 else ["0", "0", "1", "1"])


def test_the_logger_gets_what_the_table_has(run: Run, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="log", version="", flush_logs_every_n_steps=1)
    run(Metrics(), steps=3, logger=logger)
    with (tmp_path / "log" / "metrics.csv").open(newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["loss"]]
    assert [float(row["loss"]) for row in logged] == [float(loss) for loss in column(tmp_path / "run", "loss")]
    assert [float(row["lr_unet"]) for row in logged] == [float(lr) for lr in column(tmp_path / "run", "lr_unet")]
    assert [row["step"] for row in logged] == ["1", "2", "3"]


def test_a_logger_gets_every_loss_and_the_rest_now_and_then(run: Run, tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="log", version="", flush_logs_every_n_steps=1)
    run(Metrics(), steps=7, logger=logger, log_every=3)
    with (tmp_path / "log" / "metrics.csv").open(newline="") as file:
        logged = list(csv.DictReader(file))
    assert [row["step"] for row in logged if row["loss"]] == ["1", "2", "3", "4", "5", "6", "7"]
    assert [row["step"] for row in logged if row["lr_unet"]] == ["1", "4", "7"]


def test_every_so_many_steps_and_the_last(run: Run, tmp_path: Path) -> None:
    run(Metrics(every=3), steps=7)
    assert column(tmp_path / "run", "step") == ["3", "6", "7"]


@pytest.mark.parametrize("crashed", [6, 7])
def test_a_stopped_and_resumed_run_equals_the_unbroken_one(run: Run, tmp_path: Path, crashed: int) -> None:
    """It stops after step `crashed` and goes on from step 4: the rows between are made again."""
    run(Metrics(), Checkpoint(every=4, keep=9), steps=9, folder="whole")
    run(Metrics(), Checkpoint(every=4, keep=9), steps=crashed, total=9)
    with (tmp_path / "run/metrics.csv").open("a") as file:
        file.write("8,2,0.123")  # cut off by a crash
    run(Metrics(), Checkpoint(), steps=9, ckpt=tmp_path / "run/checkpoints/step-00000004.ckpt")
    assert column(tmp_path / "run", "step") == [str(k + 1) for k in range(9)]
    for name in ("loss", "lr_unet", "epoch"):
        assert column(tmp_path / "run", name) == column(tmp_path / "whole", name)
    seconds = [float(value) for value in column(tmp_path / "run", "seconds")]
    assert seconds == sorted(seconds)


def test_a_run_that_is_stopped_at_two_epochs_ends_in_turn_counts_them_all(run: Run, tmp_path: Path) -> None:
    """An epoch has 3 batches, and what is validated is in the middle of one."""
    options: dict[str, Any] = {"validate": True, "validate_every": 4}
    ends = [None, *(tmp_path / f"run/checkpoints/step-{step:08d}.ckpt" for step in (3, 6))]
    for steps, end in zip((3, 6, 7), ends):
        run(Metrics(), Checkpoint(every=1), steps=steps, total=7, ckpt=end, **options)
    assert column(tmp_path / "run", "epoch") == ["0", "0", "0", "1", "1", "1", "2"]


class Broken(TinyLoader):
    """Fails before the first batch of the second epoch."""

    def __iter__(self) -> Any:
        if self.delivered == len(self):
            self.epoch, self.delivered = self.epoch + 1, 0
        return self.batches()

    def batches(self) -> Any:
        if self.epoch == 1 and self.delivered == 0:
            raise RuntimeError("the reason")
        yield from super().__iter__()


class Early(Callback):
    """Asks Lightning to end the run after an optimizer step, as its EarlyStopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


class Fails(Callback):
    """Raises in a hook of the second epoch."""

    def __init__(self, hook: str) -> None:
        def fail(trainer: Any, *rest: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("the reason")

        setattr(self, hook, fail)


ENDS: dict[str, Callable[[], tuple[list[Callback], TinyLoader]]] = {
    "early within an epoch": lambda: ([Early(4)], TinyLoader()),
    "early at an epoch's end": lambda: ([Early(3)], TinyLoader()),
    "error as an epoch begins": lambda: ([Fails("on_train_epoch_start")], TinyLoader()),
    "error as an epoch ends": lambda: ([Fails("on_train_epoch_end")], TinyLoader()),
    "error before the first batch": lambda: ([], Broken()),
    "error in the first batch": lambda: ([Fails("on_train_batch_start")], TinyLoader()),
}


@pytest.mark.parametrize("validate_every", [None, 4])
@pytest.mark.parametrize("end", ENDS)
def test_epochs_are_numbered_alike_however_an_earlier_part_ended(
    run: Run, tmp_path: Path, end: str, validate_every: int | None
) -> None:
    options: dict[str, Any] = {"validate": True, "validate_every": validate_every}
    run(Metrics(), steps=8, folder="whole", **options)
    callbacks, loader = ENDS[end]()
    with pytest.raises(RuntimeError, match="the reason") if end.startswith("error") else nullcontext():
        run(Metrics(), Checkpoint(every=3), *callbacks, steps=8, loader=loader, **options)
    for steps in (6, 8):
        last = newest(tmp_path / "run/checkpoints")
        run(Metrics(), Checkpoint(every=1), steps=steps, total=8, ckpt=last, **options)
    for name in ("step", "epoch", "loss"):
        assert column(tmp_path / "run", name) == column(tmp_path / "whole", name)


def test_a_checkpoint_finds_every_row_up_to_it(run: Run, tmp_path: Path) -> None:
    seen: list[int] = []

    class Look(Checkpoint):
        def on_save_checkpoint(self, trainer, pl_module, checkpoint) -> None:  # type: ignore[no-untyped-def]
            super().on_save_checkpoint(trainer, pl_module, checkpoint)
            seen.append(len(table(tmp_path / "run")))

    run(Look(every=2), Metrics(), steps=5)
    assert seen == [2, 4, 5]


def test_a_new_run_starts_a_new_table(run: Run, tmp_path: Path) -> None:
    run(Metrics(), steps=4)
    run(Metrics(), steps=2)
    assert column(tmp_path / "run", "step") == ["1", "2"]


@pytest.mark.parametrize("every", [1, 2])
def test_the_validation_loss_stands_in_the_row_of_its_step(run: Run, tmp_path: Path, every: int) -> None:
    run(Metrics(every=every), steps=6, validate=True)  # after each epoch: steps 3 and 6
    measured = [row["step"] for row in table(tmp_path / "run") if row["val_loss"]]
    assert measured == ["3", "6"]
    assert column(tmp_path / "run", "step") == (["1", "2", "3", "4", "5", "6"] if every == 1 else ["2", "3", "4", "6"])


def test_rows_are_there_after_a_failure(run: Run, tmp_path: Path) -> None:
    with pytest.raises(NonFinite):
        run(Metrics(), Guard(skips=0), steps=9, poisoned=int(torch.randperm(10, generator=keyed(0))[5]))
    run(Metrics(), steps=9, folder="whole")
    failed = column(tmp_path / "run", "loss")
    assert failed == [column(tmp_path / "whole", "loss")[0], "nan"]  # in the second batch


def keyed(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """[True]: metrics.csv takes nothing more."""
    full, fsync = [False], os.fsync

    def check(number: int) -> None:
        if full[0] and os.readlink(f"/proc/self/fd/{number}").endswith("/metrics.csv"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(number)

    monkeypatch.setattr(os, "fsync", check)
    return full


@pytest.mark.parametrize("room_again", [False, True])
def test_rows_that_a_full_disk_does_not_take_are_in_the_checkpoint(
    run: Run, tmp_path: Path, full_disk: list[bool], room_again: bool
) -> None:
    class Fill(Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            full_disk[0] = trainer.global_step >= 2 and not (room_again and trainer.global_step >= 5)

    run(Metrics(), Checkpoint(every=None), steps=9, folder="whole")
    with nullcontext() if room_again else pytest.raises(DiskError, match=r"metrics\.csv cannot be written"):
        run(Fill(), Metrics(), Checkpoint(every=2, keep=9), steps=6, total=9)
    full_disk[0] = False
    assert column(tmp_path / "run", "step") == (["1", "2", "3", "4", "5", "6"] if room_again else ["1", "2"])
    run(Metrics(), Checkpoint(), steps=9, ckpt=tmp_path / "run/checkpoints/step-00000004.ckpt")
    for name in ("step", "loss", "lr_unet"):
        assert column(tmp_path / "run", name) == column(tmp_path / "whole", name)


def test_a_full_disk_ends_the_run_with_its_state_saved(
    run: Run, tmp_path: Path, full_disk: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fill(Callback):
        def on_train_batch_start(self, trainer: Any, *rest: Any) -> None:
            full_disk[0] = trainer.global_step >= 3

    monkeypatch.setattr("otl.callbacks.metrics.SECONDS", 0.0)  # rows are written at each step
    with pytest.raises(DiskError, match=r"metrics\.csv cannot be written: No space left on device"):
        run(Fill(), Metrics(), Checkpoint(every=None), steps=9)
    full_disk[0] = False
    run(Metrics(), Checkpoint(), steps=9, folder="whole")
    run(Metrics(), Checkpoint(), steps=9, ckpt=tmp_path / "run/checkpoints/step-00000004.ckpt")
    assert column(tmp_path / "run", "loss") == column(tmp_path / "whole", "loss")


def test_a_logger_without_room_keeps_no_checkpoint_from_being_made(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run(Metrics(), Checkpoint(every=2), steps=3, logger=Full(tmp_path, name="log", version=""))
    assert f"{tmp_path}/log cannot be written: No space left on device" in caplog.text
    assert (tmp_path / "run/checkpoints/step-00000002.ckpt").is_file()
    assert column(tmp_path / "run", "step") == ["1", "2", "3"]


def test_tensorboards_thread_says_in_one_line_that_it_cannot_write(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its error comes later, by Lightning's name for it; checkpoints are made all the same, and the table is whole."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    hide_uncaught()
    done, write = [], RecordWriter.write

    def until_full(self: Any, data: bytes) -> None:
        done.append(data)
        if len(done) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", until_full)
    logger = TensorBoardLogger(tmp_path, name="", version="tensorboard")
    with pytest.raises(OSError, match="No space left"):  # of its last flush, when all is done
        run(Metrics(), Checkpoint(every=2), steps=6, logger=logger)
    assert column(tmp_path / "run", "step") == ["1", "2", "3", "4", "5", "6"]
    assert (tmp_path / "run/checkpoints/step-00000006.ckpt").is_file()
    assert f"{tmp_path}/tensorboard cannot be written: No space left on device" in caplog.text
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"Thread-\d+: \[Errno 28\] No space left on device", line)


def test_a_row_s_rates_are_those_since_the_row_before_it() -> None:
    """By hand: four steps of three images in two seconds, of which the loader was waited for in half a second."""
    metrics = Metrics()
    metrics._row_step, metrics._last = 4, Row({}, [])
    metrics.clock._span = Span(seconds=2.0, waiting=0.5, images=12)
    metrics._add_row(8)
    assert metrics._rows[0].values == {"images_per_second": "6", "steps_per_second": "2", "data_wait": "0.250"}


def test_sampling_is_no_training_time(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("otl.callbacks.timing.time.perf_counter", lambda: now[0])

    def slow(module: TinyModule) -> None:
        module.sample_options.prompts = ["a"]
        draw, step = module.draw, module.training_step

        def slow_draw(*args, **options):  # type: ignore[no-untyped-def]
            now[0] += 100
            return draw(*args, **options)

        def slow_step(*args):  # type: ignore[no-untyped-def]
            now[0] += 2
            return step(*args)

        module.draw, module.training_step = slow_draw, slow_step

    run(Sampling(every=1), Metrics(), Sampling(every=1), steps=3, change=slow)
    assert column(tmp_path / "run", "steps_per_second") == ["0.5"] * 3
    assert column(tmp_path / "run", "images_per_second") == ["2", "2", "1"]
