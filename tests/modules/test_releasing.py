"""While the denoiser trains, the text encoders whose output is cached are not in memory."""

import pytest
from PIL import Image

from otl.modules.base import DiffusionModule
from otl.tasks.train import train
from tests import tiny_priors
from tests.cells import FAMILIES, build


@pytest.fixture
def run(settings, tmp_path, monkeypatch):
    """Train a family for three steps; at each, the text encoders that have weights."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (128, 128), (90, 100, 200)).save(tmp_path / "photos" / "a.png")
    (tmp_path / "run").mkdir()
    seen, losses = [], DiffusionModule.batch_losses

    def batch_losses(module, batch):
        there = {name for name in module.text_encoders if next(module.part(name).parameters()).device.type != "meta"}
        seen.append(there)
        return losses(module, batch)

    monkeypatch.setattr(DiffusionModule, "batch_losses", batch_losses)

    def _run(family, *overrides):
        words = [
            f"data.path={tmp_path / 'photos'}",
            "data.prompt=a photo of a cat",
            f"data.cache_dir={tmp_path / 'cache'}",
            f"data.resolution={128 if family in tiny_priors.FAMILIES else 64}",
            "data.workers=0",
            "logger=none",
            "trainer.max_steps=3",
            "callbacks.sampling.every=null",
        ]
        train(settings(*build(family, tmp_path / "model"), *words, *overrides), tmp_path / "run")
        return seen

    return _run


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_let_go_before_the_first_step(run, family):
    assert run(family, "method.rank=4") == [set()] * 3


@pytest.mark.parametrize("family", ["sdxl", "wuerstchen", "pixart_alpha"])
def test_they_go_again_after_a_fine_tune_was_exported_on_the_way(run, family, tmp_path):
    assert run(family, "method=finetune", "callbacks.export.every=1") == [set()] * 3
    for name in ("final-step-000001", "final-step-000002", "final"):
        assert list((tmp_path / "run" / name / "text_encoder").glob("*.safetensors"))


def test_one_that_trains_stays(run):
    assert run("sd15", "+method.parts.text_encoder={}") == [{"text_encoder"}] * 3
