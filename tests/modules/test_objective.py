"""The settings of loss and noise in a real module: each has an effect, and what makes no sense is refused."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from otl import loss, noise, rng
from otl.config import (
    HuberSchedule,
    Loss,
    LossMix,
    LossType,
    LossWeight,
    NoiseOptions,
    SettingsError,
    TimestepDistribution,
)
from otl.modules.stable_diffusion import StableDiffusion
from otl.types import Batch
from tests.commands import ROOT

KEYS = torch.tensor([5, 6])
HUBER = {"type": LossType.huber}
LATENTS, WHITE = (torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
MASK = torch.zeros(2, 1, 16, 24)
MASK[0, :, :4] = 1


def batch(**changes: Any) -> Batch:
    sides = torch.tensor([[16, 24]] * 2)
    known = Batch(torch.arange(2), KEYS, ["a cat", "a dog"], sides, 0 * sides, sides, torch.ones(2), latents=LATENTS)
    return known._replace(**({"noise": WHITE, "cond": {"hidden": torch.ones(2, 77, 32)}} | changes))


@pytest.fixture(scope="module")
def module(sd15_folder):
    """A tiny SD1.5; `losses` below gives it other settings."""
    module = StableDiffusion(str(sd15_folder))
    module.configure_model()
    return module


def losses(
    module, *, loss_options=None, noise_options=None, stream="noise", u=(0.3, 0.7), of=None, **changes
) -> torch.Tensor:
    module.loss_options, module.noise_options = loss_options or Loss(), noise_options or NoiseOptions()
    module.loss_options.masked, masked = False, module.loss_options.masked
    module.prepare()
    module.loss_options.masked = masked
    with torch.no_grad():
        return module.losses(of or batch(**changes), u=torch.tensor(u, dtype=torch.float64), stream=stream)


LOSSES = [
    {"type": LossType.mae},
    {"type": LossType.log_cosh},
    HUBER,
    HUBER | {"huber_delta": 0.2},
    HUBER | {"huber_schedule": HuberSchedule.snr},
    HUBER | {"huber_schedule": HuberSchedule.exponential},
    HUBER | {"huber_schedule": HuberSchedule.snr, "huber_delta": 0.3},
    {"mix": LossMix(mse=0.5)},
    {"mix": LossMix(mse=1.0, mae=0.1)},
    {"weight": LossWeight.min_snr, "gamma": 0.2},
    {"weight": LossWeight.p2},
    {"weight": LossWeight.p2, "gamma": 0.5},
    {"weight": LossWeight.debiased},
    {"masked": True},
    {"masked": True, "unmasked_weight": 0.5},
    {"masked": True, "unmasked_probability": 0.6},
    {"masked": True, "normalize_masked_area": True},
]
NOISES = [
    {"offset": 0.2},
    {"offset": 0.2, "offset_random_strength": True},
    {"offset": 0.2, "offset_generalized": True},
    {"multires_iterations": 4},
    {"multires_iterations": 2},
    {"multires_iterations": 4, "multires_discount": 0.6},
    {"perturbation": 0.2},
    {"timesteps": TimestepDistribution.logit_normal},
    {"timesteps": TimestepDistribution.logit_normal, "logit_mean": 1.0},
    {"timesteps": TimestepDistribution.logit_normal, "logit_std": 2.0},
    {"timesteps": TimestepDistribution.heavy_tail},
    {"timesteps": TimestepDistribution.heavy_tail, "mode_scale": 0.5},
    {"timesteps": TimestepDistribution.beta},
    {"timesteps": TimestepDistribution.beta, "beta_alpha": 5.0},
    {"timesteps": TimestepDistribution.beta, "beta_beta": 5.0},
    {"shift": 3.0},
    {"min_timestep": 0.5},
    {"max_timestep": 0.5},
]


def test_every_setting_has_an_effect_of_its_own(module):
    seen = {"default": losses(module, mask=MASK)}
    seen |= {f"loss {given}": losses(module, loss_options=Loss(**given), mask=MASK) for given in LOSSES}
    seen |= {f"noise {given}": losses(module, noise_options=NoiseOptions(**given)) for given in NOISES}
    names = list(seen)
    for i, name in enumerate(names):
        assert seen[name].isfinite().all()
        for other in names[:i]:
            assert not torch.allclose(seen[name], seen[other], rtol=1e-5, atol=0), f"{name} is {other}"


def test_every_field_is_among_them():
    tried = {name for given in LOSSES for name in given} | {name for given in NOISES for name in given}
    assert tried == {field.name for kind in (Loss, NoiseOptions) for field in dataclasses.fields(kind)}


def predicted(module, t, drawn, perturbed=None):
    """The network's prediction, and what it should be, by hand."""
    bars = module.noise_schedule.alpha_bars[t].reshape(-1, 1, 1, 1).float()
    noisy = bars.sqrt() * LATENTS + (1 - bars).sqrt() * (drawn if perturbed is None else perturbed)
    with torch.no_grad():
        return module.pipeline.unet(noisy, t, encoder_hidden_states=torch.ones(2, 77, 32)).sample


