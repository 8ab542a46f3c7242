"""Signals between steps wait for the step; elsewhere they end the run at once."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from otl.callbacks.stops import SIGNALS, Stopped, Stops, at_once


@pytest.mark.parametrize("number", SIGNALS)
def test_outside_of_the_steps_a_signal_ends_the_run_at_once(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Stopped) as stopped, at_once():
        os.kill(os.getpid(), number)
        raise AssertionError("it went on")
    assert (stopped.value.exit_code, stopped.value.path) == (128 + number, None)
    assert signal.getsignal(number) is before


def test_within_them_it_is_noted_and_the_first_one_counts() -> None:
    stops = Stops()
    stops.begin()
    try:
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stops.asked == signal.SIGUSR1
        with pytest.raises(KeyboardInterrupt):
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
