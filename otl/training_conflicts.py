"""Settings of the training and its pictures that make no sense together, before torch is imported."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from otl.config import ConceptType, Problem
from otl.schedules import warmup_steps
from otl.signatures import Unknown
from otl.wording import show

TRAINING = {f"otl.tasks.{name}.{name}" for name in ("train", "plan")}
GROUPS = ("task", "trainer", "optimizer", "scheduler", "data", "callbacks", "sample")
SEEKING = ("Prodigy", "DAdapt")  # optimizers that find their step size themselves: lr is a factor of it
LARGEST_LR = 0.1  # above it, an optimizer that takes lr as it is diverges


def of_training(settings: dict[str, Any]) -> Iterator[Problem]:
    """What would have no effect or cannot be, where each setting has its right type."""
    task, trainer, optimizer, scheduler, data, callbacks, sample = (_group(settings, name) for name in GROUPS)
    if task.get("_target_") not in TRAINING:
        return
    yield from (problem for problem in of_optimizer(optimizer) if problem.fatal)
    steps = trainer.get("max_steps")
    if isinstance(steps, int) and steps > 0:
        yield from of_warmup(scheduler.get("warmup") or 0, steps)
    if not holds_out(data):
        best = _group(callbacks, "checkpoint").get("best")
        yield from without_validation(trainer.get("val_check_interval"), best=best)
    yield from of_pictures(sample)


def _group(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """One group of settings; nothing where it is switched off, left out or of a wrong type."""
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def of_optimizer(optimizer: dict[str, Any]) -> Iterator[Problem]:
    """A learning rate with which nothing, or nothing good, comes out."""
    target, lr = optimizer.get("_target_"), optimizer.get("lr")
    if not isinstance(lr, int | float) or not isinstance(target, str):
        return
    seeks = any(name in target for name in SEEKING)
    if seeks and lr < LARGEST_LR:
        message = (
            f"{lr:g} multiplies the step size that {target} finds itself, so that next to nothing would be trained"
        )
        yield Problem("optimizer.lr", f"{message}; set optimizer.lr=1")
    elif not seeks and lr >= LARGEST_LR:
        message = f"{lr:g} is far above what {target} is usually given (1e-5 to 1e-2): the run will likely diverge"
        yield Problem("optimizer.lr", message, fatal=False)


def of_warmup(warmup: Any, steps: int) -> Iterator[Problem]:
    """A learning rate that is never reached.

    Args:
        warmup: optimizer steps, or a share of the run below 1.
        steps: of the run, at most.
    """
    if isinstance(warmup, int | float) and steps and warmup_steps(warmup, steps) >= steps:
        message = (
            f"{warmup} steps of warm-up, but the run has {steps}: the learning rate would never be reached; give "
            "fewer, or a share of the run such as 0.1"
        )
        yield Problem("scheduler.warmup", message)


def holds_out(data: dict[str, Any]) -> bool:
    """Whether images may be held out; which, their contents decide."""
    concepts = [each for each in (data.get("concepts") or {}).values() if each.get("enabled", True)]
    shares = [data.get("validation_share"), *(each.get("validation_share") for each in concepts)]
    return any(shares) or any(each.get("type") == ConceptType.validation for each in concepts)


def without_validation(interval: Any, *, best: Any) -> Iterator[Problem]:
    """What would have no effect where no image is held out: trainer.val_check_interval, callbacks.checkpoint.best."""
    ways = "no image is held out; set data.validation_share, or a concept of type validation"
    for key, value in (("trainer.val_check_interval", interval), ("callbacks.checkpoint.best", best)):
        if value and value is not Unknown:
            yield Problem(key, f"{show(value)} would have no effect: {ways}")


def of_pictures(sample: dict[str, Any]) -> Iterator[Problem]:
    """Pictures that cannot be drawn: without seeds, or with not as many files as prompts."""
    prompts, image, mask = sample.get("prompts") or [], sample.get("image"), sample.get("mask")
    if prompts and sample.get("seeds") == []:
        yield Problem("sample.seeds", "is empty: give at least one, such as [0]")
    if (image is None) != (mask is None):
        given, absent = ("image", "mask") if mask is None else ("mask", "image")
        message = f"{show(sample[given])}: give sample.{absent} too, one needs the other"
        yield Problem(f"sample.{given}", message)
    for key, value in (("image", image), ("mask", mask)):
        if isinstance(value, list) and len(value) not in (1, len(prompts)):
            message = f"{len(value)} files for {len(prompts)} prompts: give one for each, or one for all"
            yield Problem(f"sample.{key}", message)
