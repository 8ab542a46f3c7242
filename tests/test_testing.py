"""The family contract: OTL's families keep it, and each check sees a family that breaks it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from otl.methods.finetune import Finetune
from otl.modules.base import DiffusionModule
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_2 import StableDiffusion2
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.testing import CHECKS, check_family
from otl.testing import families as testing
from otl.testing.methods import check_gradients_reach_what_trains, check_the_shape_is_kept, unreached
from tests.commands import ROOT

Family = type[DiffusionModule]
BROKEN: dict[Callable[..., None], tuple[Callable[[Any], Family], str]] = {}
"""Check -> a function that breaks a family, and what the check says of it."""


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Family:
    """The quickest family to load: the one of plugins/otl-example."""
    monkeypatch.syspath_prepend(ROOT / "plugins" / "otl-example")
    from otl_example.family import Example

    return Example


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusion2, StableDiffusionXL])
def test_the_families_keep_the_contract(family, check, sd15_folder, sd2_folder, sdxl_folder):
    folder = {StableDiffusion: sd15_folder, StableDiffusion2: sd2_folder, StableDiffusionXL: sdxl_folder}[family]
    check(lambda: family(str(folder)))


def test_every_check_is_listed():
    written = {value for name, value in inspect.getmembers(testing) if name.startswith("check_")}
    assert set(CHECKS) == written - {check_family}
    assert len(CHECKS) == len(set(CHECKS)) >= 20


def test_every_check_has_a_family_that_breaks_it():
    assert set(BROKEN) == set(CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_broken_family_is_seen(check, example):
    breaks, message = BROKEN[check]
    check(example)
    with pytest.raises((AssertionError, RuntimeError), match=message):
        check(breaks(example))


def test_all_that_is_broken_is_told_at_once(example):
    with pytest.raises(AssertionError, match=r"2 of .* checks") as caught:
        check_family(loss_without_weights(snr_without_its_square(example)))
    assert "check_loss: AssertionError: the samples' weights" in str(caught.value)
    assert "check_noise_snr: AssertionError: snr is off by" in str(caught.value)


def test_a_whole_family_passes_at_once(example):
    check_family(example)


def test_the_page_on_families_shows_the_file_as_it_is():
    source = inspect.getsource(inspect.getmodule(StableDiffusion))
    page = (ROOT / "docs" / "adding-a-family.md").read_text(encoding="utf-8")
    shown = [line for block in page.split("```python\n")[1:] for line in block.partition("```")[0].splitlines()]
    assert len(shown) >= 30
    own = {line.strip() for line in source.splitlines()}
    assert [line for line in shown if line.strip() not in own] == []


def with_method(family, method):
    module = family()
    module.method = method
    return module


def test_a_fine_tune_without_every_second_gradient_is_seen(example):
    class Broken(example):
        def prepare(self):
            super().prepare()
            for parameter in list(self.trained_parameters().values())[::2]:
                parameter.register_hook(torch.zeros_like)

    check_gradients_reach_what_trains(lambda: with_method(example, Finetune()))
    with pytest.raises(AssertionError, match=r"no gradient reaches \d+ weights that the loss depends on"):
        check_gradients_reach_what_trains(lambda: with_method(Broken, Finetune()))


def test_a_gradient_of_what_does_not_train_is_seen(example):
    class Broken(example):
        def prepare(self):
            super().prepare()
            next(self.part("text_encoder").parameters()).requires_grad_(True)

    with pytest.raises(AssertionError, match="are in no group"):
        check_gradients_reach_what_trains(lambda: with_method(Broken, Finetune()))


def test_a_prediction_of_another_shape_is_seen(example):
    class Broken(example):
        def predict(self, noisy, t, cond, batch):
            return super().predict(noisy, t, cond, batch).repeat(1, 2, 1, 1)

    check_the_shape_is_kept(lambda: with_method(example, Finetune()))
    with pytest.raises(AssertionError, match="-> prediction"):
        check_the_shape_is_kept(lambda: with_method(Broken, Finetune()))


def test_excused_are_the_layers_behind_the_one_that_sdxl_reads(sdxl_folder):
    def made():
        return with_method(lambda: StableDiffusionXL(str(sdxl_folder)), Finetune(parts={"text_encoder": {}}))

    check_gradients_reach_what_trains(made)
    module = made()
    module.configure_model()
    names = {name.removeprefix("trained.text_encoder.") for name in module.trained_parameters()}
    last = f"encoder.layers.{module.part('text_encoder').config.num_hidden_layers - 1}."
    behind = {name for name in names if name.startswith((last, "final_layer_norm"))}
    assert {name.removeprefix("trained.text_encoder.") for name in unreached(module)} == behind
    assert 10 < len(behind) < len(names)


def breaks(check: Callable[..., None], message: str) -> Callable[..., Any]:
    """Note a way to break what a check looks for."""

    def note(break_family: Callable[[Any], Family]) -> Callable[[Any], Family]:
        BROKEN[check] = break_family, message
        return break_family

    return note


@breaks(testing.check_declared, "two parts have one prefix")
def one_prefix_for_all_parts(family):
    class Broken(family):
        kohya_prefixes = {"transformer": "lora", "text_encoder": "lora"}

    return Broken


@breaks(testing.check_constructor_only_stores, "the constructor loads")
def constructor_that_loads(family):
    class Broken(family):
        def __init__(self):
            super().__init__()
            self.configure_model()

    return Broken


@breaks(testing.check_loads_frozen, r"transformer\.proj_in\.weight arrives trainable")
def denoiser_that_arrives_trainable(family):
    class Broken(family):
        def prepare(self):
            super().prepare()
            self.part("denoiser").requires_grad_(True)

    return Broken


@breaks(testing.check_presets_find_layers, "the preset attn-only of transformer.*matches no layer")
def preset_without_layers(family):
    class Broken(family):
        lora_targets = {"transformer": {"attn-only": [r"attn1"]}}

    return Broken


@breaks(testing.check_image_shape, "latents are torch.float16")
def latents_in_half(family):
    class Broken(family):
        def encode_image(self, pixels):
            return super().encode_image(pixels).half()

    return Broken


@breaks(testing.check_image_deterministic, "other latents on the second call")
def latents_drawn_from_a_posterior(family):
    class Broken(family):
        def encode_image(self, pixels):
            latents = super().encode_image(pixels)
            return latents + 0.1 * torch.randn_like(latents)

    return Broken


@breaks(testing.check_image_batch, "depend on the second")
def mean_of_batch_in_latents(family):
    class Broken(family):
        def encode_image(self, pixels):
            return super().encode_image(pixels - pixels.mean())

    return Broken


@breaks(testing.check_decode_shape, "come back as")
def pixels_of_half_the_size(family):
    class Broken(family):
        def decode_image(self, latents):
            return super().decode_image(latents)[..., ::2, ::2]

    return Broken


@breaks(testing.check_prompt_shape, "has conditioning")
def padded_to_the_longest_caption(family):
    class Broken(family):
        def encode_prompt(self, captions):
            longest = max(len(caption.split()) for caption in captions)
            return super().encode_prompt(captions) | {"mask": torch.ones(len(captions), longest)}

    return Broken


@breaks(testing.check_prompt_batch, "depends on the others")
def mean_of_batch_in_prompts(family):
    class Broken(family):
        def encode_prompt(self, captions):
            words = super().encode_prompt(captions)["words"]
            return {"words": words + words.mean(0)}

    return Broken


@breaks(testing.check_identities, "prompt_identity does not see text_encoder")
def identity_that_forgets_the_weights(family):
    class Broken(family):
        def prompt_identity(self):
            return "words"

    return Broken


@breaks(testing.check_encoders_load_alone, "prompt_identity is another without the denoiser")
def identity_of_the_whole_pipeline(family):
    class Broken(family):
        def prompt_identity(self):
            return f"{super().prompt_identity()} {self.part('denoiser').proj_in.weight.device}"

    return Broken


@breaks(testing.check_predict_shape, "-> prediction")
def prediction_with_the_variance(family):
    class Broken(family):
        def predict(self, noisy, t, cond, batch):
            return super().predict(noisy, t, cond, batch).repeat(1, 2, 1, 1)

    return Broken


@breaks(testing.check_predict_depends, "ignores the conditioning")
def denoiser_without_words(family):
    class Broken(family):
        def predict(self, noisy, t, cond, batch):
            return super().predict(noisy, t, {"words": 0 * cond["words"]}, batch)

    return Broken


@breaks(testing.check_predict_batch, "depends on the second")
def mean_of_batch_in_predictions(family):
    class Broken(family):
        def predict(self, noisy, t, cond, batch):
            return super().predict(noisy - noisy.mean(), t, cond, batch)

    return Broken


@breaks(testing.check_gradient_checkpointing, "with gradient_checkpointing")
def checkpointing_that_cuts_the_gradient(family):
    class Broken(family):
        def predict(self, noisy, t, cond, batch):
            if self.gradient_checkpointing:
                cond = {"words": cond["words"].detach()}
            return super().predict(noisy, t, cond, batch)

    return Broken


@breaks(testing.check_bf16, "dtype")
def denoiser_that_is_given_float32(family):
    class Broken(family):
        def predict(self, noisy, t, cond, batch):
            return self.pipeline.transformer(noisy, t, cond["words"])

    return Broken


class Schedule:
    """The family's own, to be broken."""

    def __init__(self, own):
        self.prediction, self.sample, self.share = own.prediction, own.sample, own.share
        self.add, self.target, self.snr = own.add, own.target, own.snr


