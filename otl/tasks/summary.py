"""What is said of a run, in a few lines before it and after it."""

from __future__ import annotations

import csv
import logging
import statistics
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from omegaconf import DictConfig

from otl.callbacks.progress import clock_time
from otl.datamodules.bucketed import BucketedDataModule
from otl.modules.base import DiffusionModule
from otl.modules.training import steps_per_epoch
from otl.tasks.folder import exported

log = logging.getLogger(__name__)

KEPT = ("plan.json", "metrics.csv", "manifest.json", "checkpoints")  # beside results and pictures


def opening(module: DiffusionModule, data: BucketedDataModule, trainer: Trainer, batches: int) -> None:
    """Model, data, length and place; the precision has been said before.

    Args:
        batches: of one rank in an epoch.
    """
    per_epoch = steps_per_epoch(batches, trainer.accumulate_grad_batches)
    method = type(module.method).__name__
    log.info(f"{type(module).__name__} from {module.checkpoint}, method {method}")
    images, buckets = len(set(data.layout.images.tolist())), len(data.layout.sizes)
    log.info(f"{images} images in {buckets} buckets; the largest is {max(data.layout.sizes, key=lambda s: s.area)}")
    log.info(f"{batches} batches and {per_epoch} optimizer steps an epoch, {module.total_steps} steps in all")
    log.info(f"on {device_name(trainer)} with {torch.get_num_threads()} threads; folder {module.run_dir}")


def closing(settings: DictConfig, steps: int, folder: Path, *, seconds: float) -> None:
    """Length, losses, and where everything is.

    Args:
        steps: optimizer steps that the run has made.
        seconds: that this process took for its part of them.
    """
    log.info(f"{steps} steps, {clock_time(seconds)} in this process")
    log.info(f"loss      {losses(folder / 'metrics.csv')}")
    for path in exported(settings, folder):
        log.info(f"result    {path}")
    log.info(f"pictures  {pictures(folder / 'samples')}")
    log.info(f"all else  {', '.join(name for name in KEPT if (folder / name).exists())} in {folder}")


def pictures(folder: Path) -> str:
    """Where to look: the sheet of before and after, where there is one."""
    sheet = folder / "before-after.png"
    if sheet.is_file():
        return str(sheet)
    return str(folder) if any(folder.rglob("*.png")) else "none were drawn"


def losses(table: Path) -> str:
    """The middle one of the first and of the last tenth of the rows: single ones depend on their timestep."""
    if not table.is_file():
        return "not written down"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [float(row["loss"]) for row in rows if row["loss"]]
    if not found:
        return "not measured"
    tenth = max(1, len(found) // 10)
    first, last = (statistics.median(part) for part in (found[:tenth], found[-tenth:]))
    held_out = [float(row["val_loss"]) for row in rows if row["val_loss"]]
    return f"{first:.4f} at first, {last:.4f} at last" + (f", held out {held_out[-1]:.4f}" if held_out else "")


def device_name(trainer: Trainer) -> str:
    """What trains, and how many of them."""
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if trainer.world_size == 1 else f"{trainer.world_size} x {name}"
