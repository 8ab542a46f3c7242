"""Rank the images of a dataset by their loss under a model: captions that do not fit are among the worst."""

from __future__ import annotations

import csv
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch import seed_everything
from omegaconf import DictConfig, open_dict
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from otl.callbacks.progress import track
from otl.callbacks.sheet import grid
from otl.config import SettingsError
from otl.datamodules import images
from otl.datamodules.bucketed import report
from otl.datamodules.layout import Layout
from otl.formats.files import whole
from otl.modules.training import VALIDATION_TIMESTEPS, spaced
from otl.quiet import undouble_lightning
from otl.tasks import ranks, resuming
from otl.tasks.precision import allow_tf32, choose, device_kind, first_device
from otl.tasks.run import build_data, build_module, build_skeleton, run_dir
from otl.tasks.train import build_trainer
from otl.types import Sample, Size
from otl.wording import printable

log = logging.getLogger(__name__)


TABLE, SHEET = "rank.csv", "rank.png"
CAPTION = 60  # characters of a caption on the console


@dataclass
class Ranked:
    """An image with one of its captions, and the loss at each timestep."""

    sample: Sample
    size: Size  # of what the model is shown
    losses: list[float]

    @property
    def caption(self) -> str:
        return self.sample.captions[0]

    @property
    def loss(self) -> float:
        return sum(self.losses) / len(self.losses)


def rank(
    settings: DictConfig, *, timesteps: int = VALIDATION_TIMESTEPS, worst: int = 10, folder: Path | None = None
) -> None:
    """Measure every image with every caption of its own, with the same noise for all, and list them worst first.

    rank.csv in the run's folder has all, the console and rank.png the worst. It is the loss that the same line would
    train with, but for what concepts change of it: their weights, and the target of priors.

    Args:
        timesteps: at how many of them, evenly spaced, the loss is measured.
        worst: how many are shown.
        folder: of the run; None: the one that Hydra made.

    Raises:
        SettingsError: the line would not train either.
    """
    undouble_lightning()
    folder = run_dir() if folder is None else folder
    refuse_overwrite(settings, folder / TABLE)
    precision = choose(
        settings.trainer.precision, accelerator=settings.trainer.accelerator, devices=settings.trainer.devices
    )
    allow_tf32(precision, accelerator=settings.trainer.accelerator)
    resume = resuming.find(settings.resume, folder)
    if resume:
        resuming.read(resume)  # refuses what could run code
    seed_everything(settings.seed, verbose=False)
    module = build_module(settings)
    module.run_dir, module.track, module.ranked_timesteps = folder, track, timesteps
    module.autocast_dtype, module.precision_name = precision.autocast, precision.name
    data = build_data(settings, build_skeleton(settings))
    data.setup("predict")
    for problem in data.problems:
        log.warning(report(problem))
    data.arrange(each_caption(data.scanned[0]))
    data.purpose = ", ranked"
    trainer = build_trainer(on_one_device(settings), precision.name)
    with resuming.put_back(resume):
        measured = trainer.predict(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    found = worst_first(data.validation_layout, measured)
    steps = module.noise_schedule.sample(module.timesteps(spaced(timesteps)))
    write(found, [f"loss at t={t:g}" for t in steps.tolist()], folder / TABLE)
    show(found[:worst])
    draw(found[:worst], settings.data.background, folder / SHEET)
    log.info(f"all in {folder / TABLE}, the worst in {folder / SHEET}")


def refuse_overwrite(settings: DictConfig, table: Path) -> None:
    """Raises SettingsError: the folder has an earlier ranking, and `output.overwrite` is not set."""
    if table.exists() and not settings.output.overwrite:
        raise SettingsError(
            f"{table} is an earlier ranking: choose another hydra.run.dir, or replace it with output.overwrite=true"
        )


def each_caption(samples: list[Sample]) -> list[Sample]:
    """An image once with each of its captions, held out and counted like any other."""
    return [
        replace(sample, captions=[caption], validation=True, weight=1.0, prior=False)
        for sample in samples
        for caption in sample.captions
    ]


def on_one_device(settings: DictConfig) -> DictConfig:
    """The settings for one device, with a bar and nothing else that looks on."""
    if ranks.count(settings.trainer) > 1:
        log.warning("trainer.devices: a ranking uses the first of them")
    copy = settings.copy()
    with open_dict(copy):
        first = first_device(copy.trainer.devices)
        copy.trainer.devices = [first] if device_kind(copy.trainer.accelerator) == "cuda" else 1
        copy.trainer.num_nodes = 1
        copy.callbacks, copy.logger = {"progress": {"_target_": "otl.callbacks.progress.Ranking"}}, None
    return copy


def worst_first(layout: Layout, measured: list[tuple[Tensor, Tensor]]) -> list[Ranked]:
    """By loss; what is no number is the worst.

    Args:
        layout: of the samples.
        measured: what `predict_step` gave for each batch.
    """
    found = [
        Ranked(layout.samples[index], layout.places[index].bucket, losses)
        for numbers, rows in measured
        for index, losses in zip(numbers.tolist(), rows.tolist())
    ]
    return sorted(found, key=lambda each: math.inf if math.isnan(each.loss) else each.loss, reverse=True)


def write(found: list[Ranked], columns: list[str], table: Path) -> None:
    """One row for each caption of each image.

    Args:
        columns: names of the losses at the timesteps.
    """
    with whole(table) as aside, aside.open("w", encoding="utf-8", newline="") as lines:
        rows = csv.writer(lines)
        rows.writerow(["path", "caption", "size", "loss", *columns])
        for each in found:
            rows.writerow([each.sample.path, each.caption, each.size, each.loss, *each.losses])


def show(found: list[Ranked]) -> None:
    """The worst on the console."""
    table = Table("loss", "image", "caption", title="The largest losses", title_justify="left")
    for each in found:
        caption = each.caption if len(each.caption) <= CAPTION else f"{each.caption[:CAPTION]} ..."
        table.add_row(f"{each.loss:.4f}", Text(printable(str(each.sample.path))), Text(printable(caption)))
    Console().print(table)


def draw(found: list[Ranked], background: str, file: Path) -> None:
    """The worst on a page."""
    tiles = [
        (f"{each.loss:.4f}  {printable(each.sample.name)}: {each.caption}", images.load(each.sample.path, background))
        for each in found
    ]
    with whole(file) as aside:
        grid(tiles).save(aside, "PNG")
