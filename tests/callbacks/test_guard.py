"""NaN never reaches the weights; a run that trained nothing says so."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from otl.callbacks.ema import EMA
from otl.callbacks.guard import Guard, NonFinite

from .conftest import BATCH_SIZE, IMAGES, Run, TinyModule, Weights


class Last(Callback):
    """Keeps the module, its state before each optimizer step, and the exception."""

    def on_train_start(self, trainer: Any, pl_module: TinyModule) -> None:
        self.module = pl_module
        self.before = pl_module.net.weight.detach().clone()

    def on_train_batch_end(self, trainer: Any, pl_module: TinyModule, *rest: Any) -> None:
        self.before = pl_module.net.weight.detach().clone()


class BreakGradient(Callback):
    """Makes one entry of the third step's gradient infinite, or of every step's."""

    def __init__(self, always: bool = False) -> None:
        self.always = always

    def on_after_backward(self, trainer: Any, pl_module: TinyModule) -> None:
        if trainer.global_step == 2 or self.always:
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


def fp16() -> MixedPrecision:
    """Lightning's fp16 with its scaler; `precision="16-mixed"` itself refuses a CPU."""
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))


def test_a_step_that_the_fp16_scaler_skips_is_neither_an_error_nor_averaged(run: Run) -> None:
    average, weights = EMA(0.9), Weights()
    module = run(Guard(), BreakGradient(), average, weights, steps=5, plugins=[fp16()])
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(weights.seen)]
    expected = weights.seen[0]
    for s, weight in enumerate(weight for weight, changed in zip(weights.seen[1:], moved) if changed):
        expected = expected.lerp(weight, 1 - min(0.9, (1 + s) / (10 + s)))
    assert moved[2] is False  # the broken one
    assert moved[3:] == [True, True]
    assert torch.allclose(module.average["net.weight"], expected)


def test_fp16_gives_up_where_every_step_is_skipped(run: Run) -> None:
    with pytest.raises(NonFinite, match="step 25: the gradient is"):
        run(Guard(), BreakGradient(always=True), steps=99, plugins=[fp16()])


def test_the_training_is_the_same_with_and_without(run: Run) -> None:
    assert run(Guard(), steps=4).losses == run(steps=4).losses


def test_a_run_that_trained_nothing_says_so(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run(Guard(), steps=2, lr=0.0)
    assert "nothing was trained: after 2 steps" in caplog.text
    assert "optimizer.lr" in caplog.text


def test_a_run_that_trained_does_not(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run(Guard(), steps=2, lr=1e-6)
    assert "nothing was trained" not in caplog.text
