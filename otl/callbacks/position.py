"""The place in the data: how far a run has come in its epoch."""

from __future__ import annotations

import logging
from typing import Any

from lightning.pytorch import Trainer

log = logging.getLogger(__name__)

COUNTS = ("ready", "started", "processed", "completed")


def position(trainer: Trainer) -> int:
    """Batches that the loader has delivered since the beginning of the run, to this rank."""
    state = trainer.train_dataloader.state_dict()
    return state["epoch"] * trainer.num_training_batches + state["delivered"]


def settle(loop: dict[str, Any], *, batches: int, steps: int) -> None:
    """Make a state of Lightning's loop the one right after an optimizer step, whatever went on when it was taken.

    The loader's place counts. From other states Lightning 2.6 goes on with an epoch of no batch or of one, numbers all
    that follow by one too many or too few, or ends a validation with the images that it had not come to.

    Args:
        loop: state of the fit loop, changed in place.
        batches: of an epoch.
        steps: of the optimizer, since the beginning of the run.
    """
    loader = loop["state_dict"]["combined_loader"][0]
    if loader["delivered"] == 0:  # an epoch has begun, and none of its batches
        loader |= {"epoch": loader["epoch"] - 1, "delivered": batches}
    epoch, delivered = loader["epoch"], loader["delivered"]
    for counts in loop["epoch_progress"].values():
        counts |= {"ready": epoch + 1, "started": epoch + 1, "processed": epoch, "completed": epoch}
    progress = loop["epoch_loop.batch_progress"]
    progress["is_last_batch"] = delivered == batches
    for counts, count in ((progress["current"], delivered), (progress["total"], epoch * batches + delivered)):
        counts |= {"ready": count, "started": count, "processed": count, "completed": count - 1}
    for counts in (loop["epoch_loop.val_loop.batch_progress"][name] for name in ("current", "total")):
        counts |= dict.fromkeys(COUNTS, 0)
    loop["epoch_loop.state_dict"]["_batches_that_stepped"] = steps - 1  # of the loggers, which count from 0


def share_anew(loop: dict[str, Any], *, ranks: tuple[int, int], batches: tuple[int, int]) -> None:
    """Change a state of Lightning's loop from one number of ranks to another, which go on in the same order of batches.

    Ranks take the batches of an epoch in turns, so that together they have had as many as each times their number.

    Args:
        loop: state of the fit loop, changed in place.
        ranks: number of them before and now.
        batches: of an epoch, for each rank, before and now.
    """
    loader = loop["state_dict"]["combined_loader"][0]
    before = loader["delivered"]
    together = before * ranks[0]
    now = batches[1] if before == batches[0] else together // ranks[1]
    if before != batches[0] and together % ranks[1]:
        again = together % ranks[1]
        log.warning(f"{together} batches of this epoch cannot be shared by {ranks[1]} ranks: {again} are seen again")
    loader["delivered"] = now
    progress = loop["epoch_loop.batch_progress"]
    for counts, to in ((progress["current"], now), (progress["total"], loader["epoch"] * batches[1] + now)):
        shift = to - counts["ready"]
        counts |= {name: counts[name] + shift for name in COUNTS}