def test_the_loss_by_hand(module):
    """A mixture with scheduled huber, min-SNR and the images' own weights, at t = 300 and 700."""
    options = Loss(
        mix=LossMix(mse=0.7, huber=0.3),
        huber_schedule=HuberSchedule.exponential,
        huber_delta=0.2,
        weight=LossWeight.min_snr,
        gamma=1.0,
    )
    got = losses(module, loss_options=options, u=(0.3, 0.7), weight=torch.tensor([1.0, 3.0]))
    t = torch.tensor([300, 700])
    difference = (predicted(module, t, WHITE) - WHITE).double().abs()
    snr = module.noise_schedule.alpha_bars[t] / (1 - module.noise_schedule.alpha_bars[t])
    for i, delta in enumerate((0.2**0.3, 0.2**0.7)):
        d = difference[i]
        huber = torch.where(d <= delta, 0.5 * d**2, delta * (d - 0.5 * delta))
        expected = (0.7 * d**2 + 0.3 * huber).mean() * min(float(snr[i]), 1.0) / snr[i] * (1.0, 3.0)[i]
        assert got[i].item() == pytest.approx(float(expected), rel=1e-4)


def test_the_target_has_the_offset_and_not_the_perturbation(module):
    t = torch.tensor([300, 700])
    got = losses(module, noise_options=NoiseOptions(offset=0.2, perturbation=0.3))
    drawn = WHITE + noise.offset(KEYS, 4, "noise", strength=0.2)
    perturbed = noise.perturbed(drawn, KEYS, "noise", 0.3)
    expected = (predicted(module, t, drawn, perturbed) - drawn).square().mean((1, 2, 3))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_generalized_offset_is_weaker_at_small_timesteps(module):
    t = torch.tensor([300, 700])
    got = losses(module, noise_options=NoiseOptions(offset=0.2, offset_generalized=True))
    bars = module.noise_schedule.alpha_bars
    sigma = ((1 - bars) / bars).sqrt()
    scale = (sigma[t] / sigma[-1]).float().reshape(2, 1, 1, 1)
    drawn = WHITE + scale * noise.offset(KEYS, 4, "noise", strength=0.2)
    expected = (predicted(module, t, drawn) - drawn).square().mean((1, 2, 3))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_what_lies_outside_of_the_mask_does_not_count(module):
    options = Loss(masked=True, unmasked_weight=0.0)
    got = losses(module, loss_options=options, mask=MASK)
    difference = (predicted(module, torch.tensor([300, 700]), WHITE) - WHITE).square()
    torch.testing.assert_close(got[0], difference[0, :, :2].mean() / 4, rtol=1e-4, atol=1e-6)
    assert got[1] == 0  # its mask is empty


def test_a_share_of_the_draws_is_trained_without_its_mask_and_validated_with_it(module):
    options = Loss(masked=True, unmasked_weight=0.0, unmasked_probability=0.3)
    module.loss_options = options
    keys = torch.arange(1000)
    many = batch(key=keys, mask=torch.zeros(1000, 1, 8, 12))
    weights = module.position_weights(many, LATENTS)
    whole = weights[:, 0, 0, 0] == 1
    assert torch.equal(weights, whole.float().reshape(-1, 1, 1, 1).expand_as(weights))
    assert 0.25 < whole.float().mean() < 0.35
    rest = module.position_weights(many._replace(key=keys[500:], mask=many.mask[500:]), LATENTS)
    assert torch.equal(weights[500:], rest)
    module.eval()
    assert not module.position_weights(many, LATENTS).any()
    module.train()


EVERYTHING = NoiseOptions(
    offset=0.1,
    offset_random_strength=True,
    offset_generalized=True,
    multires_iterations=4,
    perturbation=0.1,
    timesteps=TimestepDistribution.beta,
    shift=2.0,
)


def test_a_sample_has_the_same_loss_in_any_batch_and_after_any_other(module):
    u = rng.uniforms(KEYS, "timestep").tolist()
    both = losses(module, noise_options=EVERYTHING, u=u)
    one = batch(cond={"hidden": torch.ones(1, 77, 32)})._replace(
        index=torch.tensor([1]),
        key=KEYS[1:],
        captions=["a dog"],
        weight=torch.ones(1),
        latents=LATENTS[1:],
        noise=WHITE[1:],
    )
    torch.manual_seed(123)
    alone = losses(module, noise_options=EVERYTHING, u=u[1:], of=one)
    torch.testing.assert_close(both[1:], alone, rtol=1e-5, atol=0)
    assert torch.equal(both, losses(module, noise_options=EVERYTHING, u=u))


def test_the_loader_and_the_module_draw_the_same_noise(module):
    """Nothing cached: the module draws it by itself."""
    drawn = rng.normals(KEYS, (4, 8, 12), "noise")
    cached = losses(module, noise_options=EVERYTHING, noise=drawn)
    assert torch.equal(cached, losses(module, noise_options=EVERYTHING, noise=None))


