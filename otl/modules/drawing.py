"""Pictures from a family, by the stock pipeline: captions are encoded first, so that text encoders can be away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from otl.config import Sampler, TimestepSpacing
from otl.modules import inpainting, samplers
from otl.types import Cond, Size

if TYPE_CHECKING:
    from PIL.Image import Image

    from otl.modules.base import DiffusionModule
    from otl.modules.inpainting import Canvas


@torch.no_grad()
def draw(
    module: DiffusionModule,
    prompts: list[str],
    seeds: list[int],
    *,
    negative_prompt: str,
    steps: int,
    guidance: float,
    size: Size,
    batch_size: int,
    sampler: Sampler | None = None,
    timestep_spacing: TimestepSpacing | None = None,
    canvases: list[Canvas] | None = None,
) -> list[Image]:
    """One picture for each pair of prompt and seed. The same on every call; the module is left as it was.

    Args:
        canvases: what an inpainting model paints in, one for each pair; None: all of an empty picture.
    """
    if canvases is None and module.inpaints:
        canvases = [inpainting.empty(size)] * len(prompts)
    drawn: list[tuple[Tensor, str, torch.Generator]] = []
    with as_it_was(module):
        conds = encoded(module, [*prompts, negative_prompt], batch_size=batch_size)
        for start in range(0, len(prompts), batch_size):
            chosen = slice(start, start + batch_size)
            texts = prompts[chosen]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[chosen]]
            uncond = [conds[negative_prompt]] * len(texts)
            with module.autocast(), sampling_scheduler(module, sampler, timestep_spacing):
                latents = latents_of(
                    module,
                    stacked([conds[text] for text in texts], module.device),
                    stacked(uncond, module.device),
                    canvases and canvases[chosen],
                    generators=generators,
                    steps=steps,
                    guidance=guidance,
                    size=size,
                )
            drawn += zip(latents.split(1), texts, generators)
        with module.decoding():  # one at a time: in fp32 at 1024 pixels a picture takes gigabytes
            decoded = (module.decode_sample(each, [text], generators=[last]) for each, text, last in drawn)
            return [to_pictures(pixels)[0] for pixels in decoded]


def latents_of(
    module: DiffusionModule, cond: Cond, uncond: Cond, canvases: list[Canvas] | None, **options: Any
) -> Tensor:
    """[B, C, h, w] by the family's own sampling, or by the stock inpainting pipeline."""
    if canvases is None:
        return module.sample(cond, uncond, **options)
    with without_text_encoders(module):
        return inpainting.sample(module, cond, uncond, canvases, **options)


def encoded(module: DiffusionModule, prompts: list[str], *, batch_size: int) -> dict[str, Cond]:
    """prompt -> its conditioning on the CPU, one row without the batch axis.

    What was kept before the text encoders were let go is taken from there; for the rest they are loaded again, used,
    and let go.
    """
    kept = module.kept_prompts
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in kept]
    found = {prompt: kept[prompt] for prompt in prompts if prompt in kept}
    if not missing:
        return found
    with module.recovered(module.text_encoders), module.autocast():
        for name in module.text_encoders:
            module.part(name).to(module.device).eval()
        for start in range(0, len(missing), batch_size):
            texts = missing[start : start + batch_size]
            cond = module.encode_prompt(texts)
            for row, text in enumerate(texts):
                found[text] = {key: value[row].cpu() for key, value in cond.items()}
    return found


def stacked(rows: list[Cond], device: torch.device) -> Cond:
    """Rows without the batch axis -> a conditioning with it."""
    return {key: torch.stack([row[key] for row in rows]).to(device) for key in rows[0]}


@contextlib.contextmanager
def as_it_was(module: DiffusionModule) -> Iterator[None]:
    """All parts but the text encoders on the module's device and in eval mode; afterwards each where and as it was."""
    parts = {name: module.part(name) for name in module.part_names if name not in module.released}
    where = {name: next(part.parameters()).device for name, part in parts.items()}
    modes = [(each, each.training) for part in parts.values() for each in part.modules()]
    for name, part in parts.items():
        part.eval()
        if name not in module.text_encoders:
            part.to(module.device)
    try:
        yield
    finally:
        for name, part in parts.items():
            part.to(where[name])
        for each, training in modes:
            each.training = training


@contextlib.contextmanager
def without_text_encoders(module: DiffusionModule) -> Iterator[None]:
    """The pipeline believes that it has none: it then asks neither their device nor their dtype."""
    own = {name: getattr(module.pipeline, name) for name in module.text_encoders}
    for name in own:
        setattr(module.pipeline, name, None)
    try:
        yield
    finally:
        module.pipeline.register_modules(**own)  # setting them would leave them out of its config, and so of exports


@contextlib.contextmanager
def sampling_scheduler(
    module: DiffusionModule, sampler: Sampler | None = None, spacing: TimestepSpacing | None = None
) -> Iterator[None]:
    """In the pipeline, for the time of the block: what `samplers.scheduler` gives."""
    own = module.pipeline.scheduler
    module.pipeline.scheduler = samplers.scheduler(module, sampler, spacing)
    try:
        yield
    finally:
        module.pipeline.scheduler = own


def to_pictures(pixels: Tensor) -> list[Image]:
    """[B, 3, H, W] in -1..1 -> B pictures."""
    from PIL import Image as pil

    levels = (pixels.float().clamp(-1, 1) * 127.5 + 127.5).round().to(torch.uint8)
    return [pil.fromarray(each) for each in levels.permute(0, 2, 3, 1).cpu().numpy()]
