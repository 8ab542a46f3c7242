"""An exponential moving average of the weights that train."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from otl.config import SettingsError

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)


def warmed_up(decay: float, updates: int) -> float:
    """The decay after so many updates: low at first, so that the start does not linger (as in TensorFlow's EMA)."""
    return min(decay, (1 + updates) / (10 + updates))


class EMA(Callback):
    """Keeps `module.average`, which is what is sampled and exported. Only what trains is averaged, in fp32.

    Args:
        decay: share of the average kept at each optimizer step, such as 0.999; None: no average is kept.
    """

    def __init__(self, decay: float | None = None) -> None:
        self.decay = decay
        self._averages: dict[str, Tensor] = {}
        self._updates = 0
        self._hook: Any = None  # torch's handle

    def setup(self, trainer: Trainer, pl_module: DiffusionModule, stage: str) -> None:
        """Raises SettingsError: the decay is not in 0..1."""
        if self.decay is not None and not 0 <= self.decay < 1:
            raise SettingsError(f"callbacks.ema.decay={self.decay}: give a number from 0 to below 1, such as 0.999")

    def on_fit_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """A run that was finished already ends before `on_train_start`, and its result is the average all the same."""
        if self.decay is not None and self._averages:
            pl_module.average = {name: tensor.to(pl_module.device) for name, tensor in self._averages.items()}

    def on_train_start(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        """Start from the weights, or go on from the checkpoint's average.

        Raises:
            SettingsError: the checkpoint's average is of other weights.
        """
        if self.decay is None:
            return
        live = {name: parameter.detach() for name, parameter in pl_module.trained_parameters().items()}
        weights = list(live.values())
        if not self._averages:
            self._averages = {name: weight.to(torch.float32, copy=True) for name, weight in live.items()}
        elif set(self._averages) != set(live):
            raise SettingsError("resume: the checkpoint's average is of other weights than those that train here")
        self._averages = {name: self._averages[name].to(weight.device) for name, weight in live.items()}
        pl_module.average = self._averages

        # A hook of the optimizer, not on_train_batch_end: it comes before every other callback, once for each step
        # that was really made (fp16's scaler skips some).
        def after_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            self._update(weights)

        self._hook = trainer.optimizers[0].register_step_post_hook(after_step)

    @torch.no_grad()
    def _update(self, weights: list[Tensor]) -> None:
        live = [weight.float() for weight in weights]
        torch._foreach_lerp_(list(self._averages.values()), live, 1 - warmed_up(self.decay, self._updates))
        self._updates += 1

    def on_train_end(self, trainer: Trainer, pl_module: DiffusionModule) -> None:
        if self._hook is not None:
            self._hook.remove()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.decay is None else {"averages": self._averages, "updates": self._updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.decay is None:
            log.warning("callbacks.ema.decay is null: the average that the checkpoint holds is not continued")
            return
        self._averages, self._updates = dict(state_dict["averages"]), state_dict["updates"]
