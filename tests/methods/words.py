"""Every family in small, with new words in its text encoders."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from otl.modules.base import DiffusionModule
from otl.modules.pixart_alpha import PixArtAlpha
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.testing import a_batch
from otl.types import Batch, Method
from tests import tiny, tiny_priors

US = torch.tensor([0.3, 0.7], dtype=torch.float64)
BUILDERS: dict[str, tuple[type[DiffusionModule], Any]] = {
    "sd15": (StableDiffusion, tiny.sd15),
    "sdxl": (StableDiffusionXL, tiny.sdxl),
    "pixart_alpha": (PixArtAlpha, tiny.pixart_alpha),
    **tiny_priors.FAMILIES,
}


def build(name: str, folder: Path) -> Path:
    """A tiny checkpoint of the family, with the whole vocabulary of its tokenizer."""
    return BUILDERS[name][1](folder, **({} if name == "pixart_alpha" else {"words": tiny.CLIP}))


def taught(
    name: str, folder: Path, method: Method | None, *, seed: int = 0, dtype: str = "auto", **options: Any
) -> DiffusionModule:
    """The family of that checkpoint with a method, loaded; `options` are those of the family alone."""
    module = family(name, folder, dtype, **options)
    module.seed, module.method, module.total_steps = seed, method, 100
    module.optimizer = lambda groups: torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5)
    module.lr_schedule = lambda step, total: 1.0
    module.pipeline = loaded(name, folder, dtype)
    module.prepare()
    return module


def family(name: str, folder: Path, dtype: str, **options: Any) -> DiffusionModule:
    priors = tiny_priors.options(folder) if name in tiny_priors.FAMILIES else {}
    return BUILDERS[name][0](str(folder), dtype=dtype, **priors, **options)


def loaded(name: str, folder: Path, dtype: str) -> Any:
    """A copy of the pipeline; its tokenizers, which take a second to read, are shared."""
    pipeline = read_once(name, folder, dtype)
    words = [getattr(pipeline, each) for each in ("tokenizer", "tokenizer_2") if hasattr(pipeline, each)]
    return copy.deepcopy(pipeline, {id(each): each for each in words})


@lru_cache
def read_once(name: str, folder: Path, dtype: str) -> Any:
    return family(name, folder, dtype).load_pipeline()


def batch_of(module: DiffusionModule, caption: str) -> Batch:
    """Two pictures with one caption."""
    return a_batch(module)._replace(captions=[caption] * 2)


def train(module: DiffusionModule, caption: str, *, steps: int = 2) -> None:
    """Optimizer steps on two pictures."""
    optimizer = module.configure_optimizers()["optimizer"]
    batch = batch_of(module, caption)
    for _ in range(steps):
        module.losses(batch, u=US, stream="noise").mean().backward()
        optimizer.step()
        optimizer.zero_grad()
