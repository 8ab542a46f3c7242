"""NaN never reaches the weights; a run that trained nothing says so."""

from __future__ import annotations

import copy
import functools
import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision
from pytorch_optimizer import Prodigy

from otl.callbacks.checkpoint import Checkpoint
from otl.callbacks.ema import EMA
from otl.callbacks.guard import Guard, NonFinite
from tests.faults.ends import content, values

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


ORDER = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(0)).split(BATCH_SIZE)
POISONED = int(ORDER[1][2])  # in the second batch of the first epoch
NAMED = rf"{POISONED}\.png \(timestep {100 * POISONED}\), made by "


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_nan_loss_never_reaches_the_weights(run: Run, accumulate: int) -> None:
    last = Last()
    with pytest.raises(NonFinite, match=rf"step {3 - accumulate}: the loss is NaN or infinite, in {NAMED}") as error:
        run(Guard(skips=0), last, steps=9, poisoned=POISONED, accumulate=accumulate)
    assert torch.equal(last.module.net.weight, last.before)
    assert torch.isfinite(last.module.net.weight).all()
    assert str(error.value).count(".png") == 1, "others of its batch are named too"
    assert "callbacks.guard.skips=0" in str(error.value)


def test_an_infinite_gradient_never_reaches_the_weights(run: Run) -> None:
    last = Last()
    with pytest.raises(NonFinite, match=r"step 3: a gradient is NaN or .*made by the gradient of net\.bias"):
        run(Guard(skips=0), BreakGradient(), last, steps=9)
    assert torch.equal(last.module.net.weight, last.before)


def test_a_step_that_is_skipped_leaves_everything_as_it_is(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """Weights, the optimizer's state, the average; the schedule goes on, and so does the training."""
    average, weights, states = EMA(0.9), Weights(), []

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: TinyModule, *rest: Any) -> None:
            state = trainer.optimizers[0].state[pl_module.net.bias]
            held = {name: value.clone() for name, value in state.items()}
            states.append(held | {"average": average._averages["net.bias"].clone()})

    run(Guard(), BreakGradient(), average, weights, Look(), steps=5)
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(weights.seen)]
    assert moved == [True, True, False, True, True]
    assert all(torch.equal(states[1][name], states[2][name]) for name in states[1])
    assert [int(state["step"]) for state in states] == [1, 2, 2, 3, 4]
    assert "step 3: a gradient is NaN or infinite" in caplog.text
    assert "The step is skipped: 1 in a row, 1 in all" in caplog.text
    assert "1 step of 5 were skipped" in caplog.text


@pytest.mark.parametrize(
    "optimizer",
    [functools.partial(torch.optim.AdamW, lr=0.05), functools.partial(torch.optim.Adafactor, lr=0.05), Prodigy],
    ids=["adamw", "adafactor", "prodigy"],
)
def test_one_broken_batch_of_an_accumulation_spoils_none_of_them(run: Run, optimizer: Any) -> None:
    """The second of the three batches of the second step."""
    average, kept = EMA(0.9), []

    def change(module: TinyModule) -> None:
        losses = module.batch_losses
        module.batch_losses = lambda batch: losses(batch) * (torch.nan if len(module.losses) == 4 else 1)  # type: ignore[method-assign]
        module.configure_optimizers = lambda: optimizer([{"params": module.net.parameters(), "name": "unet"}])  # type: ignore[method-assign]

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: TinyModule, *rest: Any) -> None:
            if trainer.global_step == len(kept) + 1:
                states = [pl_module.state_dict(), trainer.optimizers[0].state_dict(), average.state_dict()]
                kept.append(copy.deepcopy(list(values(states, "after"))))

    module = run(Guard(), average, Look(), steps=3, accumulate=3, change=change)
    assert math.isnan(module.losses[4][1]) and math.isfinite(module.losses[5][1])
    first, second, third = ([(name, content(value)) for name, value in each] for each in kept)
    assert first == second
    assert all(torch.isfinite(value).all() for _, value in kept[2] if isinstance(value, torch.Tensor))
    assert [name for name, _ in third] == [name for name, _ in first] and third != first


def test_too_many_in_a_row_end_the_run(run: Run) -> None:
    with pytest.raises(NonFinite, match=r"step 3: .*callbacks\.guard\.skips_in_a_row=2"):
        run(Guard(skips_in_a_row=2, skips=99), BreakGradient(always=True), steps=9)


def test_too_many_in_all_end_the_run(run: Run) -> None:
    """The image comes up once in each epoch of three steps."""
    with pytest.raises(NonFinite, match=rf"step [789]: .*{NAMED}.*callbacks\.guard\.skips=2"):
        run(Guard(skips_in_a_row=1, skips=2), steps=99, poisoned=POISONED)


def test_what_was_skipped_before_a_resume_counts(run: Run, tmp_path: Path) -> None:
    """One in each epoch of three steps."""
    run(Guard(skips=1), Checkpoint(), steps=3, total=9, poisoned=POISONED)
    with pytest.raises(NonFinite, match=r"callbacks\.guard\.skips=1"):
        run(Guard(skips=1), steps=6, poisoned=POISONED, ckpt=tmp_path / "run/checkpoints/step-00000003.ckpt")


def test_a_run_that_ends_for_it_has_saved_what_it_did(run: Run, tmp_path: Path) -> None:
    last = Last()
    with pytest.raises(NonFinite):
        run(Guard(skips=0), Checkpoint(every=None), last, steps=9, poisoned=POISONED)
    saved = torch.load(tmp_path / "run/checkpoints/step-00000002.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["net.weight"], last.before)


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
    with pytest.raises(NonFinite, match=r"step 25: a gradient is .*too large for fp16.*scale is at its lowest"):
        run(Guard(), BreakGradient(always=True), steps=99, plugins=[fp16()])


def test_what_the_fp16_scaler_skips_is_not_counted(run: Run) -> None:
    assert len(run(Guard(skips=0), BreakGradient(), steps=5, plugins=[fp16()]).losses) >= 5


def test_a_nan_loss_does_not_lower_the_scale_of_fp16(run: Run) -> None:
    precision, weights = fp16(), Weights()
    run(Guard(), weights, steps=4, plugins=[precision], poisoned=POISONED)
    moved = [not torch.equal(one, other) for one, other in itertools.pairwise(weights.seen)]
    assert moved == [True, False, True, True]
    assert precision.scaler is not None and precision.scaler.get_scale() == 2**16


def test_the_training_is_the_same_with_and_without(run: Run) -> None:
    assert run(Guard(), steps=4).losses == run(steps=4).losses


def test_a_run_that_trained_nothing_says_so(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run(Guard(), steps=2, lr=0.0)
    assert "nothing was trained: after 2 steps" in caplog.text
    assert "optimizer.lr" in caplog.text


def test_a_run_that_trained_does_not(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    run(Guard(), steps=2, lr=1e-6)
    assert "nothing was trained" not in caplog.text
