"""The cosine schedule against the scheduler that the pipelines sample with, and the formula."""

import math

import pytest
import torch
from diffusers import DDPMWuerstchenScheduler

from otl.cosine import Cosine

TIMES = torch.tensor([0.001, 0.01, 0.25, 0.5, 0.9, 0.999, 1.0])


def test_the_share_of_the_signal_is_that_of_the_scheduler():
    theirs = DDPMWuerstchenScheduler()._alpha_cumprod(TIMES, torch.device("cpu"))
    torch.testing.assert_close(Cosine().alpha_bars(TIMES).float(), theirs, rtol=1e-5, atol=1e-7)


def test_the_share_of_the_signal_is_the_square_of_a_cosine():
    expected = math.cos(0.308 / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    assert Cosine().alpha_bars(torch.tensor([0.3])).item() == pytest.approx(expected, rel=1e-6)


def test_noise_is_added_as_by_the_scheduler():
    latents, noise = torch.randn(2, 7, 16, 3, 5, generator=torch.Generator().manual_seed(0))
    theirs = DDPMWuerstchenScheduler().add_noise(latents, noise, TIMES)
    torch.testing.assert_close(Cosine().add(latents, noise, TIMES), theirs, rtol=1e-5, atol=1e-6)


def test_the_noise_is_what_is_predicted():
    latents, noise = torch.randn(2, 7, 16, 3, 5)
    assert Cosine().target(latents, noise, TIMES) is noise


def test_the_ends_are_clamped():
    ends = Cosine().alpha_bars(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(ends, torch.tensor([0.9999, 0.0001], dtype=torch.float64))


@pytest.mark.parametrize("share", [0.9999, 0.7, 0.0001])
def test_time_inverts_the_share(share):
    schedule = Cosine()
    t = torch.tensor([schedule.time(share)], dtype=torch.float64)
    assert schedule.alpha_bars(t).item() == pytest.approx(share, rel=1e-9)


def test_times_are_stretched_moved_and_clamped():
    u = torch.tensor([0.0, 0.5, 0.95, 1.0], dtype=torch.float64)
    assert Cosine(stretch=1.08, start=0.001).sample(u).tolist() == pytest.approx([0.001, 0.541, 1.0, 1.0])
    assert Cosine(limits=(0.1, 0.6)).sample(u).tolist() == pytest.approx([0.1, 0.501, 0.6, 0.6])


def test_the_share_of_a_time_is_what_it_was_drawn_from():
    shares = torch.tensor([0.0, 0.25, 0.9], dtype=torch.float64)
    schedule = Cosine(stretch=1.08)
    torch.testing.assert_close(schedule.share(schedule.sample(shares)), shares, rtol=0, atol=1e-6)
    assert schedule.sample(shares).dtype == torch.float32
