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


def count_begun(loop: dict[str, Any]) -> None:
    """Lightning's count of epochs that have begun is that of the loader.

    Resumed at an epoch's end, Lightning 2.6 does not count the next one as begun. Its end would then look like an epoch
    that is over already, and a run that goes on from there would number all its epochs one too low.

    Args:
        loop: state of the fit loop, changed in place.
    """
    begun = loop["state_dict"]["combined_loader"][0]["epoch"] + 1
    for counts in loop["epoch_progress"].values():
        counts |= {"ready": begun, "started": begun}


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
