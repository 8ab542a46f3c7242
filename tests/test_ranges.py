"""What of the loss, the noise and the method makes no sense is refused, with what it would need."""

from __future__ import annotations

import pytest

from otl.check import check

HUBER = "loss.type=huber"
HELD_OUT = "data.validation_share=0.1"


def found(settings, *lines: str) -> dict[str, str]:
    """Key -> message of what is wrong with the loss, the noise, the method and the trainer."""
    groups = {"loss", "noise", "method", "trainer"}
    return {each.key: each.message for each in check(settings(*lines)) if each.key.split(".")[0] in groups}


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["loss.mix.mse=0.7", "loss.mix.mae=0.3"],
        ["loss.mix={mse: 0.7, mae: 0.3}"],
        ["loss.mix.huber=1", "loss.huber_delta=0.5", "loss.huber_schedule=snr"],
        [HUBER, "loss.huber_delta=1"],
        [HUBER, "loss.huber_delta=0.1", "loss.huber_schedule=exponential"],
        ["loss.weight=min_snr", "loss.gamma=3"],
        ["loss.weight=p2", "loss.gamma=0.5"],
        ["loss.masked=true", "loss.unmasked_weight=0", "loss.normalize_masked_area=true"],
        ["noise.offset=0.1", "noise.offset_random_strength=true", "noise.offset_generalized=true"],
        ["noise.multires_iterations=6", "noise.multires_discount=0.2"],
        ["noise.timesteps=logit_normal", "noise.logit_mean=-1", "noise.logit_std=0.5"],
        ["noise.timesteps=heavy_tail", "noise.mode_scale=-1"],
        ["noise.timesteps=beta", "noise.beta_alpha=0.5", "noise.beta_beta=3"],
        ["noise.shift=3", "noise.max_timestep=0.8", "noise.perturbation=0.1"],
    ],
)
def test_what_makes_sense_is_accepted(settings, lines):
    assert found(settings, *lines) == {}


@pytest.mark.parametrize(
    ("line", "needs"),
    [
        ("loss.huber_delta=0.5", "loss.type=huber"),
        ("loss.huber_schedule=snr", "loss.type=huber"),
        ("loss.gamma=5", "loss.weight=min_snr"),
        ("loss.unmasked_weight=0.5", "loss.masked=true"),
        ("loss.unmasked_probability=0.1", "loss.masked=true"),
        ("loss.normalize_masked_area=true", "loss.masked=true"),
        ("noise.offset_random_strength=true", "noise.offset above 0"),
        ("noise.offset_generalized=true", "noise.offset above 0"),
        ("noise.multires_discount=0.5", "noise.multires_iterations above 1"),
        ("noise.logit_mean=1", "noise.timesteps=logit_normal"),
        ("noise.logit_std=2", "noise.timesteps=logit_normal"),
        ("noise.mode_scale=1", "noise.timesteps=heavy_tail"),
        ("noise.beta_alpha=1", "noise.timesteps=beta"),
        ("noise.beta_beta=1", "noise.timesteps=beta"),
    ],
)
def test_a_parameter_of_something_that_is_off_is_refused(settings, line, needs):
    key, _, value = line.partition("=")
    problems = found(settings, line)
    assert list(problems) == [key]
    assert needs in problems[key]
    assert value in problems[key]


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        (["loss.mix.mse=1", "loss.type=mae"], "loss.type", "mae would have no effect"),
        (["loss.mix.mse=1", "loss.huber_delta=0.5"], "loss.huber_delta", "loss.mix.huber"),
        ([HUBER, "loss.huber_schedule=snr", "loss.huber_delta=1"], "loss.huber_delta", "lower it"),
        (["loss.weight=debiased", "loss.gamma=3"], "loss.gamma", "min_snr or p2"),
        (["loss.weight=constant", "loss.gamma=3"], "loss.gamma", "min_snr or p2"),
        (["noise.multires_iterations=1"], "noise.multires_iterations", "2 and more"),
        (["noise.timesteps=beta", "noise.mode_scale=1"], "noise.mode_scale", "heavy_tail"),
    ],
)
def test_combinations_that_make_no_sense_are_refused(settings, lines, key, message):
    problems = found(settings, *lines)
    assert list(problems) == [key]
    assert message in problems[key]


@pytest.mark.parametrize(
    ("lines", "key", "accepted"),
    [
        (["loss.mix.mse=-1"], "loss.mix.mse", "at least 0"),
        (["loss.masked=true", "loss.unmasked_weight=1.5"], "loss.unmasked_weight", "at most 1"),
        (["noise.multires_iterations=-1"], "noise.multires_iterations", "at least 0"),
        (["noise.multires_iterations=4", "noise.multires_discount=0"], "noise.multires_discount", "above 0"),
        (["noise.timesteps=logit_normal", "noise.logit_std=0"], "noise.logit_std", "above 0"),
        (["noise.timesteps=heavy_tail", "noise.mode_scale=2"], "noise.mode_scale", "at most 1.75"),
        (["noise.timesteps=heavy_tail", "noise.mode_scale=-1.5"], "noise.mode_scale", "at least -1"),
        (["noise.timesteps=beta", "noise.beta_alpha=0.01"], "noise.beta_alpha", "at least 0.1"),
        (["noise.timesteps=beta", "noise.beta_beta=200"], "noise.beta_beta", "at most 100"),
        (["noise.shift=0"], "noise.shift", "above 0"),
        (["++trainer.limit_train_batches=-1"], "trainer.limit_train_batches", "at least 0"),
        (["++trainer.max_time=12h"], "trainer.max_time", "00:12:00:00"),
        (["++trainer.max_time='00:00:00:00'"], "trainer.max_time", "00:12:00:00"),
        (["trainer.limit_val_batches=0.5", HELD_OUT], "trainer.limit_val_batches", "a whole number, at least 1"),
        (["+method.parts.denoiser.stop_after=3 epoch"], "method.parts.denoiser.stop_after", "epochs as in '1 epoch'"),
        (["+method.parts.denoiser.stop_after=0"], "method.parts.denoiser.stop_after", "1 epoch, 3 epochs"),
        (["+method.embeddings.cat.stop_after=1 epochs"], "method.embeddings.cat.stop_after", "and '3 epochs'"),
        (["+method.embeddings.cat.lr=3 epochs"], "method.embeddings.cat.lr", "is not a number"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, lines, key, accepted):
    problems = found(settings, *lines)
    assert list(problems) == [key]
    assert accepted in problems[key]


def test_a_duration_as_lightning_takes_it_is_accepted(settings):
    assert not found(settings, "++trainer.max_time='00:12:00:00'")
