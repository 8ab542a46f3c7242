"""NaN and infinity never reach the weights, and a run that trained nothing says so."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from otl.config import RunEnded
from otl.formats.files import listed
from otl.types import Batch

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

SKIPS = 24  # fp16 steps skipped in a row before the run is given up: the scale has then fallen from 2**16 to 2**-8
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NonFinite(RunEnded):
    """NaN or infinity where a number belongs; the weights are as they were before."""


class Guard(Callback):
    """Looks at every loss and gradient before the optimizer does, which costs one wait for the device each step."""

    def __init__(self) -> None:
        self._trained: list[nn.Parameter] = []
        self._losses: list[Tensor] = []  # of the batches since the last optimizer step
        self._batches: list[Batch] = []
        self._skipped = 0
        self._start: dict[str, int] = {}
        self._start_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        self._trained = list(pl_module.trained_parameters().values())
        self._start, self._start_step = fingerprints(pl_module), trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: DiffusionModule, batch: Batch, batch_idx: int) -> None:
        self._batches.append(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: DiffusionModule, loss: Tensor) -> None:
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: DiffusionModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Raises NonFinite: the loss of a batch or a gradient is NaN or infinite."""
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients).to(self._losses[0].device)
        # One transfer for all of them: each would wait for the device.
        norm_finite, *finite = torch.isfinite(torch.stack([norm.float(), *(x.float() for x in self._losses)])).tolist()
        batches = [batch for batch, good in zip(self._batches, finite) if not good]
        self._losses, seen, self._batches = [], self._batches, []
        scaled = trainer.scaler is not None
        if scaled and not batches and not norm_finite and self._skipped < SKIPS:
            self._skipped += 1  # fp16: the scaler skips this step and lowers its scale
            return
        if not batches and norm_finite:
            self._skipped = 0
            return
        what = "the loss is" if batches else "the gradient is"
        raise NonFinite(message(what, trainer, batches or seen))

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """Warn if not one bit of what trains has changed."""
        if trainer.global_step > self._start_step and fingerprints(pl_module) == self._start:
            log.warning(
                f"nothing was trained: after {trainer.global_step - self._start_step} steps every weight is as it was "
                "at the start. Likely causes: optimizer.lr is 0 or far too small for the weights' dtype, the "
                "schedule's warm-up is longer than the run, or all loss weights are 0"
            )


def message(what: str, trainer: Trainer, batches: list[Batch]) -> str:
    """What happened, on which images, and what to try."""
    indices = [int(index) for batch in batches for index in batch.index]
    if trainer.datamodule is None:
        images = f"samples {listed([str(index) for index in indices])}"
    else:
        images = listed([trainer.datamodule.samples[index].name for index in indices])
    return (
        f"step {trainer.global_step + 1}: {what} NaN or infinite, in a batch with {images}. The weights are still good "
        "and the last checkpoint is untouched. Try a lower optimizer.lr, trainer.gradient_clip_val=1, "
        "trainer.precision=bf16-mixed or 32-true, and look at these images and their captions"
    )


def require_finite(module: DiffusionModule, step: int) -> None:
    """Refuse to keep weights that are not numbers.

    Raises:
        NonFinite: a trained weight, or its average, is NaN or infinite.
    """
    weights = {name: parameter.detach() for name, parameter in module.trained_parameters().items()}
    averages = {f"{name} (average)": average for name, average in (module.average or {}).items()}
    if broken := [name for name, weight in (weights | averages).items() if not torch.isfinite(weight).all()]:
        raise NonFinite(
            f"step {step}: the optimizer made {listed(broken)} NaN or infinite. Nothing was written; resume from the "
            "last checkpoint with a lower optimizer.lr, or with trainer.precision=bf16-mixed or 32-true"
        )


@torch.no_grad()
def fingerprints(module: DiffusionModule) -> dict[str, Any]:
    """Name -> sum of the bits of each trained weight, read as whole numbers: a change shows without a copy."""
    sums = {
        name: parameter.detach().contiguous().view(WORDS[parameter.element_size()]).sum(dtype=torch.int64)
        for name, parameter in module.trained_parameters().items()
    }
    return {name: int(total) for name, total in sums.items()}
