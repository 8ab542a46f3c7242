"""Settings that are accepted one by one and make no sense together with this data, this model or this length."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from omegaconf import DictConfig

from otl.augmentation import varying
from otl.config import CheckpointFormat, ConceptType, Data, LossWeight, Output, Problem, SampleOptions
from otl.conflicts.training import of_optimizer, of_warmup, without_validation
from otl.datamodules import grid, shapes
from otl.modules import stopping
from otl.modules.base import DiffusionModule
from otl.modules.training import steps_per_epoch
from otl.tasks.run import draws, plain
from otl.types import Advising, Sample
from otl.wording import counted, show

MOST_CLASS_IMAGES = 0.6  # share of an epoch
DRAWN = SampleOptions()  # as it is where nothing is said
WRITTEN_IN = {"format": "adapters", "checkpoint_format": "whole models", "trigger": "the headers of adapters"}


def advise(
    settings: DictConfig,
    module: DiffusionModule,
    samples: list[Sample],
    *,
    batches: int,
    steps: int,
    concepts: Sequence[Mapping[str, Any]] = (),
) -> list[Problem]:
    """What is wrong or strange, before any weight is loaded.

    Args:
        module: at least a skeleton.
        samples: of the whole dataset.
        batches: of one rank in an epoch.
        steps: optimizer steps of the whole run.
        concepts: as plan.json has them.
    """
    train = [sample for sample in samples if not sample.validation]
    return [
        *of_warmup(settings.scheduler.get("warmup") or 0, steps),
        *of_optimizer(settings.optimizer),
        *of_scaling(settings, module),
        *of_augmentation(settings),
        *of_class_images(settings, concepts),
        *of_resolutions(settings.data, module.bucket_step),
        *of_batches(settings, images=len(train), batches=batches),
        *of_average(settings, steps),
        *of_captions(settings, module),
        *of_validation(settings, held_out=len(samples) - len(train)),
        *of_layers(module),
        *of_stops(settings, module, batches=batches, steps=steps),
        *of_output(module),
        *of_pictures(settings),
        *of_weights(settings),
        *module.advice(),
    ]


def of_scaling(settings: DictConfig, module: DiffusionModule) -> Iterator[Problem]:
    """An optimizer that undoes fp16's scaling inside its step: gradients are looked at, and clipped, before."""
    if settings.optimizer.get("fused") and module.autocast_dtype == torch.float16:
        message = (
            "true does not go with fp16 (trainer.precision=16-mixed): trainer.gradient_clip_val and the guard would "
            "take the gradients for thousands of times as large as they are; leave it out"
        )
        yield Problem("optimizer.fused", message)


def of_augmentation(settings: DictConfig) -> Iterator[Problem]:
    """Chance that is drawn once, because the cache holds one variation of each image."""
    data = plain(settings)["data"]
    concepts = varying(data)
    if concepts and data["cache"] and data["image_variations"] == 1:
        message = (
            f"images of {', '.join(concepts)} are augmented by chance, but the cache holds one variation of each, "
            "which is seen every time; set data.image_variations to as many as are to be made, or data.cache=false for "
            "another one each time"
        )
        yield Problem("data.image_variations", message, fatal=False)


def of_class_images(settings: DictConfig, concepts: Sequence[Mapping[str, Any]]) -> Iterator[Problem]:
    """Those that drown the images to be learned, and those that are trained on like these."""
    kept = [row for row in concepts if row["type"] == ConceptType.regularisation.value]
    share, seen = sum(row["share"] for row in kept), sum(row["seen"] for row in concepts if row not in kept)
    if share > MOST_CLASS_IMAGES:
        name = max(kept, key=lambda row: row["seen"])["name"]
        message = f"{share:.0%} of what an epoch shows are class images, where half is usual: "
        message += f"data.concepts.{name}.samples={max(1, round(seen))} shows as many as of the others, by turns"
        yield Problem(f"data.concepts.{name}", message, fatal=False)
    for name, concept in settings.data.concepts.items():
        if concept.enabled and concept.generate and concept.type == ConceptType.train:
            message = "class images of type=train are trained on like any others, with the trigger and prefix of "
            message += f"data.captions, and may be held out; data.concepts.{name}.type=regularisation keeps them apart"
            yield Problem(f"data.concepts.{name}.type", message, fatal=False)


def of_resolutions(data: DictConfig, step: int) -> Iterator[Problem]:
    """Those of which the square bucket has other sides, because they are no multiples of the family's step."""
    given = {"data": data} | {f"data.concepts.{name}": each for name, each in data.concepts.items()}
    for key, asked in ((f"{name}.resolution", each.resolution) for name, each in given.items()):
        for resolution in () if asked is None else shapes.resolutions(asked, 0):
            if resolution % step:
                (square,) = grid.square(resolution, step)
                message = f"sides are multiples of {step} pixels for this family: {resolution} becomes {square}"
                yield Problem(key, message, fatal=False)


