"""T5 is never in memory beside the transformer, unless it trains or nothing is cached."""

import gc

import pytest
import torch
from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from transformers import T5EncoderModel

from otl.tasks.train import train
from tests import tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.pixart_alpha(tmp_path_factory.mktemp("pixart"))


@pytest.fixture
def run(settings, checkpoint, tmp_path):
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (90 * number, 100, 200)).save(tmp_path / "photos" / f"{number}.png")

    def _run(name, *overrides):
        (tmp_path / name).mkdir()
        words = [
            "model=pixart_alpha",
            f"model.checkpoint={checkpoint}",
            f"data.path={tmp_path / 'photos'}",
            "data.prompt=a photo of a cat",
            f"data.cache_dir={tmp_path / 'cache'}",
            "data.resolution=64",
            "data.workers=0",
            "logger=none",
            "trainer.max_steps=2",
            "sample.prompts=[a cat]",
            "sample.steps=2",
            "output.dtype=fp32",
        ]
        train(settings(*words, *overrides), tmp_path / name)
        return tmp_path / name

    return _run


def with_weights(kind):
    """The live networks of a class that have weights."""
    found = [each for each in gc.get_objects() if isinstance(each, kind)]
    return [each for each in found if next(each.parameters()).device.type != "meta"]


@pytest.fixture
def together(monkeypatch):
    """Whether a T5 had weights at each loading of a transformer, and a transformer at each encoding of captions."""
    seen = []
    loads, encodes = PixArtTransformer2DModel.from_pretrained.__func__, T5EncoderModel.forward

    def load(cls, *args, **options):
        gc.collect()
        seen.append(bool(with_weights(T5EncoderModel)))
        return loads(cls, *args, **options)

    def encode(self, *args, **options):
        if next(self.parameters()).device.type != "meta":
            seen.append(bool(with_weights(PixArtTransformer2DModel)))
        return encodes(self, *args, **options)

    gc.collect()
    for each in with_weights((T5EncoderModel, PixArtTransformer2DModel)):  # of earlier tests
        each.to("meta")
    monkeypatch.setattr(PixArtTransformer2DModel, "from_pretrained", classmethod(load))
    monkeypatch.setattr(T5EncoderModel, "forward", encode)
    return seen


def test_one_is_gone_before_the_other_comes(run, together):
    run("run", "method.rank=4")
    assert len(together) >= 2 and not any(together)


@pytest.mark.parametrize("other", ["data.cache=false", "+method.parts.text_encoder={}"])
def test_they_are_together_where_they_have_to_be(run, together, other):
    run("run", other)
    assert any(together)


def test_the_result_is_the_same(run, monkeypatch):
    from otl.modules.pixart_alpha import PixArtAlpha

    apart = load_file(run("apart") / "final.safetensors")
    monkeypatch.setattr(PixArtAlpha, "encodes_ahead", False)
    together = load_file(run("together") / "final.safetensors")
    assert all(torch.equal(apart[name], together[name]) for name in apart | together)


def test_a_fine_tune_is_written_whole(run, checkpoint):
    folder = run("run", "method=finetune") / "final"
    written, start = (PixArtAlphaPipeline.from_pretrained(each) for each in (folder, checkpoint))
    name = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert torch.equal(written.text_encoder.state_dict()[name], start.text_encoder.state_dict()[name])
    assert not torch.equal(written.transformer.proj_out.weight, start.transformer.proj_out.weight)
