"""Say what a run would do, before any weight is loaded: on the console and in plan.json."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from otl.config import Data, MaskSource, PartialBatches, SettingsError
from otl.datamodules.bucketed import report
from otl.datamodules.layout import Layout, batches, layout
from otl.datamodules.scan import scan
from otl.formats.files import whole
from otl.modules import inpainting, prior
from otl.modules.base import DiffusionModule
from otl.modules.training import steps_per_epoch
from otl.tasks import memory, ranks
from otl.tasks.advice import advise
from otl.tasks.precision import choose
from otl.tasks.run import build_skeleton, data_options, run_dir, total_steps
from otl.tasks.tables import show
from otl.types import Problem, Sample, Size

HARD_CROP = 0.15  # share of an image's area; what loses more is warned of
UPSCALE = 1.5  # what is enlarged more is warned of


def plan(settings: DictConfig) -> None:
    """Print and write the plan.

    Raises:
        SettingsError: the run would not start; the plan is printed first.
    """
    made, problems = make(settings)
    write(made, run_dir())
    show(made)
    if fatal := [problem for problem in problems if problem.fatal]:
        raise SettingsError("\n".join(map(report, fatal)))


Scanned = tuple[list[Sample], list[Problem]]


def make(settings: DictConfig, *, scanned: Scanned | None = None) -> tuple[dict[str, Any], list[Problem]]:
    """The plan, and what is wrong or strange: fatal where it would keep the run from starting.

    Args:
        scanned: what `scan` gave; None: it is done here.
    """
    precision = choose(
        settings.trainer.precision, accelerator=settings.trainer.accelerator, devices=settings.trainer.devices
    )
    module = build_skeleton(settings)
    module.autocast_dtype = precision.autocast
    data = data_options(settings, module)
    samples, problems = scanned or scan(data, inpainting.mask_options(module))
    problems = problems + untaught(module, samples)
    prior.check(module, samples)
    inpainting.check_masks(module, samples)
    made = {
        "family": type(module).__name__,
        "checkpoint": module.checkpoint,
        "method": type(module.method).__name__,
        "precision": precision.name,
        "resolution": module.data_resolution,
        "batch_size": data.batch_size,
        **of_images(samples, problems, data, module, settings),
        "weights": memory.weights(module),
        "inpaint": of_masks(samples, module) if module.inpaints else None,
    }
    sizes = [Size(bucket["height"], bucket["width"]) for bucket in made["buckets"]]
    made["memory"] = memory.estimate(
        module,
        optimizer=settings.optimizer._target_.rsplit(".", 1)[-1],
        size=max(sizes, key=lambda size: size.area, default=Size(module.data_resolution, module.data_resolution)),
        batch_size=data.batch_size,
        keeps_encoders=module.trains_text or not data.cache,
        encodes_masked=module.inpaints and module.inpaint_options.masks != MaskSource.files,
    )
    batches = math.ceil(sum(bucket["batches"] for bucket in made["buckets"]) / made["ranks"])
    advice = advise(settings, module, samples, batches=batches, steps=made["total_steps"])
    made["warnings"] += map(warning, advice)
    return made, problems + advice


def warning(problem: Problem) -> dict[str, Any]:
    """A problem as plan.json has it."""
    return {"about": problem.key, "message": problem.message, "files": problem.details}


def untaught(module: DiffusionModule, samples: list[Sample]) -> list[Problem]:
    """The new words that no image's caption has."""
    if module.embeddings is None:
        return []
    return module.embeddings.unused(text for sample in samples if not sample.validation for text in sample.captions)


def of_images(
    samples: list[Sample], problems: list[Problem], data: Data, module: DiffusionModule, settings: DictConfig
) -> dict[str, Any]:
    """What becomes of every image, and the steps that follow from it."""
    train = [sample for sample in samples if not sample.validation]
    placed = layout(train, resolution=module.data_resolution, step=module.bucket_step, buckets=data.buckets)
    epoch = batches(placed, batch_size=data.batch_size, partial=data.partial_batches, seed=settings.seed, epoch=0)
    rows = [row(sample, placed, index, data) for index, sample in enumerate(train)] + broken_rows(problems)
    seen = {index for batch in epoch for index, _ in batch}
    processes = ranks.count(settings.trainer)
    share = math.ceil(len(epoch) / processes)  # of a rank: they take the batches in turns
    return {
        "images_total": len(rows),
        "images_used": len(seen),
        "images_dropped": len(rows) - len(seen),
        "images_validation": len(samples) - len(train),
        "buckets": bucket_rows(placed, epoch),
        "ranks": processes,
        "steps_per_epoch": steps_per_epoch(share, settings.trainer.accumulate_grad_batches),
        "total_steps": total_steps(settings.trainer, share) if epoch else 0,
        "images": rows,
        "warnings": warnings(rows, placed, problems, data),
    }


