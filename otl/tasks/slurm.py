"""SLURM: a run that is asked to stop, ahead of a time limit or by a preemption, goes back into the queue."""

from __future__ import annotations

import logging
import os
import signal
import subprocess

from omegaconf import DictConfig

from otl.callbacks.stops import AtOnce, Stopped
from otl.quiet import speaks

log = logging.getLogger(__name__)


def job() -> str | None:
    """The id of the SLURM job that this process belongs to, as scontrol takes it; None: of none."""
    array, number = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{number}" if array and number else os.environ.get("SLURM_JOB_ID")


def requeue(settings: DictConfig, error: Stopped | AtOnce) -> None:
    """Put the job back, where it will go on from what it has saved, or begin again where it was stopped before.

    Args:
        error: the signal that has ended the run.
    """
    number, name = job(), signal.Signals(error.signal_number).name
    if number is None or name not in signals(settings) or not speaks():
        return
    if settings.resume != "auto":
        log.warning(f"SLURM job {number} is not put back into the queue: it would begin anew; add resume=auto")
        return
    try:
        done = subprocess.run(["scontrol", "requeue", number], capture_output=True, text=True)
    except OSError as missing:
        log.error(f"SLURM job {number} is not put back into the queue: scontrol cannot be called ({missing})")
        return
    if done.returncode:
        log.error(f"SLURM job {number} is not put back into the queue: {done.stderr.strip() or done.stdout.strip()}")
    else:
        log.info(f"SLURM job {number} is back in the queue, for the same line with resume=auto")


def signals(settings: DictConfig) -> list[str]:
    """The names of those upon which a job goes back."""
    checkpoint = settings.callbacks.get("checkpoint") or {}
    return checkpoint.get("requeue") or []
