"""A NaN is traced to the images, timesteps and part that made it, on a real network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from otl.callbacks import diagnosis
from otl.callbacks.diagnosis import DATA, OVERFLOW, UNKNOWN, WEIGHTS, of_gradient, of_loss
from otl.methods.lora import Lora
from otl.modules.base import DiffusionModule
from otl.modules.stable_diffusion import StableDiffusion
from otl.types import Batch
from tests.methods.kinds import module_of

NAMES = ["a.png", "b.png", "c.png"]


@dataclass
class Made:
    """A module, and a batch of its last two images."""

    module: DiffusionModule
    batch: Batch

    def timestep(self, row: int) -> int:
        return int(self.module.batch_timesteps(self.batch)[row])


@pytest.fixture
def made(sd15_folder: Path) -> Made:
    module = module_of(StableDiffusion, sd15_folder, Lora(rank=2))
    module.configure_model()
    module.train()
    sides = torch.full((2, 2), 64)
    draw = torch.Generator().manual_seed(0)
    batch = Batch(
        index=torch.tensor([1, 2]),
        key=torch.tensor([11, 22]),
        captions=["", ""],
        original_size=sides,
        crop=sides,
        target_size=sides,
        weight=torch.ones(2),
        latents=torch.randn(2, 4, 32, 32, generator=draw),
        cond={"hidden": torch.randn(2, 77, 32, generator=draw)},
    )
    return Made(module, batch)


@pytest.mark.parametrize("part", ["latents", "caption's hidden"])
def test_data_that_is_broken_is_named(made: Made, part: str) -> None:
    tensor = made.batch.latents if part == "latents" else made.batch.cond["hidden"]  # type: ignore[index]
    assert tensor is not None
    tensor[1, 0, 0] = torch.nan
    found = of_loss(made.module, [made.batch], NAMES)
    assert found.images == [f"c.png (timestep {made.timestep(1)})"]
    assert (found.made_by, found.cause) == (f"the {part} that came from the data", DATA)


def test_weights_that_are_broken_are_named(made: Made) -> None:
    next(iter(made.module.trained_parameters().values())).data[0, 0] = torch.inf
    found = of_loss(made.module, [made.batch], NAMES)
    assert (found.made_by, found.cause) == ("the weights of unet", WEIGHTS)
    assert len(found.images) == 2


@pytest.mark.parametrize(("dtype", "cause"), [(torch.float16, OVERFLOW), (torch.bfloat16, None)])
def test_an_overflow_of_fp16_is_told_from_data_and_weights(made: Made, dtype: torch.dtype, cause: str | None) -> None:
    """The layer's outputs are near 1e6: too large for fp16, and not for bf16."""
    layer = made.module.part("unet").conv_in
    layer.weight.data.fill_(0)
    layer.bias.data.fill_(1e6)
    made.module.autocast_dtype = dtype
    found = of_loss(made.module, [made.batch], NAMES)
    if cause is None:
        assert found.made_by.startswith("nothing that a second look finds")
    else:
        assert (found.made_by, found.cause) == ("unet (conv_in)", cause)
        assert "trainer.precision=bf16-mixed or 32-true" in str(found)
        assert found.images == [
            f"{name} (timestep {made.timestep(row)})" for row, name in enumerate(("b.png", "c.png"))
        ]


def test_a_layer_that_makes_nan_in_fp32_is_named(made: Made) -> None:
    made.module.part("unet").mid_block.attentions[0].proj_in.forward = lambda x: x * torch.nan
    found = of_loss(made.module, [made.batch], NAMES)
    assert (found.made_by, found.cause) == ("unet (mid_block.attentions.0.proj_in)", UNKNOWN)


def test_looking_changes_nothing(made: Made) -> None:
    made.batch.latents[0] *= 1e30  # type: ignore[index]
    before, state = diagnosis.randomness.states()["torch"], made.module.state_dict()
    kept = {name: tensor.clone() for name, tensor in state.items()}
    of_loss(made.module, [made.batch], NAMES)
    assert torch.equal(diagnosis.randomness.states()["torch"], before)
    assert all(torch.equal(kept[name], tensor) for name, tensor in made.module.state_dict().items())
    assert not any(layer._forward_hooks for layer in made.module.part("unet").modules())


def test_a_gradient_is_traced_to_its_weights(made: Made) -> None:
    parameters = made.module.trained_parameters()
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    name = sorted(parameters)[3]
    parameters[name].grad[0, 0] = torch.nan  # type: ignore[index]
    found = of_gradient(made.module, [made.batch], NAMES, scaled=False)
    assert (found.made_by, found.cause) == (f"the gradient of {name}", UNKNOWN)
    assert of_gradient(made.module, [made.batch], NAMES, scaled=True).cause == OVERFLOW
