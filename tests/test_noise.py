"""Noise schedules against published numbers and diffusers' own schedulers."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from otl import noise, rng
from otl.config import NoiseOptions, SettingsError

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


def test_the_share_of_a_timestep_is_where_it_was_drawn():
    schedule = noise.Discrete(SD)
    u = torch.linspace(0, 1, 777, dtype=torch.float64)
    share = schedule.share(schedule.sample(u))
    assert share[0] == 0
    assert ((u - share >= 0) & (u - share <= 1 / 1000 + 1e-12)).all()


KEYS = torch.arange(2000)


def test_offset_noise_is_normal_of_its_strength_for_each_image_and_channel():
    drawn = noise.offset(KEYS, 4, "noise", strength=0.1)
    assert drawn.shape == (2000, 4, 1, 1)
    assert drawn.mean().abs() < 4 * 0.1 / 8000**0.5
    assert drawn.std().item() == pytest.approx(0.1, rel=0.05)
    assert drawn.flatten(1).T.corrcoef().fill_diagonal_(0).abs().max() < 0.1


def test_a_random_strength_is_uniform_and_one_for_each_image():
    ratio = noise.offset(KEYS, 4, "noise", strength=0.1, random_strength=True) / noise.offset(
        KEYS, 4, "noise", strength=0.1
    )
    torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
    ranked = ratio[:, 0].flatten().sort().values
    assert (ranked - torch.linspace(0, 1, 2000)).abs().max() < 0.04  # Kolmogorov's 1.6 / sqrt(2000)


def psi(betas):
    """The recursion of algorithm 1 in https://arxiv.org/abs/2412.03134: gammas, then the offset of each step.

    With x_t = sqrt(alpha_t) (x_t-1 + gamma_t xi) + ..., the offset in units of the noise's size adds up to
    sqrt(alpha_bar_t) sum(gamma_i / sqrt(alpha_bar_i-1)) / sqrt(1 - alpha_bar_t).
    """
    total, bar, offsets = 0.0, 1.0, []
    for beta in betas.tolist():
        alpha = 1 - beta
        gamma = beta * bar**0.5 * total / (alpha * (1 - bar)) if offsets else 1.0
        total += gamma / bar**0.5
        bar *= alpha
        offsets.append(bar**0.5 * total / (1 - bar) ** 0.5)
    return torch.tensor(offsets, dtype=torch.float64) / offsets[-1]


def test_generalized_offset_follows_the_recursion_of_the_paper():
    schedule = noise.Discrete(SD)
    last = noise.last_snr(schedule)
    got = noise.offset_scale(schedule.snr(torch.arange(1000)), last)
    torch.testing.assert_close(got, psi(noise.betas("scaled_linear", 0.00085, 0.012, 1000)))


def test_generalized_offset_is_balanced():
    """The offset of the reverse step's noise is that of the noisy latents: what the recursion was made for."""
    alphas = SD / torch.cat([torch.ones(1, dtype=torch.float64), SD[:-1]])
    before = torch.cat([torch.ones(1, dtype=torch.float64), SD[:-1]])
    scale = noise.offset_scale(SD / (1 - SD), float(SD[-1] / (1 - SD[-1])))
    sums = scale * ((1 - SD) / SD).sqrt()
    gammas = sums.diff() * before[1:].sqrt()
    reverse = gammas * (alphas[1:] * (1 - SD[1:])).sqrt() / (1 - alphas[1:])
    torch.testing.assert_close(reverse, scale[1:])


def test_generalized_offset_is_refused_where_the_last_step_is_pure_noise():
    with pytest.raises(SettingsError, match=r"noise\.offset_generalized=true: .*zero terminal SNR"):
        noise.last_snr(noise.Discrete(noise.zero_terminal_snr(SD)))


def coarser(keys=KEYS[:8], shape=(4, 32, 24), stream="noise", iterations=6, discount=0.3):
    return noise.multires(keys, shape, stream, iterations=iterations, discount=discount)


def test_each_level_is_weaker_by_the_discount():
    """Two levels are linear in it, three are a polynomial of second degree without a constant."""
    torch.testing.assert_close(coarser(iterations=2, discount=0.6), 2 * coarser(iterations=2, discount=0.3))
    second = coarser(iterations=3, discount=0.4) - coarser(iterations=2, discount=0.4)
    torch.testing.assert_close(coarser(iterations=3, discount=0.8) - coarser(iterations=2, discount=0.8), 4 * second)
    assert second.abs().max() > 0


