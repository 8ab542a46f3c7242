"""Wuerstchen against its formulas and the parts of the stock pipelines."""

import json
import math

import diffusers
import diffusers.pipelines
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler, WuerstchenDecoderPipeline, WuerstchenPriorPipeline
from diffusers.pipelines.deprecated import wuerstchen as stock
from torch.nn import functional as F
from transformers import CLIPTextModel, CLIPTokenizer

from otl.config import LoraFormat, Loss, LossWeight, Output
from otl.methods.finetune import Finetune
from otl.methods.lora import Lora
from otl.methods.targets import layers, matching
from otl.modules.wuerstchen import Wuerstchen
from otl.tasks.advice import advise
from otl.tasks.run import build_skeleton
from otl.testing import CHECKS
from tests import tiny_priors
from tests.modules.priors import CAPTIONS, Recorder, apart, batch, features, loaded, noise

U = torch.tensor([0.3, 0.97], dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_priors.wuerstchen(tmp_path_factory.mktemp("wuerstchen"))


def prior_pipeline(folder):
    """The stock pipeline of the folder's parts."""
    return WuerstchenPriorPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        prior=stock.WuerstchenPrior.from_pretrained(folder / "prior"),
        scheduler=DDPMWuerstchenScheduler(),
    )


def decoder_pipeline(folder):
    return WuerstchenDecoderPipeline(
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        decoder=stock.WuerstchenDiffNeXt.from_pretrained(folder / "decoder"),
        vqgan=stock.PaellaVQModel.from_pretrained(folder / "vqgan"),
        scheduler=DDPMWuerstchenScheduler(),
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check, folder):
    check(lambda: Wuerstchen(str(folder), **tiny_priors.options(folder)))


def test_the_loss_is_that_of_the_original_training(folder):
    ours = loaded(Wuerstchen, folder).losses(batch(), u=U, stream="noise")
    pipe = prior_pipeline(folder)
    t = (1.08 * U + 0.001).clamp(0.001, 1.0).float()
    assert t[1] == 1
    with torch.no_grad():
        hidden, _ = pipe.encode_prompt("cpu", 1, False, prompt=CAPTIONS)
        noisy = pipe.scheduler.add_noise((features(folder) + 1) / 42, noise(), t)
        error = F.mse_loss(pipe.prior(noisy, t, hidden), noise(), reduction="none").mean((1, 2, 3))
        bars = (((t + 0.008) / 1.008 * math.pi / 2).cos() ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2).clamp(
            0.0001, 0.9999
        )
        expected = error * (1 + bars / (1 - bars)) ** -1.0 * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "weight", "power"),
    [({"p2_gamma": 0.0}, "constant", 0.0), ({"p2_gamma": 0.5}, "constant", 0.5), ({"p2_gamma": 0.0}, "p2", 1.0)],
)
def test_the_weight_can_be_chosen(folder, settings, weight, power):
    module = loaded(Wuerstchen, folder, **settings)
    module.loss_options = Loss(weight=LossWeight[weight])
    t = torch.tensor([0.2, 0.8])
    bars = DDPMWuerstchenScheduler()._alpha_cumprod(t, torch.device("cpu")).double()
    torch.testing.assert_close(module.timestep_weight(t), (1 - bars) ** power, rtol=1e-4, atol=1e-6)


def test_drawing_is_that_of_the_stock_pipelines(folder):
    module = loaded(Wuerstchen, folder)
    options = {"negative_prompt": "blurry", "steps": 3, "guidance": 4.0}
    drawn = module.draw(["a cat", "a dog"], [3, 4], **options)
    module.decoders = Recorder()
    module.draw(["a cat", "a dog"], [3, 4], **options)
    generator = torch.Generator().manual_seed(4)
    size = {"height": 128, "width": 128}
    embeddings = prior_pipeline(folder)(
        "a dog", negative_prompt="blurry", num_inference_steps=3, guidance_scale=4.0, generator=generator, **size
    ).image_embeddings
    torch.testing.assert_close(module.decoders.seen[1], embeddings, rtol=1e-4, atol=1e-4)
    expected = decoder_pipeline(folder / "decoders")(embeddings, "a dog", generator=generator).images[0]
    assert apart(drawn[1], expected) <= 1
    assert apart(drawn[0], expected) > 1