@breaks(testing.check_noise_recoverable, "cannot be told")
def target_that_is_the_input(family):
    class Broken(family):
        def make_noise(self):
            schedule = Schedule(super().make_noise())
            schedule.target = schedule.add
            return schedule

    return Broken


@breaks(testing.check_noise_snr, "snr is off by")
def snr_without_its_square(family):
    class Broken(family):
        def make_noise(self):
            schedule, own = Schedule(super().make_noise()), super().make_noise()
            schedule.snr = lambda t: own.snr(t).sqrt()
            return schedule

    return Broken


@breaks(testing.check_noise_shares, "must not look at noise.min_timestep")
def range_that_is_applied_twice(family):
    class Broken(family):
        def make_noise(self):
            schedule, own, low = Schedule(super().make_noise()), super().make_noise(), self.noise_options.min_timestep
            schedule.sample = lambda u: own.sample(low + (1 - low) * u)
            return schedule

    return Broken


@breaks(testing.check_loss, "weights do not multiply")
def loss_without_weights(family):
    class Broken(family):
        def losses(self, batch, *, u, stream):
            return super().losses(batch._replace(weight=torch.ones_like(batch.weight)), u=u, stream=stream)

    return Broken


@breaks(testing.check_gradients, "no gradient reaches text_encoder")
def prompts_without_gradient(family):
    class Broken(family):
        @torch.no_grad()
        def encode_prompt(self, captions):
            return super().encode_prompt(captions)

    return Broken


