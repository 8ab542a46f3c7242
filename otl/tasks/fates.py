"""What becomes of every image: where it is cut, how often it is seen, or why it is not."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from omegaconf import DictConfig

from otl.config import Data, PartialBatches
from otl.datamodules.bucketed import rounds
from otl.datamodules.buckets import Ints
from otl.datamodules.layout import Layout, Place
from otl.datamodules.rounds import SURVEYED, Epoch, Rounds
from otl.datamodules.variations import cached_images
from otl.modules.training import steps_per_epoch
from otl.tasks import ranks
from otl.tasks.run import total_steps
from otl.tasks.texts import Called
from otl.types import Problem, Sample

HARD_CROP = 0.15  # share of an image's area; what loses more is warned of
UPSCALE = 1.5  # what is enlarged more is warned of

Row = dict[str, Any]
"""One image as plan.json has it."""


def of_images(
    train: Layout, held_out: Layout, problems: list[Problem], data: Data, settings: DictConfig, called: Called
) -> dict[str, Any]:
    """What becomes of every image, and the steps that follow from it.

    Args:
        train, held_out: as `laid_out` gives them.
        problems: what was found; the files that they leave out are images, too.
        called: what the images are called.
    """
    stream = rounds(train, data, settings.seed)
    epoch = stream.epoch(0)
    rows = [row | called.row(sample) for row, sample in zip(rows_of(train, stream, data), train.samples)]
    rows += left_out_rows(problems)
    total = len(np.unique(train.images)) + sum(len(problem.left_out) for problem in problems)
    shown = np.unique(train.images[epoch.indices])
    waiting = len(np.setdiff1d(train.images[_partly(stream)], shown))
    processes = ranks.count(settings.trainer)
    share = math.ceil(stream.length / processes)  # of a rank: they take the batches in turns
    return {
        "images_total": total,
        "images_used": len(shown),
        "images_waiting": waiting,
        "images_dropped": total - len(shown) - waiting,
        "images_validation": len(np.unique(held_out.images)),
        "images_cached": cached_images(train.samples + held_out.samples, data) if data.cache else 0,
        "concepts": concept_rows(stream, train, data),
        "buckets": bucket_rows(train, epoch),
        "ranks": processes,
        "steps_per_epoch": steps_per_epoch(share, settings.trainer.accumulate_grad_batches),
        "total_steps": total_steps(settings.trainer, share) if stream.length else 0,
        "captions": called.summary(held_out.samples),
        "images": rows,
        "warnings": warnings(rows, train, problems, data),
    }


def rows_of(placed: Layout, stream: Rounds, data: Data) -> list[Row]:
    """One row for each image that has a place."""
    repeats = np.zeros(len(placed.samples))
    for group in stream.groups:
        repeats[group.members] = float(group.share)
    draws = stream.draws(np.arange(SURVEYED))
    fates = {bucket: fate(draws[:, number], data) for number, bucket in enumerate(placed.buckets)}
    return [
        row(sample, place, round(often, 4), *fates[place.bucket])
        for sample, place, often in zip(placed.samples, placed.places, repeats.tolist())
    ]


def row(sample: Sample, place: Place, repeats: float, dropped: bool, reason: str | None) -> Row:
    return {
        "path": str(sample.path),
        "size": list(sample.size),
        "bucket": list(place.bucket),
        "scale": round(place.scale, 4),
        "cropped": round(place.cropped_fraction, 4),
        "repeats": repeats,
        "mask": None if sample.mask is None else str(sample.mask),
        "caption_missing": sample.caption_missing,
        "dropped": dropped,
        "reason": reason,
    }


def fate(draws: Ints, data: Data) -> tuple[bool, str | None]:
    """Whether a bucket is never trained on, and what else becomes of those of its images that do not fill a batch.

    Args:
        draws: of the bucket, in each of many rounds.
    """
    rests = draws % data.batch_size
    if not rests.any() or data.partial_batches == PartialBatches.keep:
        return False, None
    if data.partial_batches == PartialBatches.pad:
        added = _up_to(-draws % data.batch_size)
        return False, f"{added} of the bucket's images are seen once more each epoch"
    if draws.max() < data.batch_size:
        return True, f"its bucket has {_up_to(draws)} images, less than a batch, and data.partial_batches=drop"
    return False, f"{_up_to(rests)} of the bucket's {_up_to(draws)} images are left out of each epoch, by turns"


def _up_to(numbers: Ints) -> str:
    return str(numbers[0]) if (numbers == numbers[0]).all() else f"up to {numbers.max()}"


def _partly(stream: Rounds) -> Ints:
    """The samples of concepts that are not drawn whole, so that some have their turn in a later epoch."""
    return np.concatenate([np.zeros(0, np.int32), *(g.members for g in stream.groups if g.share.denominator > 1)])


def left_out_rows(problems: list[Problem]) -> list[Row]:
    """The files that are not trained on, such as those that cannot be read."""
    return [
        {"path": path, "size": None, "bucket": None, "scale": None, "cropped": None, "repeats": 0,
         "mask": None, "caption_missing": False, "caption": None, "texts": 0, "dropped": True, "reason": reason}
        for problem in problems
        for path, reason in problem.left_out
    ]  # fmt: skip


def concept_rows(stream: Rounds, placed: Layout, data: Data) -> list[Row]:
    """One row for each concept: how many images it has, and how many an epoch shows on average."""
    members: dict[str, list[Ints]] = {}
    drawn: dict[str, Fraction] = {}
    for group in stream.groups:
        members.setdefault(group.concept, []).append(placed.images[group.members])
        drawn[group.concept] = drawn.get(group.concept, Fraction(0)) + group.quota
    images = {name: len(np.unique(np.concatenate(each))) for name, each in members.items()}
    return [
        {
            "name": name,
            "images": count,
            "seen": round(float(drawn[name]), 4),
            "share": round(float(drawn[name] / sum(drawn.values())), 4),
            "loss_weight": data.concepts[name].loss_weight if name in data.concepts else 1.0,
        }
        for name, count in images.items()
    ]


def bucket_rows(placed: Layout, epoch: Epoch) -> list[Row]:
    """One row for each bucket that has images."""
    firsts = epoch.draws[epoch.bounds[:, 0], 0]  # an image of each batch
    batches = np.bincount(placed.numbers[firsts], minlength=len(placed.sizes))
    return [
        {"height": bucket.h, "width": bucket.w, "images": len(members), "batches": int(count)}
        for (bucket, members), count in zip(placed.buckets.items(), batches)
    ]


def warning(problem: Problem) -> Row:
    """A problem as plan.json has it."""
    return {"about": problem.key, "message": problem.message, "files": problem.details}


def warnings(rows: list[Row], placed: Layout, problems: list[Problem], data: Data) -> list[Row]:
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
