"""Train, and write the file that comes out."""

from __future__ import annotations

import contextlib
import logging
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, open_dict

from otl.callbacks.export import Export
from otl.callbacks.hooks import Unprofiled, drop_empty
from otl.callbacks.progress import track
from otl.callbacks.sampling import Sampling
from otl.callbacks.stops import AtOnce, Stopped, at_once
from otl.callbacks.timing import due
from otl.config import RunEnded, SettingsError
from otl.datamodules.bucketed import BucketedDataModule, report, require_sound
from otl.formats.files import FAILING, DiskError, named
from otl.modules.base import DiffusionModule
from otl.modules.training import steps_per_epoch
from otl.quiet import undouble_lightning
from otl.tasks import classes, disk, manifest, plan, ranks, resuming, slurm, summary
from otl.tasks.folder import alone, refuse_overwrite
from otl.tasks.precision import allow_tf32, choose
from otl.tasks.run import build_data, build_module, build_skeleton, run_dir, total_steps, try_optimizer

log = logging.getLogger(__name__)


@at_once("the same line with resume=auto goes on from the newest checkpoint, or begins again where there is none")
def train(settings: DictConfig, folder: Path | None = None) -> None:
    """Train, and write the file that comes out.

    Args:
        folder: of the run; None: the one that Hydra made.
    """
    undouble_lightning()
    folder = run_dir() if folder is None else folder
    try:
        with named(folder, FAILING), alone(folder):
            run(settings, folder)
    except (Stopped, AtOnce) as error:
        slurm.requeue(settings, error)
        raise


def run(settings: DictConfig, folder: Path) -> None:
    """The whole run, in its order."""
    resume = resuming.find(settings.resume, folder)
    refuse_overwrite(settings, folder, resume)
    earlier = resuming.read(resume) if resume else None

    precision = choose(
        settings.trainer.precision, accelerator=settings.trainer.accelerator, devices=settings.trainer.devices
    )
    tf32 = allow_tf32(precision, accelerator=settings.trainer.accelerator)
    log.info(f"precision {precision.name}: {precision.reason}{'; what is left in fp32 is computed in TF32' * tf32}")
    seed_everything(settings.seed, verbose=False)
    skeleton = build_skeleton(settings)
    try_optimizer(skeleton)
    # Before anything is on a GPU: what `trainer.deterministic` sets has to be there when cuBLAS begins.
    trainer = build_trainer(settings, precision.name, trains_text=skeleton.trains_text)
    if classes.lacking(settings):  # whatever is wrong is told before weights are loaded to draw them
        made, problems = plan.undrawn(settings)
        require_sound(problems + disk.problems(made["disk"], settings, folder))
        classes.draw_missing(settings, autocast=precision.autocast)
    module = build_module(settings)
    module.run_dir, module.track = folder, track
    module.autocast_dtype, module.precision_name = precision.autocast, precision.name
    data = build_data(settings, skeleton)
    data.setup("fit")
    if trainer.is_global_zero:
        write_plan(settings, data, folder)
    if not data.validation_samples:
        trainer.limit_val_batches = 0  # else Lightning prepares for it after each epoch
    batches = data.batches_per_epoch(trainer.world_size)
    module.total_steps = total_steps(settings.trainer, batches)
    module.steps_per_epoch = steps_per_epoch(batches, settings.trainer.accumulate_grad_batches)
    set_end(trainer, module.total_steps)
    if settings.trainer.val_check_interval is not None:
        validate_by_steps(trainer, settings.trainer.val_check_interval)
    record = begin(settings, module, data, trainer, folder, earlier)
    if trainer.is_global_zero and not record["weights"]:
        trainer.callbacks.append(LambdaCallback(on_fit_start=lambda *_: manifest.add_weights(record, module, folder)))
        drop_empty(trainer.callbacks[-1:])
    summary.opening(module, data, trainer, batches)
    started = time.monotonic()
    try:
        with ranks.started(folder), named(folder, FAILING), resuming.put_back(resume):
            trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True if resume else None)
    except BaseException as error:
        end_ranks(trainer, error)
        with said(DiskError):  # what ended the run counts more
            manifest.finish(record, folder, outcome=outcome(error), step=trainer.global_step)
        raise
    if earlier is not None and earlier["global_step"] == trainer.global_step:
        complete(trainer, module)
    if trainer.global_step < module.total_steps:
        log.warning(f"ended early, {said_end(settings)}: go on with resume=auto, and more of it")
    manifest.finish(record, folder, outcome="finished", step=trainer.global_step)
    summary.closing(settings, trainer.global_step, folder, seconds=time.monotonic() - started)


