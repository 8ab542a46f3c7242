"""Losses against closed forms and published numbers."""

import math

import pytest
import torch

from otl import loss
from otl.config import HuberSchedule, Loss, LossMix, LossType, LossWeight
from otl.noise import Discrete

TYPES = ("mse", "mae", "huber", "log_cosh")


@pytest.mark.parametrize(
    ("type", "delta", "difference", "expected"),
    [
        ("mse", 1.0, 0.5, 0.25),
        ("mae", 1.0, 0.5, 0.5),
        ("log_cosh", 1.0, 0.5, math.log(math.cosh(0.5))),
        ("log_cosh", 1.0, 2.0, math.log(math.cosh(2.0))),
        ("huber", 1.0, 0.5, 0.125),
        ("huber", 0.1, 0.5, 0.1 * (0.5 - 0.05)),
        ("huber", 1.0, 2.0, 1.5),
    ],
)
def test_distances(type, delta, difference, expected):
    predicted = torch.zeros(2, 4, 3, 3)
    for target in (predicted + difference, predicted - difference):
        each = loss.distance(predicted, target, factors={type: 1.0}, huber_delta=delta)
        torch.testing.assert_close(each, torch.full((2,), expected))


def test_log_cosh_of_a_huge_difference_is_finite():
    each = loss.distance(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1e4), factors={"log_cosh": 1.0})
    assert each.item() == pytest.approx(1e4 - math.log(2))


def test_each_sample_has_its_own_loss():
    target = torch.stack([torch.zeros(4, 2, 2), torch.ones(4, 2, 2)])
    assert loss.distance(torch.zeros(2, 4, 2, 2), target, factors={"mse": 1.0}).tolist() == [0.0, 1.0]


def test_a_mixture_is_the_sum_of_its_parts_times_their_factors():
    got = loss.distance(torch.zeros(1, 4, 2, 2), torch.full((1, 4, 2, 2), 2.0), factors={"mse": 0.7, "mae": 0.3})
    assert got.item() == pytest.approx(0.7 * 4 + 0.3 * 2)


def test_every_sample_may_have_its_own_delta():
    difference = torch.linspace(-3, 3, 24).reshape(1, 4, 2, 3).repeat(3, 1, 1, 1)
    deltas = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)
    got = loss.distance(torch.zeros(3, 4, 2, 3), difference, factors={"huber": 1.0}, huber_delta=deltas)
    for mean, delta in zip(got, deltas.tolist(), strict=True):
        each = [0.5 * d * d if abs(d) <= delta else delta * (abs(d) - 0.5 * delta) for d in difference[0].flatten()]
        assert mean.item() == pytest.approx(float(sum(each)) / 24, rel=1e-5)


def test_the_gradient_of_a_scheduled_huber_is_the_difference_up_to_delta():
    predicted = torch.tensor([[0.05], [-3.0]]).reshape(2, 1, 1, 1).requires_grad_()
    target = torch.zeros(2, 1, 1, 1)
    loss.distance(predicted, target, factors={"huber": 1.0}, huber_delta=torch.tensor([0.1, 0.1])).sum().backward()
    torch.testing.assert_close(predicted.grad.flatten(), torch.tensor([0.05, -0.1]))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Loss(), {"mse": 1.0}),
        (Loss(type=LossType.log_cosh), {"log_cosh": 1.0}),
        (Loss(mix=LossMix(mse=0.7, mae=0.3)), {"mse": 0.7, "mae": 0.3}),
        (Loss(mix=LossMix(huber=2.0)), {"huber": 2.0}),
    ],
)
def test_the_settings_say_which_distances_count(options, expected):
    assert loss.factors(options) == expected


BARS = torch.tensor([0.9, 0.5, 0.2, 0.0], dtype=torch.float64)
SIGMAS = [math.sqrt(0.1 / 0.9), 1.0, 2.0, math.inf]
T = torch.arange(4)


