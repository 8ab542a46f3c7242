"""Say what a run would do, before any weight is loaded: on the console and in plan.json."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from otl.config import Data, MaskSource
from otl.datamodules.bucketed import laid_out, placing, require_sound
from otl.datamodules.scan import scan, sources
from otl.datamodules.shapes import shown_at
from otl.formats.files import whole
from otl.modules import inpainting, prior
from otl.modules.base import DiffusionModule
from otl.tasks import classes, contact, disk, memory
from otl.tasks.advice import advise
from otl.tasks.fates import of_images, warning
from otl.tasks.precision import choose
from otl.tasks.run import build_skeleton, data_options, run_dir, try_optimizer
from otl.tasks.tables import show
from otl.tasks.texts import Called, cut_off
from otl.types import Problem, Sample, Size

log = logging.getLogger(__name__)


def plan(settings: DictConfig, *, sheet_pages: int = 20) -> None:
    """Print and write the plan, and draw its contact sheet.

    Args:
        sheet_pages: of the contact sheet at most, of 120 pictures each; 0: none is drawn.

    Raises:
        SettingsError: the run would not start; the plan is printed first.
    """
    module = build_skeleton(settings)
    try_optimizer(module)
    coming = classes.undrawn(settings, module.data_resolution)
    scanned = as_drawn(settings, module, coming)
    made, problems = make(settings, scanned=scanned, module=module)
    problems += disk.problems(made["disk"], settings, run_dir())
    there = made | {"images": without(made["images"], coming)}
    made["contact_sheet"] = contact.coverage(there, sheet_pages)
    write(made, run_dir())
    fatal = [problem for problem in problems if problem.fatal]
    show(made, told=[problem.message for problem in fatal])
    if sheet_pages:
        draw(there | {"contact_sheet": made["contact_sheet"]}, scanned[0], data_options(settings, module), sheet_pages)
    require_sound(problems)


def draw(made: dict[str, Any], samples: list[Sample], data: Data, pages: int) -> None:
    """The contact sheet, where it is, and what it leaves out."""
    sheet = made["contact_sheet"]
    by_path = {str(sample.path): sample for sample in samples}
    written, broken = contact.write(made, by_path, run_dir(), data, pages=pages)
    for path in broken:
        log.warning(f"{path}: cannot be decoded, though its header can be read")
    if written:
        log.info(f"contact sheet: {written[0]}" + (f" to {written[-1].name}" if len(written) > 1 else ""))
    if sheet["pictures"] < sheet["of"]:
        log.warning(
            f"the contact sheet leaves out {sheet['of'] - sheet['pictures']} of {sheet['of']} pictures: it has the "
            f"worst of each bucket and of all, and others evenly; task.sheet_pages={sheet['pages_of_all']} draws all"
        )


Scanned = tuple[list[Sample], list[Problem]]


def make(
    settings: DictConfig, *, scanned: Scanned | None = None, module: DiffusionModule | None = None
) -> tuple[dict[str, Any], list[Problem]]:
    """The plan, and what is wrong or strange: fatal where it would keep the run from starting.

    Args:
        scanned: what `scan` gave; None: it is done here.
        module: a skeleton, which is measured and of no use afterwards; None: one is built here.
    """
    precision = choose(
        settings.trainer.precision, accelerator=settings.trainer.accelerator, devices=settings.trainer.devices
    )
    module = module or build_skeleton(settings)
    module.autocast_dtype = precision.autocast
    data = data_options(settings, module)
    samples, problems = scanned or scan(data, inpainting.mask_options(module))
    called = Called(data, seed=settings.seed, cached=data.cache and not module.trains_text)
    where = {"resolution": module.resolution, "step": module.bucket_step, "seed": settings.seed}
    train, held_out = laid_out(samples, data, **where)
    problems = problems + placing(train, held_out) + untaught(module, samples, called)
    problems += cut_off(samples, called, module) + inpainting.lacking_masks(module, samples)
    prior.check(module, samples)
    made = {
        "family": type(module).__name__,
        "checkpoint": module.checkpoint,
        "method": type(module.method).__name__,
        "precision": precision.name,
        "resolution": module.data_resolution,
        "resolutions": [] if data.bucket_sizes else shown_at(data, module.resolution, module.bucket_step),
        "batch_size": data.batch_size,
        "images_to_draw": sum(map(classes.missing, sources(data))),
        **of_images(train, held_out, problems, data, settings, called),
        "weights": memory.weights(module),
        "inpaint": of_masks(samples, module) if module.inpaints else None,
    }
    sizes = [Size(bucket["height"], bucket["width"]) for bucket in made["buckets"]]
    largest = max(sizes, key=lambda size: size.area, default=Size(module.data_resolution, module.data_resolution))
    made["memory"], encoded = memory.estimate(
        module,
        optimizer=settings.optimizer._target_.rsplit(".", 1)[-1],
        size=largest,
        batch_size=data.batch_size,
        keeps_encoders=module.trains_text or not data.cache,
        encodes_masked=module.inpaints and module.inpaint_options.masks != MaskSource.files,
    )
    made["disk"] = disk.estimate(made, module, settings, encoded if data.cache else None)
    batches = math.ceil(sum(bucket["batches"] for bucket in made["buckets"]) / made["ranks"])
    steps, concepts = made["total_steps"], made["concepts"]
    advice = advise(settings, module, samples, batches=batches, steps=steps, concepts=concepts)
    made["warnings"] += map(warning, advice)
    return made, problems + advice


def undrawn(settings: DictConfig) -> tuple[dict[str, Any], list[Problem]]:
    """The plan as it will be when the class images are drawn that are not there yet."""
    module = build_skeleton(settings)
    coming = classes.undrawn(settings, module.data_resolution)
    return make(settings, scanned=as_drawn(settings, module, coming), module=module)


def as_drawn(settings: DictConfig, module: DiffusionModule, coming: list[Sample]) -> Scanned:
    """The dataset, with class images that are still to be drawn as if they were there."""
    return scan(data_options(settings, module), inpainting.mask_options(module), coming)


def without(rows: list[dict[str, Any]], coming: list[Sample]) -> list[dict[str, Any]]:
    """The rows of images that can be looked at."""
    paths = {str(sample.path) for sample in coming}
    return [row for row in rows if row["path"] not in paths]


def untaught(module: DiffusionModule, samples: list[Sample], called: Called) -> list[Problem]:
    """The new words that no text of an image has."""
    if module.embeddings is None:
        return []
    train = (sample for sample in samples if not sample.validation)
    return module.embeddings.unused(text for sample in train for text in called.training.all_of(sample))


def of_masks(samples: list[Sample], module: DiffusionModule) -> dict[str, Any]:
    """Where the masks of an inpainting model come from."""
    options = module.inpaint_options
    return {
        "masks": options.masks.value,
        "files": sum(sample.mask is not None for sample in samples),
        "images": len(samples),
    }


def write(made: dict[str, Any], folder: Path) -> Path:
    """plan.json."""
    with whole(folder / "plan.json") as aside:
        aside.write_text(text(made))
    return folder / "plan.json"


def text(made: dict[str, Any]) -> str:
    """JSON of one line for each name, and for each image, bucket and warning; indented it takes ten times as long."""
    return "{\n" + ",\n".join(f" {json.dumps(name)}: {_lines(value)}" for name, value in made.items()) + "\n}\n"


def _lines(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return json.dumps(value)
    return "[\n" + ",\n".join(f"  {json.dumps(each)}" for each in value) + "\n ]"