def write_plan(settings: DictConfig, data: BucketedDataModule, folder: Path) -> None:
    """plan.json, of which nothing stays in memory: it has a row for every image. What is strange is logged.

    Raises:
        SettingsError: the run cannot or must not begin; lists all reasons.
    """
    made, problems = plan.make(settings, scanned=data.scanned)
    problems += disk.problems(made["disk"], settings, folder)
    for problem in problems:
        if not problem.fatal:
            log.warning(report(problem))
    require_sound(problems)
    plan.write(made, folder)


@rank_zero_only
def begin(
    settings: DictConfig,
    module: DiffusionModule,
    data: BucketedDataModule,
    trainer: Trainer,
    folder: Path,
    earlier: dict[str, Any] | None,
) -> dict[str, Any]:
    """The record of the run, which is still the same where it goes on; by the first rank, which keeps it."""
    contents = manifest.contents_of(data, module)
    module.dataset = resuming.dataset(data, contents)
    if earlier is not None:
        resuming.require_same(earlier, module, ranks=trainer.world_size, allowed=settings.allow_changes)
    return manifest.start(settings, contents, folder)


@contextlib.contextmanager
def said(kind: type[Exception]) -> Iterator[None]:
    """An error of that kind in here is in the log, and does not take the place of another."""
    try:
        yield
    except kind as error:
        log.error(str(error))


def complete(trainer: Trainer, module: DiffusionModule) -> None:
    """What a run lacks that has no step or no time left: Lightning does nothing then, and calls nobody."""
    module.to(trainer.strategy.root_device)
    for callback in trainer.callbacks:
        if isinstance(callback, Sampling | Export):
            callback.complete(trainer, module)


def end_ranks(trainer: Trainer, error: BaseException) -> None:
    """Where this process alone failed, the others would wait for it for ever."""
    alike = isinstance(error, RunEnded) and error.on_all_ranks
    if trainer.strategy.launcher is not None and not alike:
        trainer.strategy.launcher.kill(signal.SIGKILL)


def build_trainer(settings: DictConfig, precision: str, *, trains_text: bool = False) -> Trainer:
    """Lightning's Trainer with OTL's callbacks, in the order of the config.

    Args:
        precision: as Lightning calls it.
        trains_text: whether a text encoder trains.

    Raises:
        SettingsError: the machine lacks the devices, or Lightning refuses settings for another reason.
    """
    options = settings.trainer.copy()
    with open_dict(options):
        options.strategy = strategy(options, trains_text=trains_text)
        options.precision = precision
        options.max_steps, options.max_epochs = -1, -1
        if options.val_check_interval is not None:  # `validate_by_steps` decides
            options.check_val_every_n_epoch = None
    callbacks: list[Callback] = [
        instantiate(options_, _convert_="all") for options_ in settings.callbacks.values() if options_ is not None
    ]
    drop_empty(callbacks)
    profiler = {} if options.get("profiler") else {"profiler": Unprofiled()}
    logger = instantiate(settings.logger, _convert_="all") if settings.logger else False
    try:
        return instantiate(
            options,
            callbacks=callbacks,
            logger=logger,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,
            num_sanity_val_steps=0,
            log_every_n_steps=10,
            **profiler,
            _convert_="all",
        )
    except InstantiationException as error:
        if not isinstance(error.__cause__, MisconfigurationException):
            raise
        given = f"trainer.accelerator={options.accelerator}, trainer.devices={options.devices}"
        raise SettingsError(f"{given}: Lightning says: {error.__cause__}") from error


def strategy(trainer: DictConfig, *, trains_text: bool) -> str:
    """Lightning's name of how several processes train together.

    A text encoder's last layers may get no gradient (SDXL reads the last but one), which DDP must be told to expect.
    """
    asked = trainer.get("strategy") or "auto"
    if trains_text and asked in {"auto", "ddp"} and ranks.count(trainer) > 1:
        return "ddp_find_unused_parameters_true"
    return asked


def set_end(trainer: Trainer, steps: int) -> None:
    """The number of optimizer steps that the plan says; epochs follow from it."""
    trainer.fit_loop.epoch_loop.max_steps = steps
    trainer.fit_loop.max_epochs = -1


def validate_by_steps(trainer: Trainer, every: int) -> None:
    """After so many optimizer steps, across epochs.

    Lightning counts batches, of which the step at an epoch's end may take fewer than others.
    """
    loop = trainer.fit_loop.epoch_loop

    def is_due(data_fetcher: Any) -> bool:
        return loop._should_check_val_epoch() and not loop._should_accumulate() and due(trainer.global_step, every)

    loop._should_check_val_fx = is_due


def outcome(error: BaseException) -> str:
    """What the record says of a run that an error has ended."""
    return "interrupted" if isinstance(error, Stopped | AtOnce) else type(error).__name__


def said_end(settings: DictConfig) -> str:
    """By what, other than its last step."""
    limit = settings.trainer.get("max_time")
    return "by a callback" if limit is None else f"by trainer.max_time={limit}"
