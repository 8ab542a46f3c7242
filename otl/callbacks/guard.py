"""NaN and infinity never reach the weights, and a run that trained nothing says so."""

from __future__ import annotations

import logging
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from otl.callbacks.diagnosis import Finding, of_gradient, of_loss, shown_all
from otl.config import RunEnded
from otl.formats.files import listed
from otl.modules.skipping import StepSkipped
from otl.types import Batch
from otl.wording import counted

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)

SCALINGS = 24  # fp16 steps in a row for which its scale is lowered before that is given up: from 2**16 to 2**-8
FINE, GRADIENT, LOSS = range(3)  # what is wrong with a step, the clearer reason last
WHAT = {GRADIENT: "a gradient", LOSS: "the loss"}
WHOLE = (SingleDeviceStrategy, DDPStrategy)  # every rank has all gradients, and so their norm
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NonFinite(RunEnded):
    """NaN or infinity where a number belongs; the weights are as they were before."""


class Guard(Callback):
    """Looks at every loss and gradient before the optimizer does, which costs one wait for the device each step.

    A step with a NaN or an infinity in it is skipped: weights, optimizer and average stay as they are. What fp16's
    scaler skips while it finds its scale is not counted.

    Args:
        skips_in_a_row: steps, one after the other, that may be skipped; at one more the run ends.
        skips: the same of the whole run; 0: the first one ends it.
    """

    def __init__(self, skips_in_a_row: int = 5, skips: int = 20) -> None:
        self.skips_in_a_row, self.skips = skips_in_a_row, skips
        self._trained: list[nn.Parameter] = []
        self._losses: list[Tensor] = []  # of the batches since the last optimizer step
        self._batches: list[Batch] = []
        self._skipped = self._in_a_row = 0  # steps
        self._scalings = 0  # steps in a row that fp16's scaler skipped
        self._end: str | None = None  # why the run is to end after this step
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
        """Raises StepSkipped: the loss of a batch or a gradient is NaN or infinite, on whichever rank."""
        gradients = [gradient for parameter in self._trained if (gradient := parameter.grad) is not None]
        # One transfer for all of them: each would wait for the device.
        numbers = [total_norm(gradients), *self._losses]
        norm, *losses = torch.stack([each.to(self._losses[0].device, torch.float32) for each in numbers]).tolist()
        broken = [batch for batch, loss in zip(self._batches, losses) if not math.isfinite(loss)]
        self._losses, seen, self._batches = [], self._batches, []
        trouble = worst(trainer, LOSS if broken else FINE if math.isfinite(norm) else GRADIENT)
        if trouble == FINE:
            self._in_a_row = self._scalings = 0
            pl_module.gradient_norm = norm if isinstance(trainer.strategy, WHOLE) else None
            return
        scaled = trouble == GRADIENT and trainer.scaler is not None
        if scaled and self._scalings < SCALINGS:
            self._scalings += 1  # the scaler skips this step and lowers its scale
            return
        self._skipped, self._in_a_row = self._skipped + 1, self._in_a_row + 1
        self._tell(trainer, pl_module, trouble, broken if trouble == LOSS else seen, scaled=scaled)
        raise StepSkipped

    def on_train_batch_end(self, trainer: Trainer, pl_module: DiffusionModule, *rest: Any) -> None:
        """Raises NonFinite: more steps were skipped than may be. The weights are good, and can be saved."""
        if self._end is not None:
            raise NonFinite(self._end)

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """Warn of what was skipped, and if not one bit of what trains has changed."""
        if self._skipped:
            log.warning(f"{counted(self._skipped, 'step')} of {trainer.global_step} were skipped, for NaN or infinity")
        if trainer.global_step > self._start_step and fingerprints(pl_module) == self._start:
            log.warning(
                f"nothing was trained: after {trainer.global_step - self._start_step} steps every weight is as it was "
                "at the start. Likely causes: optimizer.lr is 0 or far too small for the weights' dtype, the "
                "schedule's warm-up is longer than the run, all loss weights are 0, or every step was skipped"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self._skipped, "in_a_row": self._in_a_row, "scalings": self._scalings}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._skipped, self._in_a_row = state_dict["skipped"], state_dict["in_a_row"]
        self._scalings = state_dict["scalings"]

    def _tell(
        self, trainer: Trainer, module: DiffusionModule, trouble: int, batches: list[Batch], *, scaled: bool
    ) -> None:
        """Say what was found, of all ranks, and whether it is enough."""
        names = [sample.name for sample in trainer.datamodule.samples]
        own = Finding(shown_all(module, batches, names))
        if batches and isinstance(trainer.strategy, WHOLE):  # a rank alone has no whole layers elsewhere
            look = of_loss if trouble == LOSS else partial(of_gradient, scaled=scaled)
            own = look(module, batches, names)
        found = "; and ".join(str(finding) for finding in gathered(trainer, own) if finding.images)
        text = f"step {trainer.global_step + 1}: {WHAT[trouble]} is NaN or infinite, {found}"
        limits = {"skips_in_a_row": (self._in_a_row, self.skips_in_a_row), "skips": (self._skipped, self.skips)}
        over = [f"callbacks.guard.{name}={limit}" for name, (count, limit) in limits.items() if count > limit]
        if over or scaled:
            why = over[0] if over else "fp16's scale is at its lowest"
            self._end = f"{text}. The run ends ({why}); its weights are those of the last good step"
        else:
            log.warning(f"{text}. The step is skipped: {self._in_a_row} in a row, {self._skipped} in all")


def gathered(trainer: Trainer, own: Finding) -> list[Finding]:
    """What all ranks have found."""
    ranks = [own] * trainer.world_size
    if trainer.world_size > 1:
        torch.distributed.all_gather_object(ranks, own)
    return ranks


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