def of_masks(samples: list[Sample], module: DiffusionModule) -> dict[str, Any]:
    """Where the masks of an inpainting model come from."""
    options = module.inpaint_options
    return {
        "masks": options.masks.value,
        "files": sum(sample.mask is not None for sample in samples),
        "images": len(samples),
    }


def row(sample: Sample, placed: Layout, index: int, data: Data) -> dict[str, Any]:
    """One image as plan.json has it."""
    place = placed.places[index]
    members = sum(placed.places[other].repeats for other in placed.buckets[place.bucket])
    dropped, reason = fate(members, data)
    return {
        "path": str(sample.path),
        "size": list(sample.size),
        "bucket": list(place.bucket),
        "scale": round(place.scale, 4),
        "cropped": round(place.cropped_fraction, 4),
        "repeats": place.repeats,
        "mask": None if sample.mask is None else str(sample.mask),
        "caption_missing": sample.caption_missing,
        "dropped": dropped,
        "reason": reason,
    }


def fate(members: int, data: Data) -> tuple[bool, str | None]:
    """Whether a bucket of so many images an epoch is never trained on, and what else becomes of its rest."""
    rest = members % data.batch_size
    if not rest or data.partial_batches == PartialBatches.keep:
        return False, None
    if data.partial_batches == PartialBatches.pad:
        return False, f"{data.batch_size - rest} of the bucket's images are seen once more each epoch"
    if members < data.batch_size:
        return True, f"its bucket has {members} images, less than a batch, and data.partial_batches=drop"
    return False, f"{rest} of the bucket's {members} images are left out of each epoch, by turns"


def broken_rows(problems: list[Problem]) -> list[dict[str, Any]]:
    """The files that cannot be read, as images that are dropped."""
    return [
        {"path": path, "size": None, "bucket": None, "scale": None, "cropped": None, "repeats": 0,
         "mask": None, "caption_missing": False, "dropped": True, "reason": reason}
        for problem in problems
        for path, reason in problem.left_out
    ]  # fmt: skip


def bucket_rows(placed: Layout, epoch: list[list[tuple[int, int]]]) -> list[dict[str, Any]]:
    """One row for each bucket that has images."""
    count = Counter(placed.places[batch[0][0]].bucket for batch in epoch)
    return [
        {"height": bucket.h, "width": bucket.w, "images": len(members), "batches": count[bucket]}
        for bucket, members in placed.buckets.items()
    ]


def warnings(rows: list[dict[str, Any]], placed: Layout, problems: list[Problem], data: Data) -> list[dict[str, Any]]:
    """What is worth a look, the files of each by severity."""
    found = [warning(problem) for problem in problems]
    cut = sorted((r for r in rows if (r["cropped"] or 0) > HARD_CROP), key=lambda r: -r["cropped"])
    if cut:
        files = [f"{r['path']}: {r['cropped']:.0%} cut off" for r in cut]
        message = f"{len(cut)} images lose more than {HARD_CROP:.0%} of their area to the crop"
        found.append({"about": "hard crops", "message": message, "files": files})
    small = sorted((r for r in rows if (r["scale"] or 0) > UPSCALE), key=lambda r: -r["scale"])
    if small:
        files = [f"{r['path']}: x{r['scale']:.2f}" for r in small]
        message = f"{len(small)} images are enlarged more than {UPSCALE} times: they will be blurred"
        found.append({"about": "upscales", "message": message, "files": files})
    few = [bucket for bucket, members in placed.buckets.items() if len(members) < data.batch_size]
    if few:
        message = f"{len(few)} of {len(placed.buckets)} buckets have fewer images than a batch of {data.batch_size}"
        found.append({"about": "small buckets", "message": message, "files": [str(bucket) for bucket in few]})
    gone = [f"{r['path']}: {r['reason']}" for r in rows if r["dropped"]]
    if gone:
        found.append({"about": "dropped", "message": f"{len(gone)} images are never trained on", "files": gone})
    return found


def write(made: dict[str, Any], folder: Path) -> Path:
    """plan.json."""
    with whole(folder / "plan.json") as aside:
        aside.write_text(json.dumps(made, indent=1))
    return folder / "plan.json"
