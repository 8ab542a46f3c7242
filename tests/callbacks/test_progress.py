"""One bar on a terminal, ten lines elsewhere."""

from __future__ import annotations

import logging
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from otl.callbacks import progress
from otl.callbacks.guard import Guard, NonFinite
from otl.callbacks.progress import Progress, clock_time, track
from otl.callbacks.timing import Span

from .conftest import Run


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> pytest.CaptureFixture[str]:
    """What was shown can be read from it."""
    monkeypatch.setattr(progress, "Console", lambda: Console(force_terminal=True, width=140, legacy_windows=False))
    return capsys


def test_ten_lines_without_a_terminal(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    run(Progress(), steps=30, accumulate=2)
    lines = [record.message for record in caplog.records if record.message.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{k}/30" for k in range(3, 31, 3)]
    shape = r"step \d+/30  loss \d\.\d{4}  [\d.e+]+ it/s  [\d.e+]+ images/s  \d+:\d\d left  data wait \d+%"
    assert all(re.fullmatch(shape, line) for line in lines), lines[0]


def test_few_losses_wait_and_their_mean_is_the_same(
    run: Run, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is a tensor on the device, and without a terminal a look comes but ten times."""
    caplog.set_level("INFO")

    def losses(held: int) -> tuple[int, list[str]]:
        caplog.clear()
        monkeypatch.setattr(progress, "HELD", held)
        most, fold = [], Progress._fold
        monkeypatch.setattr(Progress, "_fold", lambda self: (most.append(len(self._totals)), fold(self)))
        run(Progress(), steps=40)
        monkeypatch.setattr(Progress, "_fold", fold)
        return max(most), [each.message.split()[3] for each in caplog.records if each.message.startswith("step ")]

    (few, often), (many, seldom) = losses(2), losses(1000)
    assert (few, many) == (2, 4)
    assert often == seldom and len(seldom) == 10


def test_the_numbers_are_means_of_all_that_this_process_has_trained() -> None:
    """By hand: two looks, each after two seconds of training, for a run of 24 steps that went on after its tenth."""
    shown = Progress()
    shown._from_step = 10
    shown._totals, shown.clock._span = [torch.tensor([3.0, 2.0])], Span(seconds=2.0, waiting=0.5, images=12)
    assert shown._status(14, 24) == "loss 1.5000  2 it/s  6 images/s  0:05 left  data wait 25%"
    shown.clock._span = Span(seconds=2.0, waiting=1.5, images=4)
    assert shown._status(18, 24) == "loss 1.5000  2 it/s  4 images/s  0:03 left  data wait 50%"


def test_other_ranks_hold_no_losses() -> None:
    shown, outputs = Progress(), {"total": torch.ones(2), "images": 1}
    trainer = SimpleNamespace(world_size=2, is_global_zero=False, global_step=1, fit_loop=None)
    shown._steps = SimpleNamespace(advanced=lambda trainer: True)
    shown.on_train_batch_end(trainer, None, outputs, None, 0)
    assert shown._totals == []


def test_one_bar_on_a_terminal(
    run: Run, terminal: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    run(Progress(), steps=6)
    shown = terminal.readouterr().out
    assert "6/6" in shown
    assert "images/s" in shown
    assert "data wait" in shown
    assert not [record for record in caplog.records if record.message.startswith("step ")]


def test_log_lines_go_above_the_bar_and_handlers_get_their_stream_back(terminal: pytest.CaptureFixture[str]) -> None:
    plain = sys.stdout
    handler = logging.StreamHandler(plain)
    logging.getLogger().addHandler(handler)
    try:
        for item in track([1, 2], "caching", 2):
            assert handler.stream is sys.stdout is not plain
            logging.getLogger().warning(f"about item {item}")
        assert handler.stream is sys.stdout is plain
    finally:
        logging.getLogger().removeHandler(handler)
    assert terminal.readouterr().out.count("about item 1\n") == 1


def test_track_gives_every_item_once(terminal: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "caching", 3)) == ["a", "b", "c"]
    shown = terminal.readouterr().out
    assert "caching" in shown
    assert "3/3" in shown


def test_track_says_when_it_is_done_without_a_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert list(track([1, 2, 3], "caching", 3)) == [1, 2, 3]
    assert [record.message.split("  ")[0] for record in caplog.records] == ["caching 3/3"]


def test_the_bar_is_gone_after_a_failure(run: Run, terminal: pytest.CaptureFixture[str]) -> None:
    plain = sys.stdout
    with pytest.raises(NonFinite):
        run(Progress(), Guard(skips=0), steps=9, poisoned=4)
    assert sys.stdout is plain


@pytest.mark.parametrize(("seconds", "expected"), [(0, "0:00"), (65.2, "1:05"), (3725, "1:02:05")])
def test_times_read_as_a_clock(seconds: float, expected: str) -> None:
    assert clock_time(seconds) == expected