def of_batches(settings: DictConfig, *, images: int, batches: int) -> Iterator[Problem]:
    data, accumulate = settings.data, settings.trainer.accumulate_grad_batches
    if 0 < images < data.batch_size:
        message = f"{data.batch_size} images in a batch, but there are {images}: every batch has at most these"
        yield Problem("data.batch_size", message, fatal=False)
    if 0 < batches < accumulate:
        message = (
            f"{accumulate} batches make a step, but an epoch has {batches}: a step is taken at the end of each epoch, "
            "over these alone; lower it"
        )
        yield Problem("trainer.accumulate_grad_batches", message, fatal=False)


def of_average(settings: DictConfig, steps: int) -> Iterator[Problem]:
    decay = (settings.callbacks.get("ema") or {}).get("decay")
    if decay and steps and 1 / (1 - decay) > steps:
        message = (
            f"{decay} averages over the last {1 / (1 - decay):.0f} steps, but the run has {steps}: what is sampled and "
            f"exported would be close to the start; at most {1 - 1 / steps:.4g} fits"
        )
        yield Problem("callbacks.ema.decay", message, fatal=False)


def of_captions(settings: DictConfig, module: DiffusionModule) -> Iterator[Problem]:
    variants = settings.data.caption_variants
    if module.trains_text and variants != Data.caption_variants:
        message = f"{variants} has no effect while a text encoder trains: each draw then has a text of its own"
        yield Problem("data.caption_variants", message, fatal=False)


def of_validation(settings: DictConfig, *, held_out: int) -> Iterator[Problem]:
    """Where the share that is set has held out none of the images."""
    if not held_out:
        best = (settings.callbacks.get("checkpoint") or {}).get("best")
        yield from without_validation(settings.trainer.get("val_check_interval"), best=best)


def of_layers(module: DiffusionModule) -> Iterator[Problem]:
    """What does not fit the layers that the method has found."""
    if isinstance(module.method, Advising):
        yield from module.method.advice(module)


def of_stops(settings: DictConfig, module: DiffusionModule, *, batches: int, steps: int) -> Iterator[Problem]:
    """What stops training before the end, or after it."""
    if steps:
        per_epoch = steps_per_epoch(batches, settings.trainer.accumulate_grad_batches)
        yield from stopping.problems(module.groups, stopping.Length(steps, per_epoch))


def of_output(module: DiffusionModule) -> Iterator[Problem]:
    """What is set for files of another kind than the method writes."""
    assert module.method is not None
    for name, kind in WRITTEN_IN.items():
        value = getattr(module.output_options, name)
        if value != getattr(Output(), name) and name not in module.method.output_settings:
            message = f"would have no effect: it is for {kind}, and {type(module.method).__name__} writes none"
            yield Problem(f"output.{name}", f"{show(value)} {message}", fatal=False)
    title = module.output_options.title
    if title is not None and not titled(module):
        message = (
            f"{title} would have no effect: it is for the headers of adapters and of whole models in a single file"
        )
        yield Problem("output.title", message, fatal=False)


def titled(module: DiffusionModule) -> bool:
    """Whether the file that comes out has a header with a title."""
    assert module.method is not None
    settings, single = module.method.output_settings, CheckpointFormat.single_file
    return "trigger" in settings or (
        "checkpoint_format" in settings and module.output_options.checkpoint_format is single
    )


def of_pictures(settings: DictConfig) -> Iterator[Problem]:
    """What is said of pictures, where none are drawn or nothing reads it."""
    sample, guidance = settings.sample, settings.sample.guidance
    changed = [field.name for field in fields(SampleOptions) if sample[field.name] != getattr(DRAWN, field.name)]
    if changed and not draws(settings):
        value = show(sample[changed[0]])
        yield Problem(f"sample.{changed[0]}", f"{value} would have no effect: sample.prompts is empty", fatal=False)
    elif sample.prompts and settings.callbacks.get("sampling") is None:
        message = f"{counted(len(sample.prompts), 'prompt')} would have no effect: callbacks.sampling is switched off"
        yield Problem("sample.prompts", message, fatal=False)
    elif sample.negative_prompt and guidance is not None and guidance <= 1:
        message = f"{sample.negative_prompt} would have no effect: with sample.guidance={guidance:g} nothing is guided"
        yield Problem("sample.negative_prompt", message, fatal=False)


def of_weights(settings: DictConfig) -> Iterator[Problem]:
    """The weight of the original training, where another one takes its place."""
    gamma = settings.model.get("p2_gamma")
    if gamma not in (None, 1.0) and settings.loss.weight is not LossWeight.constant:
        message = f"{gamma:g} would have no effect: loss.weight={settings.loss.weight.value} takes its place"
        yield Problem("model.p2_gamma", message, fatal=False)
