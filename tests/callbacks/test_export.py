"""The file that the run is for is written at its end, of the average where one is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from otl.callbacks.ema import EMA
from otl.callbacks.export import Export

from .conftest import Run, TinyModule


def test_the_end_is_exported_under_its_name(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")

    def name(module: TinyModule) -> None:
        module.output_options.name = "cat"

    module = run(Export(), steps=2, change=name)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["cat.json"]
    assert torch.equal(torch.tensor(json.loads((tmp_path / "run/cat.json").read_text())), module.net.weight)
    assert "cat.json" in caplog.text


def test_it_exports_on_the_way_by_optimizer_steps(run: Run, tmp_path: Path) -> None:
    """The training, which has dropout, does not notice."""
    module = run(Export(every=2), steps=4, accumulate=2)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["final-step-000002.json", "final.json"]
    torch.manual_seed(1)
    assert module.losses == run(steps=4, accumulate=2).losses


def test_the_average_is_exported_and_the_weights_stay(run: Run, tmp_path: Path) -> None:
    plain = run(steps=4)
    module = run(Export(), EMA(0.9), steps=4)
    exported = torch.tensor(json.loads((tmp_path / "run/final.json").read_text()))
    assert torch.equal(exported, module.average["net.weight"])
    assert torch.equal(module.net.weight, plain.net.weight)
    assert not torch.equal(exported, module.net.weight)
