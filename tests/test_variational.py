"""The variational bound against the definitions: Gaussians on a grid, the chain's own joint distribution, erf."""

import itertools
import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from otl import variational
from otl.noise import alpha_bars, betas

BARS = alpha_bars(betas("linear", 0.0001, 0.02, 1000))  # PixArt's
T = torch.tensor([1, 37, 500, 999])


def tensors(count: int, seed: int = 0) -> torch.Tensor:
    """[4, ...] fields: noise, fraction, latents, noise that is on them."""
    return torch.randn(4, count, 4, 3, 5, generator=torch.Generator().manual_seed(seed))


def mixed(latents: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    bars = BARS[t].float().reshape(-1, 1, 1, 1)
    return bars.sqrt() * latents + (1 - bars).sqrt() * noise


def posterior(x0: float, xt: float, t: int) -> tuple[float, float]:
    """Mean and variance of x[t-1] given x[0] and x[t], by Bayes: p(x[t-1] | x[0]) p(x[t] | x[t-1]) is a product of two
    Gaussians in x[t-1], whose precisions add up."""
    before, alpha = BARS[t - 1].item(), (BARS[t] / BARS[t - 1]).item()
    precision = 1 / (1 - before) + alpha / (1 - alpha)
    mean = (math.sqrt(before) * x0 / (1 - before) + math.sqrt(alpha) * xt / (1 - alpha)) / precision
    return mean, 1 / precision


@pytest.mark.parametrize("t", [1, 2, 500, 999])
def test_the_true_step_back_is_bayes_rule(t):
    x0, xt = torch.tensor([[0.7], [-0.4]], dtype=torch.float64)
    mean, variance = posterior(0.7, -0.4, t)
    ours = variational.posterior_mean(x0, xt, BARS, torch.tensor([t]))
    assert ours.item() == pytest.approx(mean, rel=1e-9)
    smallest, largest = variational.log_variances(BARS)
    assert smallest[t].item() == pytest.approx(math.log(variance), rel=1e-9)
    assert largest[t].item() == pytest.approx(math.log(1 - (BARS[t] / BARS[t - 1]).item()), rel=1e-9)


def test_above_the_first_step_the_bound_is_the_divergence_of_both_steps_in_bits():
    noise, fraction, latents, clean = tensors(4)
    noisy = mixed(latents, clean, T)
    found = variational.bound(noise, fraction, latents, noisy, BARS, T)
    for row, t in enumerate(T.tolist()):
        bar, beta = BARS[t].item(), 1 - (BARS[t] / BARS[t - 1]).item()
        guess = (noisy[row].double() - math.sqrt(1 - bar) * noise[row].double()) / math.sqrt(bar)
        true, back = (torch.empty(4, 3, 5, dtype=torch.float64) for _ in range(2))
        for c, i, j in itertools.product(range(4), range(3), range(5)):
            xt = noisy[row, c, i, j].item()
            true[c, i, j], smallest = posterior(latents[row, c, i, j].item(), xt, t)
            back[c, i, j], _ = posterior(guess[c, i, j].item(), xt, t)
        share = (fraction[row].double() + 1) / 2
        spread = (share * math.log(beta) + (1 - share) * math.log(smallest)).mul(0.5).exp()
        nats = kl_divergence(Normal(true, torch.tensor(smallest).sqrt().double()), Normal(back, spread))
        torch.testing.assert_close(found[row].double(), nats / math.log(2), rtol=1e-3, atol=1e-5)


def test_at_the_first_step_it_is_the_bits_of_the_pixel_s_level():
    noise, fraction, latents, clean = tensors(3)
    latents = latents.clamp(-0.99, 0.99)
    t = torch.zeros(3, dtype=torch.long)
    noisy = mixed(latents, clean, t)
    noise = clean + 0.3 * noise  # a good guess: far from it the probability ends at its floor
    found = variational.bound(noise, fraction, latents, noisy, BARS, t)
    beta = 1 - BARS[0].item()
    mean = (noisy.double() - math.sqrt(beta) * noise.double()) / math.sqrt(1 - beta)
    _, smallest = posterior(0.0, 0.0, 1)
    share = (fraction.double() + 1) / 2
    spread = (share * math.log(beta) + (1 - share) * math.log(smallest)).mul(0.5).exp()
    normal = Normal(mean, spread)
    inside = normal.cdf(latents.double() + 1 / 255) - normal.cdf(latents.double() - 1 / 255)
    sure = inside > 0.02  # the approximated cdf is within 2e-4
    assert sure.float().mean() > 0.7
    torch.testing.assert_close(found[sure].double(), -inside[sure].log2(), rtol=0, atol=0.02)


def test_the_levels_at_both_ends_are_open():
    ends, far = torch.tensor([-1.0, 1.0]), torch.tensor([-5.0, 5.0])
    sure = variational.binned_log_likelihood(ends, far, torch.zeros(2))
    torch.testing.assert_close(sure, torch.zeros(2), atol=1e-3, rtol=0)
    assert variational.binned_log_likelihood(torch.zeros(1), far[:1], torch.zeros(1)).item() < -5


def test_the_normal_distribution_is_within_two_ten_thousandths():
    x = torch.linspace(-6, 6, 2001, dtype=torch.float64)
    assert (variational.normal_cdf(x) - torch.special.ndtr(x)).abs().max() < 2e-4


def test_the_true_noise_with_the_smallest_variance_costs_nothing():
    _, _, latents, clean = tensors(4)
    noisy = mixed(latents, clean, T)
    nothing = variational.bound(clean, torch.full_like(clean, -1.0), latents, noisy, BARS, T)
    torch.testing.assert_close(nothing, torch.zeros_like(nothing), atol=1e-4, rtol=0)
    more = variational.bound(clean, torch.zeros_like(clean), latents, noisy, BARS, T)
    assert (more[:2].flatten(1).mean(1) > 1e-4).all()  # at late steps both variances are nearly one


@pytest.mark.parametrize("first", [0, 1])
def test_it_teaches_the_variance_alone(first):
    noise, fraction, latents, clean = tensors(4)
    noise.requires_grad_()
    fraction.requires_grad_()
    t = T.clone()
    t[0] = first
    noisy = mixed(latents, clean, t)
    variational.bound(clean + 0.1 * noise, fraction, latents, noisy, BARS, t).mean().backward()
    assert noise.grad is None
    assert fraction.grad is not None and bool((fraction.grad.flatten(1).abs().sum(1) > 0).all())


def test_bf16_is_computed_in_fp32():
    fields = [field.bfloat16() for field in tensors(4)]
    found = variational.bound(*fields[:3], mixed(fields[2].float(), fields[3].float(), T), BARS, T)
    assert found.dtype == torch.float32 and bool(found.isfinite().all())
