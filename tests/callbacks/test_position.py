"""The place in an epoch: settled, and shared out anew over another number of ranks."""

from __future__ import annotations

from typing import Any

import pytest

from otl.callbacks.position import settle, share_anew

BATCHES = 12  # of an epoch, together


def loop(delivered: int, *, epoch: int, batches: int, completed: int) -> dict[str, Any]:
    """The state of Lightning's loop after so many batches of an epoch, as one rank has it."""
    counts = {"ready": delivered, "started": delivered, "processed": delivered, "completed": delivered - completed}
    total = {name: epoch * batches + count for name, count in counts.items()}
    return {
        "state_dict": {"combined_loader": [{"epoch": epoch, "delivered": delivered}]},
        "epoch_loop.batch_progress": {"current": counts, "total": total, "is_last_batch": delivered == batches},
    }


@pytest.mark.parametrize(("before", "now"), [(1, 2), (2, 1), (2, 4), (4, 3), (3, 1)])
@pytest.mark.parametrize("together", [0, 12])
@pytest.mark.parametrize("completed", [0, 1])  # what Lightning has counted at the end of a batch, and afterwards
def test_ranks_together_have_had_the_same_batches(before: int, now: int, together: int, completed: int) -> None:
    state = loop(together // before, epoch=2, batches=BATCHES // before, completed=completed)
    share_anew(state, ranks=(before, now), batches=(BATCHES // before, BATCHES // now))
    assert state == loop(together // now, epoch=2, batches=BATCHES // now, completed=completed)


def test_the_end_of_an_epoch_stays_its_end() -> None:
    """Five batches on two ranks are three each, the first one seen twice."""
    state = loop(3, epoch=0, batches=3, completed=1)
    share_anew(state, ranks=(2, 1), batches=(3, 5))
    assert state == loop(5, epoch=0, batches=5, completed=1)


def test_what_cannot_be_shared_out_is_seen_again_and_said(caplog: pytest.LogCaptureFixture) -> None:
    state = loop(5, epoch=0, batches=12, completed=1)
    share_anew(state, ranks=(1, 2), batches=(12, 6))
    assert state["state_dict"]["combined_loader"] == [{"epoch": 0, "delivered": 2}]
    assert "5 batches of this epoch cannot be shared by 2 ranks: 1 are seen again" in caplog.text


@pytest.mark.parametrize("began", [False, True])  # whether the next epoch has, without a batch
def test_an_epochs_end_is_the_same_state_whatever_lightning_has_counted(began: bool) -> None:
    """The third epoch of four batches: step 12, and 11 in the count of loggers, which begins with 0."""
    ended, other = (loop(4, epoch=2, batches=4, completed=completed) for completed in (1, 0))
    for state, epochs in ((ended, 2), (other, 3)):
        tracked = {"ready": 3 + began, "started": 3, "processed": epochs, "completed": epochs}
        counts = {"ready": 2, "started": 2, "processed": 1, "completed": 1}
        state["epoch_progress"] = {"current": tracked, "total": dict(tracked)}
        state["epoch_loop.val_loop.batch_progress"] = {"current": counts, "total": dict(counts), "is_last_batch": False}
        state["epoch_loop.state_dict"] = {"_batches_that_stepped": 12}
    if began:
        other["state_dict"]["combined_loader"][0] = {"epoch": 3, "delivered": 0}
    settle(ended, batches=4, steps=12)
    settle(other, batches=4, steps=12)
    assert other == ended
    assert ended["epoch_progress"]["current"] == {"ready": 3, "started": 3, "processed": 2, "completed": 2}
    assert ended["epoch_loop.state_dict"] == {"_batches_that_stepped": 11}
