"""What is written beside the training is waited for, and its errors come out."""

from __future__ import annotations

import threading

import pytest

from otl.callbacks.writer import Writer


def test_the_caller_goes_on_meanwhile() -> None:
    writer, gate, done = Writer(), threading.Event(), []
    writer.start(lambda: (gate.wait(), done.append(1)))  # type: ignore[func-returns-value]
    assert done == []
    gate.set()
    writer.finish()
    assert done == [1]


def test_one_waits_for_the_other() -> None:
    writer, order = Writer(), []
    for number in range(20):
        writer.start(lambda number=number: order.append(number))
    writer.finish()
    assert order == list(range(20))


@pytest.mark.parametrize("asked", ["check", "finish", "start"])
def test_an_error_comes_out_once_wherever_it_is_asked_for(asked: str) -> None:
    def fail() -> None:
        raise OSError("the disk")

    writer = Writer()
    writer.start(fail)
    assert writer._thread is not None
    writer._thread.join()
    with pytest.raises(OSError, match="the disk"):
        writer.start(lambda: None) if asked == "start" else getattr(writer, asked)()
    writer.finish()
