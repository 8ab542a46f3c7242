"""Class images: what `data.concepts.NAME.generate` asks for and is not there is drawn by the model before the run."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from otl import rng
from otl.callbacks.progress import track
from otl.config import ConceptType, Data, SettingsError
from otl.datamodules.captions import lines
from otl.datamodules.scan import Source, count_pictures, sources
from otl.formats.files import whole
from otl.tasks.precision import device
from otl.tasks.run import build_module
from otl.types import Sample, Size

log = logging.getLogger(__name__)

PATIENCE = 5.0  # seconds between two looks of the other ranks


def draw_missing(settings: DictConfig, *, autocast: torch.dtype | None) -> None:
    """Draw class images until every concept has as many as it asks for; one that is there is never touched.

    Args:
        autocast: dtype of the run's mixed precision; None: none.

    Raises:
        SettingsError: as in `lacking`.
    """
    short = lacking(settings)
    if not short:
        return
    if rank_zero_only.rank != 0:
        while any(missing(source) for source in short):
            time.sleep(PATIENCE)
        return
    module = build_module(settings)
    module.method, module.autocast_dtype = None, autocast
    module.configure_model()
    module.to(device(settings.trainer))
    for source in short:
        draw(module, source)


def lacking(settings: DictConfig) -> list[Source]:
    """The concepts that have fewer images than they ask for.

    Raises:
        SettingsError: one has no prompt to draw from.
    """
    data: Data = OmegaConf.to_object(settings.data)  # type: ignore[assignment]
    short = [source for source in sources(data) if missing(source)]
    for source in short:
        require_prompt(source)
    return short


def undrawn(settings: DictConfig, side: int) -> list[Sample]:
    """What `draw_missing` would draw, without pixels: to be planned with before any weight is loaded.

    Args:
        side: of the pictures, pixels.
    """
    return [
        Sample(
            source.folder / file_name(number),
            Size(side, side),
            [lines(source.prompt or "")[number % len(lines(source.prompt or ""))]],
            concept=source.concept,
            weight=source.weight,
            prior=source.type == ConceptType.prior,
        )
        for source in lacking(settings)
        for number in numbers(source)
    ]


def numbers(source: Source) -> list[int]:
    """Of the pictures that are still to be drawn."""
    assert source.folder is not None
    free = [number for number in range(source.generate) if not (source.folder / file_name(number)).exists()]
    return free[: missing(source)]


def require_prompt(source: Source) -> None:
    name = source.key.rpartition(".")[0]
    if not lines(source.prompt or ""):
        raise SettingsError(
            f"{name}.generate={source.generate}: {source.folder} has {count(source)} images, and there is no prompt to "
            f"draw the rest from: set {name}.prompt=..., such as 'a photo of a dog'"
        )


def count(source: Source) -> int:
    """Images that are there."""
    return count_pictures(source.folder) if source.folder is not None and source.folder.is_dir() else 0


def missing(source: Source) -> int:
    """Images still to be drawn."""
    return max(0, source.generate - count(source)) if source.folder is not None else 0


def draw(module: Any, source: Source) -> None:
    """The pictures of one concept, each from a seed of its own, with the settings of `sample`; its prompts by turns."""
    options, folder = module.sample_options, source.folder
    assert folder is not None and source.prompt is not None
    prompts = lines(source.prompt)
    folder.mkdir(parents=True, exist_ok=True)
    wanted = numbers(source)
    log.info(f"{source.key}: drawing {len(wanted)} class images of {source.prompt!r} into {folder}")
    for start in track(
        range(0, len(wanted), options.batch_size), "batches of class images", -(-len(wanted) // options.batch_size)
    ):
        chosen = wanted[start : start + options.batch_size]
        drawn = module.draw(
            [prompts[number % len(prompts)] for number in chosen],
            [rng.key(module.seed, source.concept, file_name(number)) % 2**31 for number in chosen],
            negative_prompt=options.negative_prompt,
            steps=options.steps,
            guidance=options.guidance,
            sampler=options.sampler,
            timestep_spacing=options.timestep_spacing,
            batch_size=options.batch_size,
        )
        for number, picture in zip(chosen, drawn):
            write(picture, folder / file_name(number))


def file_name(number: int) -> str:
    return f"class-{number:05d}.png"


def write(picture: Any, path: Path) -> None:
    with whole(path, needs=3 * picture.width * picture.height) as aside:  # at most: a PNG is packed
        picture.save(aside, "PNG")