def test_a_lora_in_diffusers_keys_does_there_what_it_does_here(folder, tmp_path):
    module = Wuerstchen(str(folder), **tiny_priors.options(folder))
    module.method = Lora(rank=4, alpha=2.0, targets="full", parts={"denoiser": {}, "text_encoder": {}})
    module.output_options = Output(format=LoraFormat.peft, dtype="fp32")
    module.configure_model()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.trained_parameters().values():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    module.eval()
    pipe = prior_pipeline(folder)
    t = torch.tensor([0.2, 0.7])

    def predicted():
        with torch.no_grad():
            hidden, _ = pipe.encode_prompt("cpu", 1, False, prompt=CAPTIONS)
            return pipe.prior(noise(), t, hidden)

    before = predicted()
    pipe.load_lora_weights(module.export(tmp_path / "adapter"))
    with torch.no_grad():
        live = module.predict(noise(), t, module.encode_prompt(CAPTIONS), batch())
    assert (live - before).abs().max() > 0.1
    torch.testing.assert_close(predicted(), live, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("line", "warned"), [("method=lora", True), ("output.format=peft", False)])
def test_a_lora_in_keys_that_nobody_reads_is_warned_of_before_it_is_trained(line, warned, folder, settings, tmp_path):
    own = [f"model.{name}={path}" for name, path in tiny_priors.options(folder).items()]
    cfg = settings("model=wuerstchen", f"model.checkpoint={folder}", *own, f"data.path={tmp_path}", "logger=none", line)
    found = advise(cfg, build_skeleton(cfg), [], batches=0, steps=0)
    assert [(problem.key, problem.fatal) for problem in found] == [("output.format", False)] * warned
    assert all("set output.format=peft" in problem.message for problem in found)


def test_what_was_fine_tuned_is_read_here_and_by_diffusers(folder, tmp_path, monkeypatch):
    module = Wuerstchen(str(folder), **tiny_priors.options(folder))
    module.method, module.output_options = Finetune(), Output(dtype="fp32")
    module.configure_model()
    with torch.no_grad():
        module.part("prior").projection.weight.add_(1.0)
    written = module.export(tmp_path / "final")
    expected = module.part("prior").state_dict()

    again = Wuerstchen(str(written), **tiny_priors.options(folder))
    again.configure_model()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.part("prior").state_dict().items())

    index = json.loads((written / "model_index.json").read_text())
    assert index["prior"] == ["wuerstchen", "WuerstchenPrior"]  # as published
    monkeypatch.setattr(diffusers.pipelines, "wuerstchen", stock, raising=False)  # where older diffusers have it
    theirs = WuerstchenPriorPipeline.from_pretrained(written)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in theirs.prior.state_dict().items())
    assert theirs.config.latent_mean == 42.0


@pytest.fixture(scope="module")
def full():
    """At full size, on the meta device."""
    module = Wuerstchen("published/weights", effnet="published/effnet")
    module.build_skeleton()
    return module


@pytest.mark.parametrize(("part", "count"), [("prior", 993_636_896), ("text_encoder", 693_021_440)])
def test_it_has_the_published_number_of_parameters(full, part, count):
    assert sum(p.numel() for p in full.part(part).parameters()) == count


@pytest.mark.parametrize(
    ("preset", "count"),
    [  # 32 times: channelwise 2, time 1, attention 4 and its mapper 1; in front projection and 2 mappers, 1 at the end
        ("attn-only", 32 * 4),
        ("attn-mlp", 32 * 6),
        ("blocks", 32 * 8),
        ("mapper", 32 * 2 + 2),
        ("full", 32 * 8 + 4),
    ],
)
def test_presets_find_the_layers_of_the_architecture(full, preset, count):
    prior = full.part("prior")
    assert len(matching({"prior": layers(prior)}, preset, full.lora_targets)["prior"]) == count