def test_each_stream_draws_its_own(module):
    for given in ({"offset": 0.2}, {"perturbation": 0.2}, {"multires_iterations": 4}):
        options = NoiseOptions(**given)
        plain = [losses(module, stream=stream, noise=None) for stream in ("val0", "val1")]
        mine = [losses(module, stream=stream, noise=None, noise_options=options) for stream in ("val0", "val1")]
        assert not torch.allclose(mine[0] / plain[0], mine[1] / plain[1], rtol=1e-4)


def test_options_that_are_off_make_nothing(module, monkeypatch):
    """No draw, no ratio, no weight: the base noise is what the network is given."""

    def never(*_, **__):
        raise AssertionError("nothing was asked for")

    for name in ("offset", "multires", "normalized", "offset_scale"):
        monkeypatch.setattr(noise, name, never)
    monkeypatch.setattr(rng, "normals", never)
    monkeypatch.setattr(loss, "snr_weight", never)
    monkeypatch.setattr(module.noise_schedule.__class__, "snr", never)
    assert losses(module).isfinite().all()


def test_validation_is_spread_over_the_distribution(module):
    """Its evenly spaced numbers become the quantiles of what is trained."""
    module.noise_options = NoiseOptions(
        timesteps=TimestepDistribution.logit_normal, logit_mean=0.5, min_timestep=0.1, max_timestep=0.9
    )
    module.prepare()
    quarters = module.noise_schedule.sample(module.timesteps(torch.tensor([0.125, 0.375, 0.625, 0.875])))
    z = torch.tensor([-1.1503493804, -0.3186393640, 0.3186393640, 1.1503493804])  # the normal distribution's
    assert quarters.tolist() == [int(1000 * (0.1 + 0.8 * each)) for each in torch.sigmoid(0.5 + z).tolist()]


def test_the_validation_loss_is_the_mean_over_strata_of_the_timesteps_each_at_noise_of_its_own(module, monkeypatch):
    """By hand, at the middle of each quarter of 1000 timesteps; and the same again where nothing has changed.

    The third batch is only there because another rank has one, and does not count.
    """
    data = SimpleNamespace(fills=lambda number: number == 2)
    monkeypatch.setattr(module, "_trainer", SimpleNamespace(datamodule=data))
    losses(module)  # with the settings' own loss and noise
    module.on_validation_epoch_start()
    with torch.no_grad():
        for number in range(3):
            module.validation_step(batch(noise=None), number)
    drawn = {t: rng.normals(KEYS, (4, 8, 12), f"val{k}") for k, t in enumerate((125, 375, 625, 875))}
    squares = [(predicted(module, torch.tensor([t, t]), noise) - noise) ** 2 for t, noise in drawn.items()]
    expected = torch.stack(squares).mean((0, 2, 3, 4)).sum().item()
    assert module.validated.tolist() == pytest.approx([2 * expected, 4], rel=1e-5)


@pytest.fixture
def flow(monkeypatch):
    """The plugin's family, which predicts a flow."""
    monkeypatch.syspath_prepend(ROOT / "plugins" / "otl-example")
    from otl_example.family import Example

    return Example()


@pytest.mark.parametrize("weight", ["min_snr", "debiased", "p2"])
def test_weights_by_snr_are_refused_for_a_flow_before_weights_are_loaded(flow, weight):
    flow.loss_options = Loss(weight=LossWeight[weight])
    with pytest.raises(SettingsError, match=rf"loss\.weight={weight}: .*flow.*loss\.weight=sigma"):
        flow.build_skeleton()


def test_generalized_offset_is_refused_for_a_flow(flow):
    flow.noise_options = NoiseOptions(offset=0.1, offset_generalized=True)
    with pytest.raises(SettingsError, match=r"noise\.offset_generalized=true"):
        flow.build_skeleton()


def test_a_flow_is_weighted_by_sigma_and_its_delta_follows_the_snr(flow):
    flow.configure_model()
    flow.noise_options.offset = 0.1
    t = flow.noise_schedule.sample(torch.tensor([0.25, 0.5]))
    torch.testing.assert_close(loss.timestep_weight(Loss(weight=LossWeight.sigma), flow.noise_schedule, t), t.double())
    options = Loss(type=LossType.huber, huber_schedule=HuberSchedule.snr)
    expected = 0.1 + 0.9 * (1 - t.double()) ** 2  # 1 + sigma is 1 / (1 - t)
    torch.testing.assert_close(loss.huber_delta(options, flow.noise_schedule, t), expected)


def test_sigma_is_refused_for_a_plain_checkpoint_before_weights_are_loaded(sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    module.loss_options = Loss(weight=LossWeight.sigma)
    with pytest.raises(SettingsError, match=r"loss\.weight=sigma: .*epsilon"):
        module.build_skeleton()


def test_generalized_offset_is_refused_with_zero_terminal_snr(sd15_folder):
    module = StableDiffusion(str(sd15_folder), prediction="v_prediction", zero_terminal_snr=True)
    module.noise_options = NoiseOptions(offset=0.1, offset_generalized=True)
    with pytest.raises(SettingsError, match="zero terminal SNR"):
        module.build_skeleton()
