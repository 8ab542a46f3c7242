"""NaN and infinity never reach the weights, and a run that trained nothing says so."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from otl.config import RunEnded
from otl.formats.files import listed
from otl.types import Batch

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

SKIPS = 24  # fp16 steps skipped in a row before the run is given up: the scale has then fallen from 2**16 to 2**-8
FINE, GRADIENT, LOSS = range(3)  # what is wrong with a step, the clearer reason last
WHAT = {GRADIENT: "gradient", LOSS: "loss"}
WHOLE = (SingleDeviceStrategy, DDPStrategy)  # every rank has all gradients, and so their norm
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
        """Raises NonFinite: the loss of a batch or a gradient is NaN or infinite, on whichever rank."""
        gradients = [parameter.grad for parameter in self._trained if parameter.grad is not None]
        # One transfer for all of them: each would wait for the device.
        numbers = [total_norm(gradients), *self._losses]
        norm, *losses = torch.stack([each.to(self._losses[0].device, torch.float32) for each in numbers]).tolist()
        broken = [batch for batch, loss in zip(self._batches, losses) if not math.isfinite(loss)]
        self._losses, seen, self._batches = [], self._batches, []
        trouble = worst(trainer, LOSS if broken else FINE if math.isfinite(norm) else GRADIENT)
        if trouble == FINE:
            self._skipped = 0
            pl_module.gradient_norm = norm if isinstance(trainer.strategy, WHOLE) else None
        elif trouble == GRADIENT and trainer.scaler is not None and self._skipped < SKIPS:
            self._skipped += 1  # fp16: the scaler skips this step and lowers its scale
        else:
            raise NonFinite(message(trouble, trainer, broken if trouble == LOSS else seen))

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """Warn if not one bit of what trains has changed."""
        if trainer.global_step > self._start_step and fingerprints(pl_module) == self._start:
            log.warning(
                f"nothing was trained: after {trainer.global_step - self._start_step} steps every weight is as it was "
                "at the start. Likely causes: optimizer.lr is 0 or far too small for the weights' dtype, the "
                "schedule's warm-up is longer than the run, or all loss weights are 0"
            )


def total_norm(gradients: list[Tensor]) -> Tensor:
    """L2 norm of all gradients together; where their shards are on several ranks, of the whole."""
    total = torch.nn.utils.get_total_norm(gradients)
    return total.full_tensor() if isinstance(total, DTensor) else total


def worst(trainer: Trainer, trouble: int) -> int:
    """The greatest of all ranks: they stop together, since one that went on alone would wait for the rest for ever."""
    if trainer.world_size == 1:
        return trouble
    here = torch.tensor(trouble, device=trainer.strategy.root_device)
    return int(trainer.strategy.reduce(here, reduce_op="max"))


def message(trouble: int, trainer: Trainer, batches: list[Batch]) -> str:
    """What happened, on which images of all ranks, and what to try."""
    ranks: list[list[int]] = [[int(index) for batch in batches for index in batch.index]]
    if trainer.world_size > 1:
        ranks = ranks * trainer.world_size
        torch.distributed.all_gather_object(ranks, ranks[0])
    indices = [index for rank in ranks for index in rank]
    if trainer.datamodule is None:
        images = f"samples {listed([str(index) for index in indices])}"
    else:
        images = listed([trainer.datamodule.samples[index].name for index in indices])
    return (
        f"step {trainer.global_step + 1}: the {WHAT[trouble]} is NaN or infinite, in a batch with {images}. "
        "The weights are still good and the last checkpoint is untouched. Try a lower optimizer.lr, "
        "trainer.gradient_clip_val=1, trainer.precision=bf16-mixed or 32-true, and look at these images and their "
        "captions"
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
