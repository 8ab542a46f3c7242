"""Signals between steps wait for the step; elsewhere they end the run at once."""

from __future__ import annotations

import contextlib
import csv
import errno
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from otl.callbacks.backups import newest
from otl.callbacks.checkpoint import Checkpoint
from otl.callbacks.export import Export
from otl.callbacks.metrics import Metrics
from otl.callbacks.sampling import Sampling
from otl.callbacks.stops import SIGNALS, AtOnce, Stopped, Stops, at_once
from otl.formats.files import DiskError

from .conftest import Run, TinyModule

CLUSTER = (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM)


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_the_steps_a_signal_ends_the_run_at_once(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, at_once():
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")
    assert (stopped.value.exit_code, stopped.value.path) == (128 + number, None)
    assert not stopped.value.on_all_ranks  # so that the others are ended too
    assert signal.getsignal(number) is before


def test_no_library_takes_it_for_an_error_of_its_own() -> None:
    """OmegaConf, for one, makes errors of the same class anew, and others go on without what could not be imported."""
    with pytest.raises(Stopped), at_once():
        with contextlib.suppress(Exception):
            os.kill(os.getpid(), signal.SIGTERM)
            signal.getsignal(signal.SIGTERM)
        raise AssertionError("it went on")


def test_what_tidies_up_is_not_disturbed_by_what_else_a_cluster_sends() -> None:
    tidied = False
    with pytest.raises(Stopped) as stopped, at_once():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
            signal.getsignal(signal.SIGUSR1)
        finally:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
                os.kill(os.getpid(), number)
            tidied = True
    assert tidied and stopped.value.signal_number == signal.SIGUSR1


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with at_once():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_within_them_it_is_noted_and_the_first_one_counts() -> None:
    stops = Stops()
    stops.begin()
    try:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stops.asked == signal.SIGUSR1
        with pytest.raises(AtOnce):
            os.kill(os.getpid(), signal.SIGINT)
            signal.getsignal(signal.SIGINT)
    finally:
        stops.end()


def test_a_process_of_the_loader_inherits_no_say() -> None:
    """It is forked with the handlers, and must neither stop nor end by itself."""
    stops = Stops()
    with at_once():
        stops.begin()
        child = os.fork()
        if child == 0:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGINT):
                os.kill(os.getpid(), number)
            os._exit(7 if stops.asked is None else 8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        stops.end()


def test_outside_of_the_main_thread_nothing_is_caught() -> None:
    """Python allows it nowhere else."""
    caught: list[Stops] = []

    def begin() -> None:
        stops = Stops()
        stops.begin()
        stops.end()
        caught.append(stops)

    thread = threading.Thread(target=begin)
    thread.start()
    thread.join()
    assert len(caught) == 1


def asks(method: str, number: int, *, step: int) -> Callable[[TinyModule], None]:
    """The signal comes after a method of the module has done its work at a step, the first time."""

    def change(module: TinyModule) -> None:
        module.sample_options.prompts = ["a cat"]
        work, asked = getattr(module, method), []

        def watched(*args: Any, **options: Any) -> Any:
            done = work(*args, **options)
            if module.trainer.global_step == step and not asked:
                asked.append(os.kill(os.getpid(), number))
            return done

        setattr(module, method, watched)

    return change


def rows(folder: Path) -> list[tuple[str, ...]]:
    with (folder / "metrics.csv").open(newline="") as file:
        return [(row["step"], row["epoch"], row["loss"], row["val_loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("method", ["validation_step", "draw", "export"])
def test_what_follows_the_step_is_finished_before_the_run_stops(
    run: Run, tmp_path: Path, number: int, method: str
) -> None:
    """A validation, pictures and a result on the way: the run that goes on has nothing of them left to do."""

    def part(change: Any, **options: Any) -> TinyModule:
        after = [Metrics(), Export(every=3), Sampling(every=3, first=False), Checkpoint(every=None)]
        return run(*after, steps=5, validate=True, change=change, **options)

    whole = part(asks("draw", 0, step=9), folder="whole")
    with pytest.raises(Stopped) as stopped:
        part(asks(method, number, step=3))
    assert stopped.value.exit_code == 128 + number
    assert stopped.value.on_all_ranks
    assert stopped.value.path == tmp_path / "run/checkpoints/step-00000003.ckpt"
    for done in ("samples/step-000003.json", "final-step-000003.json"):
        assert (tmp_path / "run" / done).read_bytes() == (tmp_path / "whole" / done).read_bytes()
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")[:3]
    resumed = part(asks("draw", 0, step=9), ckpt=stopped.value.path)
    assert [step for step, *_ in resumed.draws] == [5]
    assert rows(tmp_path / "run") == rows(tmp_path / "whole")
    assert torch.equal(resumed.net.weight, whole.net.weight)


def test_a_stop_waits_for_the_checkpoint_that_is_being_written(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is begun beside the third step, in which the signal comes; then the third step's is written too."""
    checkpoint, written, torch_save = Checkpoint(every=2), [], torch.save

    def slow(content: Any, file: Any) -> None:
        while checkpoint._stops.asked is None:
            time.sleep(0.001)
        torch_save(content, file)
        written.append(content["global_step"])

    monkeypatch.setattr(torch, "save", slow)
    with pytest.raises(Stopped) as stopped:
        run(checkpoint, steps=9, change=asks("training_step", signal.SIGTERM, step=2))
    assert written == [2, 3]
    assert newest(tmp_path / "run/checkpoints") == stopped.value.path
    there = sorted(path.name for path in (tmp_path / "run/checkpoints").glob("*.ckpt"))
    assert there == ["step-00000002.ckpt", "step-00000003.ckpt"]


@pytest.mark.parametrize(("numbers", "saved"), [(CLUSTER, 4), ((signal.SIGINT, signal.SIGINT), 2)])
def test_signals_within_a_save_leave_it_whole_or_without_a_trace(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, numbers: tuple[int, ...], saved: int
) -> None:
    """Those of a cluster wait for it, however many; a second Ctrl-C does not."""
    torch_save = torch.save

    def interrupted(content: Any, file: Any) -> None:
        file.write(b"half")
        for number in numbers if content["global_step"] == 4 else ():
            os.kill(os.getpid(), number)
        file.file.seek(0)
        torch_save(content, file)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(Stopped if saved == 4 else AtOnce):
        run(Checkpoint(every=2, asynchronous=False), steps=9)
    assert newest(tmp_path / "run/checkpoints") == tmp_path / f"run/checkpoints/step-{saved:08d}.ckpt"
    assert not list((tmp_path / "run/checkpoints").glob(".*"))


def test_a_run_that_is_asked_to_stop_in_its_last_step_is_finished(run: Run, tmp_path: Path) -> None:
    run(Export(), Checkpoint(every=None), steps=3, change=asks("training_step", signal.SIGTERM, step=2))
    assert newest(tmp_path / "run/checkpoints") == tmp_path / "run/checkpoints/step-00000003.ckpt"
    assert (tmp_path / "run/final.json").is_file()


def test_a_stop_whose_checkpoint_cannot_be_written_is_an_error(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not say from where to go on, and no job goes back into the queue for it."""

    def failing(content: Any, file: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(torch, "save", failing)
    with pytest.raises(DiskError, match=r"step-00000002\.ckpt cannot be written"):
        run(Checkpoint(every=None), steps=9, change=asks("training_step", signal.SIGTERM, step=1))
