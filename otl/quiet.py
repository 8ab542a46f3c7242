"""No third-party noise: set before the libraries are imported, because some speak while they load. Imports no torch."""

from __future__ import annotations

import logging
import os
import warnings

LOGGERS = (
    "bitsandbytes",
    "bitsandbytes.backends.cpu.ops",
    "httpx",
    "fsspec",
    "transformers",
    "diffusers",
    "PIL",
    "peft",
)
TRAINERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric",
    "lightning.fabric.utilities.distributed",  # by itself: when it is imported, Lightning lets it speak
    "lightning.pytorch.accelerators.cuda",
)
RANKS = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")  # set by Lightning, torchrun or a cluster
WARNINGS = (
    ".*does not have many workers.*",
    ".*smaller than the logging interval.*",
    ".*isinstance\\(treespec, LeafSpec\\).*",
    ".*Checkpoint directory .* exists and is not empty.*",
    ".*lr_scheduler.step\\(\\)` before `optimizer.step.*",
    ".*module\\(s\\) in eval mode.*",
    ".*no `val_dataloader`.*",
    ".*have overridden `transfer_batch_to_device` in `LightningModule`.*",
    ".*`training_step` returned `None`.*",
    ".*Total length of `list` across ranks is zero.*",
    ".*The `srun` command is available.*",
)


def quiet_libraries() -> None:
    """Only errors of the libraries get through, and each line once: Lightning's own handler doubles Hydra's."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    for name in (*LOGGERS, *TRAINERS):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
    for message in WARNINGS:
        warnings.filterwarnings("ignore", message)


def speaks() -> bool:
    """Whether this process is the one that logs: of several that train together, the first."""
    return all(int(os.environ.get(name, 0)) == 0 for name in RANKS)


def quiet_ranks() -> None:
    """Only errors of the other processes get through: what else they have to say, the first says too."""
    if not speaks():
        logging.getLogger().setLevel(logging.ERROR)
        warnings.filterwarnings("ignore")


def undouble_lightning() -> None:
    """Take away the handler that Lightning adds to its own logger when it is imported."""
    logging.getLogger("lightning.pytorch").handlers.clear()
    logging.getLogger("lightning").handlers.clear()
