"""What goes together of prediction, schedule, loss weight, noise and samplers."""

import json

import pytest

from otl import agreement
from otl.config import LossWeight, Sampler, SettingsError, TimestepSpacing, assets_dir

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def refused(text: str):
    return pytest.raises(SettingsError, match=text)


@pytest.mark.parametrize("weight", ["min_snr", "debiased", "p2"])
def test_weights_by_snr_are_refused_for_a_flow(weight):
    with refused(rf"loss\.weight={weight}: .*flow.*loss\.weight=constant"):
        agreement.require_weight(LossWeight[weight], "flow")
    agreement.require_weight(LossWeight[weight], "epsilon")


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_sigma_is_refused_without_a_flow(prediction):
    with refused(rf"loss\.weight=sigma: .*{prediction}.*min_snr"):
        agreement.require_weight(LossWeight.sigma, prediction)
    agreement.require_weight(LossWeight.sigma, "flow")


@pytest.mark.parametrize("prediction", [*PREDICTIONS, "flow"])
def test_constant_weights_go_with_everything(prediction):
    agreement.require_weight(LossWeight.constant, prediction)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_pure_noise_says_nothing_of_itself(prediction):
    agreement.require_prediction(prediction, PREDICTIONS, zero_snr=None, family="Any")
    if prediction != "epsilon":
        agreement.require_prediction(prediction, PREDICTIONS, zero_snr=True, family="Any")
        return
    with refused("model.zero_terminal_snr=true: .*add model.prediction=v_prediction"):
        agreement.require_prediction(prediction, PREDICTIONS, zero_snr=True, family="Any")


def test_a_family_learns_with_its_own_predictions():
    with refused("model.prediction=sample: Any learns with epsilon only"):
        agreement.require_prediction("sample", ("epsilon",), zero_snr=None, family="Any")


def test_generalized_offset_noise_needs_a_picture_at_the_end():
    agreement.require_offset(pure=False)
    with refused("noise.offset_generalized=true: "):
        agreement.require_offset(pure=True)


@pytest.mark.parametrize("given", [(Sampler.euler, None), (None, TimestepSpacing.trailing)])
def test_samplers_need_discrete_timesteps(given):
    with refused("has a noise schedule of its own"):
        agreement.require_sampler(*given, agreement.Schedule("epsilon", discrete=False, pure=False), family="Any")
    agreement.require_sampler(*given, agreement.Schedule("epsilon", discrete=True, pure=False), family="Any")


@pytest.mark.parametrize("sampler", [Sampler.dpmpp_2m, Sampler.unipc, "DPMSolverMultistepScheduler", "PNDMScheduler"])
def test_a_pipeline_that_reads_the_picture_of_a_single_step_needs_a_sampler_that_says_it(sampler):
    agreement.require_steps(2, sampler, timesteps=1000, alone=False, family="Any")
    agreement.require_steps(1, sampler, timesteps=1000, alone=True, family="Any")
    with refused("sample.steps=1: the stock pipeline of Any draws in a single step with ddim, ddpm, euler, euler_a"):
        agreement.require_steps(1, sampler, timesteps=1000, alone=False, family="Any")


@pytest.mark.parametrize("sampler", [Sampler.ddim, Sampler.euler_a, "EulerDiscreteScheduler", None])
def test_others_draw_in_a_single_step(sampler):
    agreement.require_steps(1, sampler, timesteps=1000, alone=False, family="Any")


def test_there_are_no_more_steps_than_timesteps():
    agreement.require_steps(1000, Sampler.ddim, timesteps=1000, alone=True, family="Any")
    agreement.require_steps(1001, None, timesteps=None, alone=True, family="Any")
    with refused("sample.steps=1001: the schedule has 1000 timesteps"):
        agreement.require_steps(1001, Sampler.ddim, timesteps=1000, alone=True, family="Any")


@pytest.mark.parametrize("precision", ["16-mixed", "16", "fp16", 16])
def test_a_prior_that_overflows_is_not_computed_in_fp16(precision):
    with refused(f"trainer.precision={precision}: "):
        agreement.require_no_fp16(precision)


@pytest.mark.parametrize("precision", ["auto", "bf16-mixed", "32-true", 32])
def test_it_is_computed_in_others(precision):
    agreement.require_no_fp16(precision)


def test_cascades_draw_with_decoders_in_steps_of_theirs():
    assert agreement.require_decoder("a/b") == "a/b"
    agreement.require_sides(1024, None, step=128)
    with refused("model.decoder: null"):
        agreement.require_decoder(None)
    with refused("sample.width=1000: "):
        agreement.require_sides(None, 1000, step=128)


@pytest.mark.parametrize(
    ("name", "value"), [("num_layers", 1001), ("num_attention_heads", 2**20 + 1), ("block_out_channels", [320, 2**21])]
)
def test_networks_have_no_more_than_any_network_has(name, value):
    with pytest.raises(SettingsError, match=rf"^model\.checkpoint=a/config\.json: asks for {name}="):
        agreement.require_size({name: value}, where="a/config.json")


def test_the_networks_that_ship_are_no_larger():
    configs = sorted((assets_dir() / "configs").glob("*/*/config.json"))
    assert len(configs) > 30
    for path in configs:
        agreement.require_size(json.loads(path.read_text(encoding="utf-8")), where=str(path))
