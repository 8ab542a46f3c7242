"""NaN never reaches the weights; a run that trained nothing says so."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from otl.callbacks.guard import Guard, NonFinite

from .conftest import BATCH_SIZE, IMAGES, Run, TinyModule


class Last(Callback):
    """Keeps the module, its state before each optimizer step, and the exception."""

    def on_train_start(self, trainer: Any, pl_module: TinyModule) -> None:
        self.module = pl_module
        self.before = pl_module.net.weight.detach().clone()

    def on_train_batch_end(self, trainer: Any, pl_module: TinyModule, *rest: Any) -> None:
        self.before = pl_module.net.weight.detach().clone()


class BreakGradient(Callback):
    """Makes one entry of a gradient infinite, once."""

    def on_after_backward(self, trainer: Any, pl_module: TinyModule) -> None:
        if trainer.global_step == 2:
            pl_module.net.bias.grad[1] = float("inf")


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_loss_never_reaches_the_weights(run: Run, accumulate: int) -> None:
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0)).split(BATCH_SIZE)
    poisoned = int(order[1][2])  # the second batch of the first epoch
    last = Last()
    with pytest.raises(
        NonFinite, match=rf"step {3 - accumulate}: the loss is NaN.*\b{poisoned}\b.*optimizer\.lr"
    ) as error:
        run(Guard(), last, steps=9, poisoned=poisoned, accumulate=accumulate)
    assert torch.equal(last.module.net.weight, last.before)
    assert torch.isfinite(last.module.net.weight).all()
    named = str(error.value).split("samples ")[1].split(".")[0]
    assert sorted(map(int, named.split(", "))) == sorted(order[1].tolist())  # not those of the good batch before it


def test_an_infinite_gradient_never_reaches_the_weights(run: Run) -> None:
    last = Last()
    with pytest.raises(NonFinite, match="step 3: the gradient is NaN or infinite"):
        run(Guard(), BreakGradient(), last, steps=9)
    assert torch.equal(last.module.net.weight, last.before)


def test_the_training_is_the_same_with_and_without(run: Run) -> None:
    assert run(Guard(), steps=4).losses == run(steps=4).losses


def test_a_run_that_trained_nothing_says_so(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run(Guard(), steps=2, lr=0.0)
    assert "nothing was trained: after 2 steps" in caplog.text
    assert "optimizer.lr" in caplog.text


def test_a_run_that_trained_does_not(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run(Guard(), steps=2, lr=1e-6)
    assert "nothing was trained" not in caplog.text
