"""Noise schedules against published numbers and diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from otl import noise

SD = noise.alpha_bars(noise.betas("scaled_linear", 0.00085, 0.012, 1000))


@pytest.mark.parametrize(
    ("t", "bar", "snr"), [(0, 0.99915, 1175.47), (100, 0.89422348, 8.45389), (999, 0.0046601, 0.00468192)]
)
def test_the_schedule_of_stable_diffusion(t, bar, snr):
    """From the closed form in float64."""
    assert float(SD[t]) == pytest.approx(bar, rel=1e-5)
    assert float(noise.Discrete(SD).snr(torch.tensor([t]))[0]) == pytest.approx(snr, rel=1e-4)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_betas_agree_with_diffusers(schedule):
    theirs = DDPMScheduler(beta_schedule=schedule, beta_start=0.0001, beta_end=0.02).betas
    torch.testing.assert_close(noise.betas(schedule, 0.0001, 0.02, 1000).float(), theirs, rtol=1e-4, atol=1e-7)


def test_with_zero_terminal_snr_the_last_step_is_pure_noise_and_the_first_stays():
    bars = noise.zero_terminal_snr(SD)
    assert float(bars[-1]) == 0
    assert float(bars[0]) == pytest.approx(float(SD[0]), rel=1e-12)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noising_and_targets_agree_with_diffusers(prediction, zero_snr):
    theirs = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, rescale_betas_zero_snr=zero_snr
    )
    ours = noise.Discrete.from_scheduler(theirs.config, prediction=prediction)
    latents, drawn, t = torch.randn(4, 4, 3, 5), torch.randn(4, 4, 3, 5), torch.tensor([0, 100, 500, 999])
    torch.testing.assert_close(ours.add(latents, drawn, t), theirs.add_noise(latents, drawn, t), atol=1e-5, rtol=1e-5)
    expected = drawn if prediction == "epsilon" else theirs.get_velocity(latents, drawn, t)
    torch.testing.assert_close(ours.target(latents, drawn, t), expected, atol=1e-5, rtol=1e-5)


def test_timesteps_cover_the_schedule_evenly():
    t = noise.Discrete(SD).sample(torch.arange(1000, dtype=torch.float64) / 1000 + 0.0005)
    assert t.tolist() == list(range(1000))


def test_timesteps_stay_in_the_chosen_range():
    t = noise.Discrete(SD, low=0.2, high=0.5).sample(torch.linspace(0, 1 - 1e-9, 5000, dtype=torch.float64))
    assert (int(t.min()), int(t.max())) == (200, 499)


def test_offset_noise_is_the_same_for_all_pixels_of_a_channel():
    per_channel = torch.randn(2, 4)
    added = noise.shaped(torch.zeros(2, 4, 3, 3), per_channel, offset=0.1)
    torch.testing.assert_close(added, 0.1 * per_channel[..., None, None].expand(2, 4, 3, 3))


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        noise.Discrete(SD, "eps")
