"""Runs are killed, disks fail, files are damaged, clocks jump, data changes: each run comes to the very same end."""

import json
import sys

import pytest

from tests.commands import ROOT, run_process
from tests.faults.events import OFF
from tests.faults.lines import TRIALS
from tests.faults.moments import KILLS, REFUSALS

EVENTS = (
    *(f"killed {moment}" for moment in KILLS),
    *(f"{error} {moment}" for error in ("ENOSPC", "EIO") for moment in REFUSALS),
    *("newest checkpoint: cut_off", "newest checkpoint: wrong_byte", "workers killed"),
    *(f"clock off by {seconds:.0f} s" for seconds in (OFF, -OFF)),
    *("data changed and refused", "data changed and allowed"),
    *(f"{count} workers" for count in (0, 1, 2)),
)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(900)
def test_whatever_happens_a_run_goes_on_to_the_very_same_end(capsys):
    """The trials are a process of their own: forks of one in which other tests have left threads may hang."""
    ended = run_process([sys.executable, "-m", "tests.faults"], ROOT, ROOT, timeout=880, OMP_NUM_THREADS="1")
    assert ended.code == 0, ended.err[-9000:]
    done = json.loads(ended.out[ended.out.index("{") :])
    with capsys.disabled():
        print(
            f"\n{done['kills']} kills over {len(TRIALS)} runs of all methods in {done['processes']} processes and "
            f"{done['seconds of processor']} s of processor: {done['same ends']} runs came to the end of one left alone"
        )
    assert done["kills"] >= 50
    assert done["same ends"] >= len(TRIALS)
    assert [event for event in EVENTS if not any(name.startswith(event) for name in done)] == []
