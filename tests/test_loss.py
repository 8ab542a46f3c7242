"""Losses against closed forms and published numbers."""

import math

import pytest
import torch

from otl import loss


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
    each = loss.distance(predicted, predicted + difference, type=type, huber_delta=delta)
    torch.testing.assert_close(each, torch.full((2,), expected))


def test_each_sample_has_its_own_loss():
    target = torch.stack([torch.zeros(4, 2, 2), torch.ones(4, 2, 2)])
    assert loss.distance(torch.zeros(2, 4, 2, 2), target).tolist() == [0.0, 1.0]


SNR = torch.tensor([1175.47, 8.45389, 0.38185, 0.00468192], dtype=torch.float64)


@pytest.mark.parametrize(
    ("weight", "gamma", "prediction", "expected"),
    [
        ("min_snr", 5.0, "epsilon", [5 / 1175.47, 5 / 8.45389, 1.0, 1.0]),
        ("min_snr", 5.0, "v_prediction", [5 / 1176.47, 5 / 9.45389, 0.38185 / 1.38185, 0.00468192 / 1.00468192]),
        ("debiased", 5.0, "epsilon", [1000**-0.5, 8.45389**-0.5, 0.38185**-0.5, 0.00468192**-0.5]),
        ("debiased", 5.0, "v_prediction", [1001**-0.5, 9.45389**-0.5, 1.38185**-0.5, 1.00468192**-0.5]),
        ("p2", 1.0, "epsilon", [1 / 1176.47, 1 / 9.45389, 1 / 1.38185, 1 / 1.00468192]),
        ("p2", 1.0, "v_prediction", [1 / 1177.47, 1 / 10.45389, 1 / 2.38185, 1 / 2.00468192]),
        ("constant", 5.0, "epsilon", [1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_weights_by_their_formulas(weight, gamma, prediction, expected):
    got = loss.snr_weight(SNR, weight=weight, gamma=gamma, prediction=prediction)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("weight", ["constant", "min_snr", "debiased", "p2"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_weights_are_finite_at_pure_noise(weight, prediction):
    assert torch.isfinite(loss.snr_weight(torch.zeros(1), weight=weight, gamma=5.0, prediction=prediction)).all()