@pytest.mark.parametrize(
    ("schedule", "delta", "expected"),
    [
        ("exponential", 0.3, [1.0, 0.3**0.25, 0.3**0.5, 0.3**0.75]),
        ("exponential", None, [1.0, 0.1**0.25, 0.1**0.5, 0.1**0.75]),
        ("snr", 0.3, [0.3 + 0.7 / (1 + sigma) ** 2 for sigma in SIGMAS]),
        ("snr", None, [0.1 + 0.9 / (1 + sigma) ** 2 for sigma in SIGMAS]),
    ],
)
def test_the_delta_falls_from_1_to_that_of_the_settings(schedule, delta, expected):
    options = Loss(type=LossType.huber, huber_schedule=HuberSchedule[schedule], huber_delta=delta)
    got = loss.huber_delta(options, Discrete(BARS), T)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))


def test_a_constant_delta_is_a_number():
    assert loss.huber_delta(Loss(), Discrete(BARS), T) == 1.0
    assert loss.huber_delta(Loss(huber_delta=0.2), Discrete(BARS), T) == 0.2


SNR = torch.tensor([1175.47, 8.45389, 0.38185, 0.00468192], dtype=torch.float64)


@pytest.mark.parametrize(
    ("weight", "gamma", "prediction", "expected"),
    [
        ("min_snr", 5.0, "epsilon", [5 / 1175.47, 5 / 8.45389, 1.0, 1.0]),
        ("min_snr", 5.0, "v_prediction", [5 / 1176.47, 5 / 9.45389, 0.38185 / 1.38185, 0.00468192 / 1.00468192]),
        ("min_snr", 5.0, "sample", [5.0, 5.0, 0.38185, 0.00468192]),
        ("min_snr", 1.0, "epsilon", [1 / 1175.47, 1 / 8.45389, 1.0, 1.0]),
        ("debiased", 5.0, "epsilon", [1000**-0.5, 8.45389**-0.5, 0.38185**-0.5, 0.00468192**-0.5]),
        ("debiased", 5.0, "v_prediction", [1001**-0.5, 9.45389**-0.5, 1.38185**-0.5, 1.00468192**-0.5]),
        ("debiased", 5.0, "sample", [1000**0.5, 8.45389**0.5, 0.38185**0.5, 0.00468192**0.5]),
        ("p2", 1.0, "epsilon", [1 / 1176.47, 1 / 9.45389, 1 / 1.38185, 1 / 1.00468192]),
        ("p2", 0.5, "epsilon", [1176.47**-0.5, 9.45389**-0.5, 1.38185**-0.5, 1.00468192**-0.5]),
        ("p2", 1.0, "v_prediction", [1 / 1177.47, 1 / 10.45389, 1 / 2.38185, 1 / 2.00468192]),
        ("p2", 1.0, "sample", [1175.47 / 1176.47, 8.45389 / 9.45389, 0.38185 / 1.38185, 0.00468192 / 1.00468192]),
    ],
)
def test_weights_by_their_formulas(weight, gamma, prediction, expected):
    got = loss.snr_weight(SNR, weight=weight, gamma=gamma, prediction=prediction)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", ["min_snr", "debiased", "p2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_are_finite_and_monotonous_from_pure_noise_to_the_picture(weight, prediction):
    snr = torch.tensor([0.0, 1e-9, 1e-3, 0.1, 1.0, 4.9, 10.0, 1e3, 1e9], dtype=torch.float64)
    got = loss.snr_weight(snr, weight=weight, gamma=1.0, prediction=prediction)
    assert torch.isfinite(got).all()
    assert (got >= 0).all()
    steps = got.diff()
    if prediction == "sample":
        assert (steps >= 0).all()
    elif (weight, prediction) == ("min_snr", "v_prediction"):
        assert (got[0], got[4]) == (0, 0.5)  # highest where min(snr, 1) / (snr + 1) is
        assert got.argmax() == 4
    else:
        assert (steps <= 0).all()


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_sigma_weights_are_the_share_of_noise_of_a_flow(sigma):
    snr = torch.tensor([(1 - sigma) ** 2 / sigma**2 if sigma else math.inf], dtype=torch.float64)
    assert loss.sigma_weight(snr).item() == pytest.approx(sigma)