def test_levels_are_2_to_4_times_coarser():
    """Bilinear steps between the numbers of a level are straight lines: bends are as rare as its pixels."""
    level = coarser(shape=(1, 4, 256), iterations=2).double()
    bends = (level.diff(n=2).abs() > 1e-5 * level.abs().max()).double().mean(dim=(1, 2, 3))
    assert ((bends > 1 / 4.2) & (bends <= 1)).all()
    neighbours = (level[..., 1:] * level[..., :-1]).mean() / level.square().mean()
    assert neighbours > 0.6


def test_levels_end_at_one_pixel():
    assert torch.equal(coarser(iterations=30, discount=1.0), coarser(iterations=31, discount=1.0))
    assert not torch.equal(coarser(iterations=2), coarser(iterations=3))


def test_multires_noise_has_a_deviation_of_1_and_more_of_the_low_frequencies():
    white = rng.normals(KEYS[:200], (4, 32, 24), "noise")
    got = noise.normalized(white, coarser(KEYS[:200], discount=0.6))
    torch.testing.assert_close(got.flatten(1).std(1), torch.ones(200))
    means = got.mean(dim=(2, 3)).square().mean().item()
    assert means > 3 / (32 * 24)  # of white noise: 1 / (32 * 24)
    expected = 2**0.5 * white + coarser(KEYS[:200], discount=0.6)
    torch.testing.assert_close(got * expected.flatten(1).std(1).reshape(-1, 1, 1, 1), expected)


DRAWS = {
    "offset": lambda keys, stream: noise.offset(keys, 4, stream, strength=0.1),
    "random strength": lambda keys, stream: noise.offset(keys, 4, stream, strength=0.1, random_strength=True),
    "multires": lambda keys, stream: coarser(keys, stream=stream),
    "perturbation": lambda keys, stream: noise.perturbed(torch.zeros(len(keys), 4, 3, 3), keys, stream, 0.1),
}


@pytest.mark.parametrize("name", DRAWS)
def test_what_is_drawn_is_a_function_of_key_and_stream(name):
    draw = DRAWS[name]
    both, alone = draw(torch.tensor([3, 8]), "noise"), draw(torch.tensor([8]), "noise")
    assert torch.equal(both[1:], alone)
    assert not torch.equal(both[:1], alone)
    assert not torch.equal(draw(torch.tensor([8]), "val0"), alone)


def test_draws_of_one_key_and_stream_are_independent():
    """Of one another, and of the noise itself."""
    white = rng.normals(KEYS, (1, 1, 1), "noise").flatten()
    options = [
        noise.offset(KEYS, 1, "noise", strength=1.0).flatten(),
        noise.perturbed(torch.zeros(2000, 1, 1, 1), KEYS, "noise", 1.0).flatten(),
        noise.multires(KEYS, (1, 2, 2), "noise", iterations=2, discount=1.0)[:, 0, 0, 0],
    ]
    assert torch.stack([white, *options]).corrcoef().fill_diagonal_(0).abs().max() < 0.1


def test_noise_without_options_is_the_same_tensor():
    drawn = torch.randn(2, 4, 3, 3)
    assert noise.shaped(drawn, KEYS[:2], "noise", NoiseOptions(), None) is drawn
    assert noise.perturbed(drawn, KEYS[:2], "noise", 0.0) is drawn


def test_the_settings_shape_the_noise():
    drawn, scale = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 0.5], dtype=torch.float64)
    options = NoiseOptions(offset=0.2, offset_random_strength=True, multires_iterations=4, multires_discount=0.5)
    expected = noise.normalized(drawn, coarser(KEYS[:2], (4, 8, 8), iterations=4, discount=0.5))
    expected = expected + scale.reshape(2, 1, 1, 1) * noise.offset(
        KEYS[:2], 4, "noise", strength=0.2, random_strength=True
    )
    got = noise.shaped(drawn, KEYS[:2], "noise", options, scale)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected.float())


def test_perturbation_is_white_noise_of_its_strength():
    added = noise.perturbed(torch.ones(200, 4, 8, 8), KEYS[:200], "noise", 0.1) - 1
    assert added.std().item() == pytest.approx(0.1, rel=0.02)
    assert added.mean().abs() < 0.002


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match="epsilon, v_prediction, sample"):
        noise.Discrete(SD, "eps")
