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
HOLD_OUT = "no image is held out; set data.validation_share, or a concept of type validation"
UNFIT = {  # argument of Lightning's Trainer -> the values that change nothing, and what to do instead
    "fast_dev_run": ((False, 0), "for a short trial set trainer.max_steps=2"),
    "barebones": ((False,), "what a run records cannot be switched off as a whole; callbacks.NAME=null leaves one out"),
    "overfit_batches": ((0, 0.0), "the plan would not know of it; give fewer images"),
    "limit_train_batches": (
        (None, 1.0),
        "the plan would not know of it; data.concepts.NAME.samples shows fewer images",
    ),
    "limit_test_batches": ((None,), "nothing is tested; data.validation_share holds images out"),
    "limit_predict_batches": ((None,), "a training predicts nothing"),
    "reload_dataloaders_every_n_epochs": ((0,), "every epoch has an order of its own as it is"),
    "sync_batchnorm": ((False,), "no layer that trains takes means over a batch"),
    "default_root_dir": ((None,), "the run's folder is hydra.run.dir"),
    "enable_autolog_hparams": ((True,), "all settings are in the run's folder as it is"),
    "model_registry": ((None,), "files are written into the run's folder"),
}


def of_training(settings: dict[str, Any]) -> Iterator[Problem]:
    """What would have no effect or cannot be, where each setting has its right type."""
    task, trainer, optimizer, scheduler, data, callbacks, sample = (_group(settings, name) for name in GROUPS)
    if task.get("_target_") not in TRAINING:
        return
    yield from (problem for problem in of_optimizer(optimizer) if problem.fatal)
    steps = trainer.get("max_steps")
    if isinstance(steps, int) and steps > 0:
        yield from of_warmup(scheduler.get("warmup") or 0, steps)
    yield from of_trainer(trainer, callbacks)
    if not holds_out(data):
        best = _group(callbacks, "checkpoint").get("best")
        yield from without_validation(trainer.get("val_check_interval"), best=best)
        yield from without_validation_in(trainer)
    yield from of_pictures(sample)
    yield from of_going_on(settings, callbacks)


def of_going_on(settings: dict[str, Any], callbacks: dict[str, Any]) -> Iterator[Problem]:
    """A run that cannot be gone on with, and changes that are allowed for no earlier one."""
    resume = settings.get("resume")
    if resume == "auto" and callbacks.get("checkpoint", Unknown) is None:
        message = "auto goes on from checkpoints, and callbacks.checkpoint=null makes none: leave one of them out"
        yield Problem("resume", message)
    if resume is None and settings.get("allow_changes") is True:
        yield Problem("allow_changes", "true would have no effect: nothing is gone on with; it needs resume=auto")


def _group(settings: dict[str, Any], name: str) -> dict[str, Any]:
    """One group of settings; nothing where it is switched off, left out or of a wrong type."""
    found = settings.get(name)
    return found if isinstance(found, dict) else {}


def of_trainer(trainer: dict[str, Any], callbacks: dict[str, Any]) -> Iterator[Problem]:
    """What Lightning would do, and a run of OTL cannot or does not."""
    for name, (idle, instead) in UNFIT.items():
        value = trainer.get(name, idle[0])
        if value is not Unknown and not any(value == each and type(value) is type(each) for each in idle):
            yield Problem(f"trainer.{name}", f"{show(value)} has no place in a run of OTL: {instead}")
    interval, epochs = trainer.get("val_check_interval"), trainer.get("check_val_every_n_epoch")
    if interval is not None and epochs not in (None, 1, Unknown):
        message = f"{show(epochs)} would have no effect beside trainer.val_check_interval={show(interval)}: set one"
        yield Problem("trainer.check_val_every_n_epoch", message)
    if trainer.get("gradient_clip_algorithm") is not None and trainer.get("gradient_clip_val") in (None, 0):
        message = (
            f"{show(trainer['gradient_clip_algorithm'])} would have no effect: trainer.gradient_clip_val says how much"
        )
        yield Problem("trainer.gradient_clip_algorithm", message)
    if trainer.get("max_time") is None and not any(map(_may_stop, callbacks.values())):
        for name in ("min_steps", "min_epochs"):
            if trainer.get(name):
                message = f"{show(trainer[name])} would have no effect: nothing ends the run before its last step"
                yield Problem(
                    f"trainer.{name}", f"{message}; trainer.max_time or a callback such as EarlyStopping would"
                )


def _may_stop(callback: Any) -> bool:
    """Whether a callback may end the run early; none of OTL's does."""
    return isinstance(callback, dict) and not str(callback.get("_target_")).startswith("otl.callbacks.")


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
    for key, value in (("trainer.val_check_interval", interval), ("callbacks.checkpoint.best", best)):
        if value and value is not Unknown:
            yield Problem(key, f"{show(value)} would have no effect: {HOLD_OUT}")


def without_validation_in(trainer: dict[str, Any]) -> Iterator[Problem]:
    """The same of the Trainer's arguments that no YAML lists."""
    for name, idle in (("check_val_every_n_epoch", (None, 1)), ("limit_val_batches", (None, 1.0))):
        if trainer.get(name) not in (*idle, Unknown):
            yield Problem(f"trainer.{name}", f"{show(trainer[name])} would have no effect: {HOLD_OUT}")


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