@breaks(testing.check_state_dict, "frozen weights")
def checkpoint_of_everything(family):
    class Broken(family):
        def state_dict(self, *args, **kwargs):
            return nn.Module.state_dict(self, *args, **kwargs)

    return Broken


@breaks(testing.check_lora_file, "layers")
def export_of_the_denoiser_alone(family):
    class Broken(family):
        def export(self, path):
            del self.trained["text_encoder"]
            return super().export(path)

    return Broken


@breaks(testing.check_skeleton_shapes, "other weights than build_skeleton plans")
def skeleton_of_another_size(family):
    class Broken(family):
        def load_skeleton(self):
            pipeline = super().load_skeleton()
            pipeline.transformer.proj_out = nn.Linear(128, 24, device="meta")
            return pipeline

    return Broken


@breaks(testing.check_skeleton_runs, "meta")
def prompts_always_on_the_cpu(family):
    class Broken(family):
        def encode_prompt(self, captions):
            return {"words": super().encode_prompt(captions)["words"].to("meta"), "count": torch.ones(len(captions))}

        def predict(self, noisy, t, cond, batch):
            return super().predict(noisy, t, cond, batch) * cond["count"].reshape(-1, 1, 1, 1)

    return Broken


@breaks(testing.check_draw, "two seeds draw one picture")
def pictures_of_one_seed(family):
    class Broken(family):
        def draw(self, prompts, seeds, **options):
            return super().draw(prompts, [0] * len(seeds), **options)

    return Broken
