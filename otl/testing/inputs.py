"""What the checks of families and methods share: modules, and what goes into them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from otl.methods.adapter import Adapter
from otl.methods.lora import Lora
from otl.methods.parts import chosen_parts
from otl.modules.base import DiffusionModule
from otl.types import Batch, Cond, Size

Factory = Callable[[], DiffusionModule]
"""A new module each time, nothing loaded, with the smallest checkpoint there is."""

CAPTIONS = ["a small red circle", "two tall trees in front of a house by the sea in the evening, a photograph"]
OTHERS = [CAPTIONS[0], "snow"]  # the first is the same
SMALLEST = 32  # pixels; sides of the pictures are at least this
US = torch.tensor([0.3, 0.7], dtype=torch.float64)  # become the timesteps of a batch


def loaded(factory: Factory) -> DiffusionModule:
    module = factory()
    module.configure_model()
    return module


def adapt(module: DiffusionModule, method: Adapter | None = None, *, seed: int = 0) -> DiffusionModule:
    """Load with an adapter on every layer that takes one, its weights random: a new one would change nothing.

    Args:
        method: None: a LoRA.
    """
    module.method = method or Lora(rank=4, alpha=2.0)
    module.method.targets = "full"
    module.method.parts = chosen_parts(all_parts(module))
    module.configure_model()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def all_parts(module: DiffusionModule) -> dict[str, Any]:
    """`method.parts` of everything that takes an adapter."""
    return {part: {} for part in module.lora_targets}


def bucket(module: DiffusionModule) -> Size:
    """The smallest that is worth testing: its sides are consecutive multiples of the family's step."""
    steps = math.ceil(SMALLEST / module.bucket_step)
    return Size(steps * module.bucket_step, (steps + 1) * module.bucket_step)


def pictures(module: DiffusionModule, *, other: bool = False) -> Tensor:
    """Two random pictures [2, 3, H, W]; `other` has another second one."""
    size = bucket(module)
    seeds = (0, 2) if other else (0, 1)
    drawn = [torch.rand(3, *size, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(drawn) * 2 - 1


def a_batch(module: DiffusionModule, *, other: bool = False) -> Batch:
    """Two pictures with their captions; `other` has another second sample."""
    size, second = bucket(module), int(other)
    return Batch(
        index=torch.tensor([0, 1 + second]),
        key=torch.tensor([5, 6 + second]),
        captions=OTHERS if other else CAPTIONS,
        original_size=torch.tensor([[480, 640], [1080 + 120 * second, 1920]]),
        crop=torch.tensor([[0, 12], [7 + second, 0]]),
        target_size=torch.tensor([list(size)] * 2),
        weight=torch.ones(2),
        pixels=pictures(module, other=other),
        mask=holes(size) if module.inpaints else None,
    )


def holes(size: Size) -> Tensor:
    """Masks [2, 1, H, W] of two pictures: a box, and everything."""
    mask = torch.ones(2, 1, *size)
    mask[0, :, size.h // 2 :] = 0
    return mask


def inputs(module: DiffusionModule, *, other: bool = False) -> tuple[Tensor, Tensor, Cond, Batch]:
    """What `predict` takes, of two samples; `other` has another second one."""
    batch = a_batch(module, other=other)
    noisy, cond = encoded(module, batch.pixels), prompted(module, batch.captions)
    t = module.noise_schedule.sample(torch.tensor([0.3, 0.5 if other else 0.7], dtype=torch.float64))
    return noisy, t, cond, batch


def first(batch: Batch) -> Batch:
    """Its first sample alone."""
    return batch._make(None if field is None else field[:1] for field in batch)


def on_meta(batch: Batch) -> Batch:
    """Its shapes alone."""
    return batch._make(field.to("meta") if isinstance(field, Tensor) else field for field in batch)


def encoded(module: DiffusionModule, pixels: Tensor) -> Tensor:
    with torch.no_grad():
        return module.encode_image(pixels)


def prompted(module: DiffusionModule, captions: list[str]) -> Cond:
    with torch.no_grad():
        return module.encode_prompt(captions)


def forward(module: DiffusionModule, noisy: Tensor, t: Tensor, cond: Cond, batch: Batch) -> Tensor:
    with torch.no_grad():
        return module.predict(module.denoiser_input(noisy, batch), t, cond, batch)


def backward(module: DiffusionModule) -> Tensor:
    """[2] losses of a batch, whose mean has gone backward; dropout, where there is, leaves out the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        losses = module.losses(a_batch(module), u=US, stream="noise")
        losses.mean().backward()
    return losses.detach()


def fits(module: DiffusionModule, predicted: Tensor, latents: Tensor) -> bool:
    """Whether a prediction has the shape that the family says."""
    b, channels, h, w = latents.shape
    return predicted.shape == (b, channels * (1 + module.learned_variance), h, w)
