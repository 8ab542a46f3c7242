"""The example keeps OTL's contract, learns from a handful of pictures, and writes what it learnt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from otl_example.family import Example, Flow
from otl_example.networks import word_ids
from otl_example.pipeline import from_blocks, to_blocks
from torch import Tensor

from otl import rng
from otl.config import SettingsError
from otl.methods.finetune import Finetune
from otl.methods.lora import Lora
from otl.testing import CHECKS, METHODS, Cell, Impossible, prove
from otl.types import Batch, Method, Size

COLOURS = {"red": (1, -1, -1), "green": (-1, 1, -1), "blue": (-1, -1, 1), "yellow": (1, 1, -1)}
CAPTIONS = [f"a {colour} frame" for colour in COLOURS]
LORA = ["contract", "run", "again", "formula", "PEFT"]
PROVEN = {  # method -> what holds of it, or a part of why it cannot be
    "lora": LORA,
    "dora": LORA,
    "loha": LORA,
    "lokr": LORA,
    "oft": ["contract", "run", "again", "formula"],
    "finetune": ["contract", "run", "again", "weights", "diffusers"],
    "embedding": "no table of tokens",
    "lora + embedding": "no table of tokens",
    "inpaint": "no inpainting form",
}
NOTHING = 2.0  # the loss of predicting 0: the target is noise minus pixels of 1 and -1


def frames() -> Tensor:
    """[4, 3, 24, 24]: a frame of each colour around its complement."""
    pixels = torch.tensor(list(COLOURS.values())).float().reshape(4, 3, 1, 1).repeat(1, 1, 24, 24)
    pixels[:, :, 6:18, 6:18] *= -1
    return pixels


def batch(key: Tensor) -> Batch:
    """The four frames; their noise is a function of the keys."""
    sides = torch.full((4, 2), 24)
    return Batch(torch.arange(4), key, CAPTIONS, sides, 0 * sides, sides, torch.ones(4), pixels=frames())


def held_out(module: Example) -> float:
    """The loss at four times with noise that is never trained on."""
    with torch.no_grad():
        each = [
            module.losses(batch(-1 - torch.arange(4)), u=torch.full((4,), u), stream="val") for u in (0.2, 0.5, 0.8)
        ]
    return torch.stack(each).mean().item()


def trained(method: Method, *, steps: int, lr: float) -> tuple[Example, float, float]:
    """The family after some steps, and its held-out loss before and after."""
    module = Example()
    module.method = method
    module.configure_model()
    before = held_out(module)
    optimizer = torch.optim.AdamW(module.trained_parameters().values(), lr=lr)
    for step in range(steps):
        key = 4 * step + torch.arange(4)
        module.losses(batch(key), u=rng.uniforms(key, "timestep"), stream="noise").mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, before, held_out(module)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_contract(check: Callable[[type[Example]], None]) -> None:
    check(Example)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(method: str, tmp_path: Path) -> None:
    proven = prove(Cell(["model=example"], METHODS[method], tmp_path))
    if isinstance(proven, Impossible):
        assert PROVEN[method] in proven
    else:
        assert proven == PROVEN[method]


def test_a_lora_learns_the_pictures() -> None:
    _, before, after = trained(Lora(rank=8, targets="full"), steps=50, lr=3e-3)
    assert before > NOTHING
    assert after < 0.75 * NOTHING


def test_a_full_fine_tune_draws_what_the_words_say() -> None:
    module, _, after = trained(Finetune(), steps=120, lr=2e-3)
    assert after < 0.4 * NOTHING
    pictures = module.draw(CAPTIONS, [0, 1, 2, 3], steps=8, guidance=2.0, size=Size(24, 24))
    for picture, colour in zip(pictures, COLOURS.values()):
        edge = numpy.asarray(picture)[:5].reshape(-1, 3).mean(0) / 127.5 - 1
        assert (numpy.sign(edge) == colour).all()


def test_a_fine_tuned_folder_loads_again(tmp_path: Path) -> None:
    module = Example("seed:3")
    module.method = Finetune()
    module.configure_model()
    with torch.no_grad():
        module.part("transformer").proj_out.bias.fill_(0.25)
    module.output_options.dtype = "fp32"
    again = Example(str(module.export(tmp_path / "final")))
    again.configure_model()
    skeleton = Example(str(tmp_path / "final"))
    skeleton.build_skeleton()
    for name in Example.part_names:
        weights = module.part(name).state_dict()
        assert all(torch.equal(tensor, weights[key]) for key, tensor in again.part(name).state_dict().items())
        assert skeleton.part(name).state_dict().keys() == weights.keys()


def test_the_seed_is_the_checkpoint() -> None:
    weights = []
    for checkpoint in ("seed:0", "seed:0", "seed:1"):
        module = Example(checkpoint)
        module.configure_model()
        weights.append(module.part("transformer").proj_in.weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_a_seed_that_is_no_number_is_refused() -> None:
    with pytest.raises(SettingsError, match="seed:x: give a number"):
        Example("seed:x").configure_model()


def test_blocks_are_the_pixels_in_another_order() -> None:
    pixels = torch.randn(2, 3, 8, 12)
    assert to_blocks(pixels).shape == (2, 48, 2, 3)
    assert torch.equal(from_blocks(to_blocks(pixels)), pixels)


def test_words_are_rows_whatever_their_case_and_the_rest_is_empty() -> None:
    upper, lower, none = word_ids(["Red, red!", "red red", ""], words=100)
    assert upper == lower
    assert upper[0] == upper[1] > 0
    assert set(upper[2:]) == {0} == set(none)


def test_half_way_the_picture_is_half_noise() -> None:
    half = torch.tensor([0.5])
    noisy = Flow().add(torch.full((1, 1, 1, 1), 4.0), torch.zeros(1, 1, 1, 1), half)
    assert noisy.item() == 2.0
    assert Flow().snr(half).item() == 1.0
    assert Flow().sample(torch.tensor([0.25])).item() == Flow().share(torch.tensor([0.25])).item() == 0.25
