"""The average is the recurrence of its definition, of what trains only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from otl.callbacks.checkpoint import Checkpoint
from otl.callbacks.ema import EMA, warmed_up
from otl.config import SettingsError

from .conftest import Run, Weights


def test_the_decay_warms_up() -> None:
    assert [warmed_up(0.5, s) for s in (0, 2, 1000)] == [1 / 10, 3 / 12, 0.5]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_it_is_updated_once_for_each_optimizer_step(run: Run, accumulate: int) -> None:
    weights = Weights()
    module = run(EMA(0.3), weights, steps=5, accumulate=accumulate)
    assert len(weights.seen) == 6
    expected = weights.seen[0].double()
    for s, weight in enumerate(weights.seen[1:]):
        decay = min(0.3, (1 + s) / (10 + s))
        expected = decay * expected + (1 - decay) * weight.double()
    assert torch.allclose(module.average["net.weight"].double(), expected, atol=1e-6)


def test_only_what_trains_is_averaged_in_fp32(run: Run) -> None:
    module = run(EMA(0.9), steps=2, change=lambda module: module.net.bfloat16().float())
    assert {name: average.dtype for name, average in module.average.items()} == {
        "net.weight": torch.float32,
        "net.bias": torch.float32,
    }


def test_without_a_decay_there_is_none(run: Run, tmp_path: Path) -> None:
    assert run(EMA(), Checkpoint(), steps=2).average is None
    saved = torch.load(tmp_path / "run/checkpoints/step-00000002.ckpt", weights_only=True)
    assert "EMA" not in saved["callbacks"]


def test_it_is_resumed_bit_for_bit(run: Run, tmp_path: Path) -> None:
    whole = run(EMA(0.9), Checkpoint(every=4), steps=7, folder="whole")
    resumed = run(EMA(0.9), Checkpoint(), steps=7, ckpt=tmp_path / "whole/checkpoints/step-00000004.ckpt")
    assert all(torch.equal(resumed.average[name], average) for name, average in whole.average.items())


def test_the_training_is_the_same_with_and_without(run: Run) -> None:
    assert run(EMA(0.9), steps=4).losses == run(steps=4).losses


@pytest.mark.parametrize("decay", [1.0, -0.1])
def test_an_impossible_decay_is_refused(run: Run, decay: float) -> None:
    with pytest.raises(SettingsError, match=r"callbacks\.ema\.decay"):
        run(EMA(decay), steps=1)
