"""The noise schedule and the loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from otl.config import NoiseOptions
from otl.testing.comparing import close, require
from otl.testing.inputs import US, Factory, a_batch, loaded


def factors(weighted_sum: Callable[[Tensor, Tensor, Tensor], Tensor], t: Tensor) -> tuple[Tensor, Tensor]:
    """The factors of latents and of noise in a schedule's `add` or `target`, each [B, 1, 1, 1] float64."""
    one, zero = torch.ones(len(t), 1, 1, 1, dtype=torch.float64), torch.zeros(len(t), 1, 1, 1, dtype=torch.float64)
    return weighted_sum(one, zero, t).double(), weighted_sum(zero, one, t).double()


def check_noise_recoverable(factory: Factory) -> None:
    """From the noisy latents and a perfect prediction the latents come back."""
    schedule = loaded(factory).noise_schedule
    t = schedule.sample(US)
    require(t.shape == US.shape, f"sample gives timesteps {tuple(t.shape)} for {tuple(US.shape)}")
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    signal, sigma = factors(schedule.add, t)
    of_latents, of_noise = factors(schedule.target, t)
    noisy, target = schedule.add(latents, noise, t), schedule.target(latents, noise, t)
    require(close(noisy, signal * latents + sigma * noise), "add is no weighted sum of latents and noise")
    require(close(target, of_latents * latents + of_noise * noise), "target is no weighted sum of latents and noise")
    determinant = signal * of_noise - sigma * of_latents
    require(bool((determinant.abs() > 1e-6).all()), "latents cannot be told from the noisy latents and the target")
    back = (of_noise * noisy - sigma * target) / determinant
    require(close(back, latents), "noisy latents and target do not give back the latents")


def check_noise_snr(factory: Factory) -> None:
    """snr is (signal / noise) squared of what add does, and falls as u grows."""
    schedule = loaded(factory).noise_schedule
    u = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)
    t = schedule.sample(u)
    signal, sigma = factors(schedule.add, t)
    ratio, expected = schedule.snr(t).double().flatten(), (signal / sigma).square().flatten()
    off = ((ratio - expected).abs() / expected.clamp(min=1e-9)).max().item()
    require(off < 1e-3, f"snr is off by {off:.1%} from what add does: {ratio.tolist()} for {expected.tolist()}")
    require(bool((ratio.diff() <= 0).all()), "a larger u must mean more noise")


def check_noise_shares(factory: Factory) -> None:
    """share takes sample back, what is predicted has a name, and the settings' range is left to the base class."""
    schedule = loaded(factory).noise_schedule
    require(
        schedule.prediction in ("epsilon", "v_prediction", "sample", "flow"),
        f"prediction is {schedule.prediction!r}; accepted are epsilon, v_prediction, sample and flow",
    )
    u = torch.linspace(0.05, 0.85, 9, dtype=torch.float64)
    off = (schedule.share(schedule.sample(u)) - u).abs().max().item()
    require(off < 0.01, f"share(sample(u)) is off from u by {off:.3f}")
    module = factory()
    module.noise_options = NoiseOptions(min_timestep=0.25, max_timestep=0.5)
    module.configure_model()
    require(
        torch.equal(module.noise_schedule.sample(u), schedule.sample(u)),
        "make_noise must not look at noise.min_timestep: DiffusionModule.losses applies the range",
    )


def check_loss(factory: Factory) -> None:
    """One finite loss for each sample, times its weight."""
    module = loaded(factory)
    batch = a_batch(module)
    with torch.no_grad():
        losses = module.losses(batch, u=US, stream="noise")
        doubled = module.losses(batch._replace(weight=2 * batch.weight), u=US, stream="noise")
    require(losses.shape == (2,), f"2 samples have losses {tuple(losses.shape)}")
    require(bool(losses.isfinite().all()) and bool((losses > 0).all()), f"losses are {losses.tolist()}")
    require(close(doubled, 2 * losses), "the samples' weights do not multiply their losses")
