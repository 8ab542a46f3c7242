"""What becomes of every image: where it is cut, how often it is seen, or why it is not."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from omegaconf import DictConfig

from otl.config import ConceptType, Data, PartialBatches
from otl.datamodules.bucketed import rounds
from otl.datamodules.buckets import Ints
from otl.datamodules.layout import Layout, Place
from otl.datamodules.rounds import SURVEYED, Epoch, Rounds
from otl.datamodules.variations import copies
from otl.modules.training import steps_per_epoch
from otl.tasks import ranks
from otl.tasks.run import total_steps
from otl.tasks.texts import Called
from otl.types import Problem, Sample

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
    times = np.bincount(epoch.indices, minlength=len(train.samples))
    rows = [row | called.row(sample) for row, sample in zip(rows_of(train, stream, times, data), train.samples)]
    rows += left_out_rows(problems)
    apart = [row_of(sample, place) | called.row(sample) for sample, place in zip(held_out.samples, held_out.places)]
    total = len(np.unique(train.images)) + sum(len(problem.left_out) for problem in problems)
    shown = np.unique(train.images[times > 0])
    waiting = len(np.setdiff1d(train.images[_partly(stream)], shown))
    processes = ranks.count(settings.trainer)
    share = math.ceil(stream.length / processes)  # of a rank: they take the batches in turns
    return {
        "images_total": total,
        "images_used": len(shown),
        "images_waiting": waiting,
        "images_dropped": total - len(shown) - waiting,
        "images_validation": len(np.unique(held_out.images)),
        **of_cache(train, held_out, data),
        "concepts": concept_rows(stream, train, data),
        "buckets": bucket_rows(train, epoch),
        "ranks": processes,
        "steps_per_epoch": steps_per_epoch(share, settings.trainer.accumulate_grad_batches),
        "total_steps": total_steps(settings.trainer, share) if stream.length else 0,
        "captions": called.summary(held_out.samples),
        "warnings": [*map(warning, problems), *warnings(rows, apart, train, data)],
        "images": rows,
        "validation": apart,
    }


def of_cache(train: Layout, held_out: Layout, data: Data) -> dict[str, int]:
    """How many images the cache is to hold, all variations counted, and their pixels."""
    held = copies([*train.samples, *held_out.samples], data) if data.cache else []
    pixels = [number * place.bucket.area for number, place in zip(held, [*train.places, *held_out.places])]
    return {"images_cached": sum(held), "pixels_cached": sum(pixels)}


def rows_of(placed: Layout, stream: Rounds, times: Ints, data: Data) -> list[Row]:
    """One row for each image and resolution.

    Args:
        times: how often each is seen in the first epoch.
    """
    repeats = np.zeros(len(placed.samples))
    for group in stream.groups:
        repeats[group.members] = round(float(group.share), 4)
    draws = stream.draws(np.arange(SURVEYED))
    fates = {bucket: fate(draws[:, number], data) for number, bucket in enumerate(placed.buckets)}
    rows = []
    for sample, place, often, seen in zip(placed.samples, placed.places, repeats.tolist(), times.tolist()):
        dropped, reason = fates[place.bucket]
        rows.append(row_of(sample, place) | {"repeats": often, "seen": seen, "dropped": dropped, "reason": reason})
    return rows


def row_of(sample: Sample, place: Place) -> Row:
    """What is the same for every image, held out or not."""
    return {
        "path": str(sample.path),
        "concept": sample.concept,
        "size": list(sample.size),
        "bucket": list(place.bucket),
        "scale": round(place.scale, 4),
        "cropped": round(place.cropped_fraction, 4),
        "mask": None if sample.mask is None else str(sample.mask),
        "caption_missing": sample.caption_missing,
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
        return True, f"its bucket has {_up_to(draws)} of {data.batch_size} images, and data.partial_batches=drop"
    return False, f"{_up_to(rests)} of the bucket's {_up_to(draws)} images are left out of each epoch, by turns"


def _up_to(numbers: Ints) -> str:
    return str(numbers[0]) if (numbers == numbers[0]).all() else f"up to {numbers.max()}"


def _partly(stream: Rounds) -> Ints:
    """The samples of concepts that are not drawn whole, so that some have their turn in a later epoch."""
    return np.concatenate([np.zeros(0, np.int32), *(g.members for g in stream.groups if g.share.denominator > 1)])


def left_out_rows(problems: list[Problem]) -> list[Row]:
    """The files that are not trained on, such as those that cannot be read."""
    unknown = dict.fromkeys(("concept", "size", "bucket", "scale", "cropped", "mask", "caption"))
    fate = {"caption_missing": False, "texts": 0, "repeats": 0, "seen": 0, "dropped": True}
    left_out = [pair for problem in problems for pair in problem.left_out]
    return [{"path": path} | unknown | fate | {"reason": reason} for path, reason in left_out]


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
            "type": data.concepts[name].type.value if name in data.concepts else ConceptType.train.value,
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


def warnings(rows: list[Row], held_out: list[Row], placed: Layout, data: Data) -> list[Row]:
    """What is worth a look, the gravest first, and so are the files of each."""
    gone = [each for each in rows if each["dropped"] and each["bucket"]]  # the others are in problems
    shown = [each for each in rows if each["bucket"] and not each["dropped"]] + held_out
    cut = _worst(shown, "cropped", data.warn_crop)
    enlarged = _worst(shown, "scale", data.warn_upscale)
    again = _worst([each for each in rows if not each["dropped"]], "seen", 1)
    few = [bucket for bucket, members in placed.buckets.items() if len(members) < data.batch_size]
    found = {
        "dropped": ("{} never trained on", [f"{each['path']}: {each['reason']}" for each in gone]),
        "hard crops": (
            f"{{}} cut by more than {data.warn_crop:.0%} of the area (data.warn_crop)",
            [f"{each['path']}: {each['cropped']:.0%} cut off, for {_bucket(each)}" for each in cut],
        ),
        "upscales": (
            f"{{}} enlarged more than {data.warn_upscale:g} times (data.warn_upscale), and blurred by it",
            [f"{each['path']}: x{each['scale']:.2f}, for {_bucket(each)}" for each in enlarged],
        ),
        "repeated": (
            "{} seen more than once in the first epoch",
            [f"{each['path']}: {each['seen']} times" for each in again],
        ),
        "small buckets": (
            f"{len(few)} of {len(placed.sizes)} buckets have fewer images than a batch of {data.batch_size}",
            [f"{bucket}: {len(placed.buckets[bucket])} of {data.batch_size}" for bucket in few],
        ),
    }
    return [
        {"about": about, "message": message.format(_images(files)), "files": files}
        for about, (message, files) in found.items()
        if files
    ]


def _worst(rows: list[Row], what: str, limit: float) -> list[Row]:
    """Those above the limit, the largest first."""
    return sorted((each for each in rows if each[what] > limit), key=lambda each: -each[what])


def _bucket(row: Row) -> str:
    return "bucket {}x{}".format(*row["bucket"])


def _images(files: list[str]) -> str:
    return "1 image is" if len(files) == 1 else f"{len(files)} images are"
