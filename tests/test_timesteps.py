"""Distributions of timesteps against their densities and closed forms."""

import math

import pytest
import torch

from otl import timesteps
from otl.config import NoiseOptions, TimestepDistribution
from otl.timesteps import Timesteps

U = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000  # evenly spaced: a sample without the noise of sampling


def of(name, **parameters):
    return Timesteps.of(NoiseOptions(timesteps=TimestepDistribution[name], **parameters))


def normal_cdf(x):
    return 0.5 * (1 + math.erf(x / math.sqrt(2)))


def beta_cdf(x, a, b, points=20001):
    """Simpson's rule over s with x = s^k, so that the density is smooth at 0 for a above 1 / k."""

    def integral(x, a, b):
        k = math.ceil(3 / a)
        s = torch.linspace(0, x ** (1 / k), points, dtype=torch.float64)
        y = k * s ** (k * a - 1) * (1 - s**k) ** (b - 1)
        weights = torch.ones(points, dtype=torch.float64)
        weights[1:-1:2], weights[2:-1:2] = 4, 2
        return float((weights * y).sum() * s[1] / 3)

    norm = math.exp(math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b))
    return integral(x, a, b) / norm if x <= 0.5 else 1 - integral(1 - x, b, a) / norm


def distance(u, got, cdf):
    """Kolmogorov's: the largest difference between a share and what `cdf` says of its quantile.

    Where float64 can tell the quantile from 0 and 1.
    """
    return max(abs(cdf(x) - share) for share, x in zip(u.tolist(), got.tolist(), strict=True) if 1e-12 < x < 1 - 1e-12)


def test_uniform_numbers_stay_as_they_are_at_no_cost():
    assert of("uniform")(U) is U


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 1.0), (-0.5, 0.6), (0.0, 3.0)])
def test_logit_normal(mean, std):
    got = of("logit_normal", logit_mean=mean, logit_std=std)(U)
    assert distance(U, got, lambda x: normal_cdf((math.log(x / (1 - x)) - mean) / std)) < 1e-9


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.5, 1.29, 1.75])
def test_heavy_tail(scale):
    """The formula of the paper, which falls from 1 to 0: its quantiles are ours in the other order."""
    paper = 1 - U - scale * (torch.cos(math.pi / 2 * U) ** 2 - 1 + U)
    torch.testing.assert_close(of("heavy_tail", mode_scale=scale)(U), paper.flip(0))


def test_heavy_tail_favours_the_middle_and_keeps_the_ends():
    got = of("heavy_tail", mode_scale=1.29)(U)
    assert ((got > 0.4) & (got < 0.6)).double().mean() > 0.3  # uniform: 0.2
    assert 0.04 < (got < 0.1).double().mean() < 0.1  # uniform: 0.1, logit-normal: 0.014


CASES = [
    (2.0, 2.0),
    (1.0, 1.0),
    (0.5, 0.5),
    (0.1, 0.1),
    (0.3, 4.0),
    (5.0, 1.0),
    (100.0, 100.0),
    (100.0, 0.1),
    (30.0, 2.5),
]


@pytest.mark.parametrize(("a", "b"), CASES)
def test_beta(a, b):
    u = U[::40]
    got = of("beta", beta_alpha=a, beta_beta=b)(u)
    assert distance(u, got, lambda x: beta_cdf(x, a, b)) < 1e-6
    assert got.diff().min() >= 0


@pytest.mark.parametrize(
    ("a", "b", "quantile"),
    [
        (1.0, 1.0, lambda u: u),
        (3.0, 1.0, lambda u: u ** (1 / 3)),
        (1.0, 4.0, lambda u: 1 - (1 - u) ** 0.25),
        (0.2, 1.0, lambda u: u**5),
        (0.5, 0.5, lambda u: torch.sin(math.pi / 2 * u) ** 2),
    ],
)
def test_beta_where_its_quantiles_have_a_closed_form(a, b, quantile):
    torch.testing.assert_close(of("beta", beta_alpha=a, beta_beta=b)(U), quantile(U), atol=1e-6, rtol=1e-5)


def test_beta_of_the_ends_is_finite():
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    for a, b in CASES:
        got = of("beta", beta_alpha=a, beta_beta=b)(ends)
        assert 0 <= got[0] < got[1] <= 1


def test_a_larger_alpha_is_more_noise():
    means = [of("beta", beta_alpha=a, beta_beta=2.0)(U).mean().item() for a in (1.0, 2.0, 6.0)]
    assert means == pytest.approx([1 / 3, 1 / 2, 3 / 4], abs=1e-4)


@pytest.mark.parametrize("shift", [0.5, 3.0])
def test_the_shift_divides_the_signal_to_noise_ratio_of_a_flow_by_its_square(shift):
    """Equation 23 of the SD3 paper is derived from that: sigma_t / (1 - sigma_t) grows by the shift."""
    got = Timesteps(shift=shift)(U)
    torch.testing.assert_close(got / (1 - got), shift * U / (1 - U))


def test_the_range_is_kept_whatever_the_distribution_and_the_shift():
    for name in TimestepDistribution:
        for shift in (1.0, 3.0):
            options = NoiseOptions(timesteps=name, logit_std=20.0, shift=shift, min_timestep=0.2, max_timestep=0.5)
            got = Timesteps.of(options)(torch.linspace(0, 1, 1001, dtype=torch.float64))
            assert got[0].item() == pytest.approx(0.2)
            assert got.min() >= 0.2
            assert 0.4999 < got.max() < 0.5


def test_the_shift_comes_before_the_range():
    got = Timesteps.of(NoiseOptions(shift=3.0, min_timestep=0.2, max_timestep=0.6))(torch.tensor([0.5]))
    assert got.item() == pytest.approx(0.2 + 0.4 * 0.75)


@pytest.mark.parametrize("name", [each.name for each in TimestepDistribution])
def test_evenly_spaced_numbers_rise_and_repeat(name):
    first, again = (of(name, shift=2.0)(U) for _ in range(2))
    assert (first.diff() > 0).all()
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("name", "parameter", "value"),
    [
        ("logit_normal", "logit_mean", 1.0),
        ("logit_normal", "logit_std", 2.0),
        ("heavy_tail", "mode_scale", -0.5),
        ("beta", "beta_alpha", 3.0),
        ("beta", "beta_beta", 3.0),
        ("uniform", "shift", 2.0),
        ("uniform", "min_timestep", 0.1),
        ("uniform", "max_timestep", 0.9),
    ],
)
def test_every_setting_has_an_effect(name, parameter, value):
    assert not torch.allclose(of(name)(U), of(name, **{parameter: value})(U), atol=1e-3)


def test_the_defaults_are_those_that_the_docs_state():
    torch.testing.assert_close(of("heavy_tail")(U), timesteps.heavy_tail(U, scale=1.29))
    torch.testing.assert_close(of("logit_normal")(U), timesteps.logit_normal(U, mean=0.0, std=1.0))
    torch.testing.assert_close(of("beta")(U), timesteps.beta(2.0, 2.0)(U))