class Line:
    """A flow at given times."""

    prediction = "flow"

    def snr(self, t):
        return ((1 - t) / t) ** 2


def test_the_settings_choose_the_weights():
    schedule = Discrete(BARS)
    snr = BARS / (1 - BARS)
    assert loss.timestep_weight(Loss(), schedule, T) is None
    for name, gamma, expected in [
        ("min_snr", None, torch.tensor([5 / 9, 1, 1, 1])),
        ("min_snr", 0.5, torch.tensor([0.5 / 9, 0.5, 1, 1])),
        ("p2", None, 1 - BARS),
        ("p2", 2.0, (1 - BARS) ** 2),
        ("debiased", None, snr.clamp(min=1e-8) ** -0.5),
    ]:
        got = loss.timestep_weight(Loss(weight=LossWeight[name], gamma=gamma), schedule, T)
        torch.testing.assert_close(got, expected.double())
    times = torch.tensor([0.25, 1.0])
    torch.testing.assert_close(loss.timestep_weight(Loss(weight=LossWeight.sigma), Line(), times), times)


def test_the_prediction_of_the_schedule_decides_about_its_weights():
    v = loss.timestep_weight(Loss(weight=LossWeight.p2), Discrete(BARS, "v_prediction"), T)
    torch.testing.assert_close(v, 1 / (2 + BARS / (1 - BARS)))


def half(size=4):
    """[1, 1, size, size] mask of the left half."""
    mask = torch.zeros(1, 1, size, size)
    mask[..., : size // 2] = 1
    return mask


def test_what_is_not_masked_weighs_the_least_weight():
    weights = loss.position_weights(half(), (4, 4), unmasked=0.1, normalize=False)
    assert weights[0, 0, 0].tolist() == pytest.approx([1, 1, 0.1, 0.1])


def test_a_larger_mask_is_brought_to_the_latents_size_by_the_mean():
    mask = torch.zeros(1, 1, 8, 16)
    mask[..., :6] = 1
    weights = loss.position_weights(mask, (2, 4), unmasked=0.0, normalize=False)
    assert weights[0, 0].tolist() == [[1, 0.5, 0, 0]] * 2


def test_normalized_weights_have_a_mean_of_1_in_each_image():
    mask = torch.cat([half(), torch.ones(1, 1, 4, 4), 0.25 * half()])
    weights = loss.position_weights(mask, (4, 4), unmasked=0.0, normalize=True)
    torch.testing.assert_close(weights.mean(dim=(1, 2, 3)), torch.ones(3))
    assert weights[0, 0, 0].tolist() == [2, 2, 0, 0]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("unmasked", [0.0, 0.1])
def test_a_mask_of_zeros_gives_a_finite_loss(unmasked, normalize):
    predicted = torch.ones(1, 4, 4, 4, requires_grad=True)
    weights = loss.position_weights(torch.zeros(1, 1, 4, 4), (4, 4), unmasked=unmasked, normalize=normalize)
    each = loss.distance(predicted, torch.zeros(1, 4, 4, 4), factors={"mse": 1.0}, weights=weights)
    each.sum().backward()
    assert each.item() == pytest.approx(
        {(0.0, False): 0, (0.1, False): 0.1, (0.0, True): 0, (0.1, True): 1}[unmasked, normalize]
    )
    assert torch.isfinite(predicted.grad).all()


@pytest.mark.parametrize("type", TYPES)
def test_under_a_mask_of_zeros_nothing_counts(type):
    target = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    changed = target.clone()
    changed[..., 2:] += 7
    weights = loss.position_weights(half(), (4, 4), unmasked=0.0, normalize=False)
    inside, outside = target + 1 * half(), changed + 1 * half()
    each = [loss.distance(p, target, factors={type: 1.0}, weights=weights).item() for p in (inside, outside)]
    assert each[0] == each[1] > 0
    whole = loss.distance(outside[..., :2], target[..., :2], factors={type: 1.0}).item()
    assert each[0] == pytest.approx(whole / 2)
