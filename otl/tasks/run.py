"""What the tasks that need a model share: the objects that the settings describe."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from otl.config import CaptionSource, Data, SettingsError
from otl.datamodules import captions, shapes
from otl.datamodules.bucketed import BucketedDataModule
from otl.methods import templates
from otl.modules import inpainting, samplers
from otl.modules.base import DiffusionModule
from otl.modules.training import steps_per_epoch
from otl.types import Captions

log = logging.getLogger(__name__)

DEFAULT_STEPS = 2000  # optimizer steps where neither max_steps nor max_epochs is given


def build_module(settings: DictConfig) -> DiffusionModule:
    """The family with its method and options; no weights yet."""
    module: DiffusionModule = instantiate(settings.model, _convert_="all")
    module.method = instantiate(settings.method, _convert_="all")
    module.optimizer = deferred(settings.optimizer)
    module.lr_schedule = deferred(settings.scheduler)
    module.loss_options = OmegaConf.to_object(settings.loss)
    module.noise_options = OmegaConf.to_object(settings.noise)
    module.inpaint_options = OmegaConf.to_object(settings.inpaint)
    module.sample_options = OmegaConf.to_object(settings.sample)
    module.output_options = OmegaConf.to_object(settings.output)
    module.seed = settings.seed
    module.data_resolution = shapes.side(OmegaConf.to_object(settings.data), module.resolution, module.bucket_step)
    module.settings = plain(settings)
    return module


def build_skeleton(settings: DictConfig) -> DiffusionModule:
    """The same on the meta device: what there will be, before any weight is loaded.

    Raises:
        SettingsError: the method does not fit the model, or something is set that it cannot have: what only inpainting
            models have, or a sampler or a number of steps that cannot draw it.
    """
    module = build_module(settings)
    module.build_skeleton()
    inpainting.check_settings(module)
    drawn = module.sample_options
    samplers.refuse(module, drawn.sampler, drawn.timestep_spacing)
    if draws(settings):
        samplers.refuse_steps(module, drawn.steps, drawn.sampler)
    return module


def try_optimizer(module: DiffusionModule) -> None:
    """Make the optimizer once, of one weight: what its library refuses is told before anything is loaded or cached.

    Raises:
        SettingsError: with the library's words.
    """
    assert module.optimizer is not None
    try:
        module.optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (ValueError, TypeError, RuntimeError) as error:
        raise SettingsError(f"optimizer: {module.settings['optimizer']['_target_']} says: {error}") from error


def draws(settings: DictConfig) -> bool:
    """Whether any picture is drawn: of the prompts, or of a class."""
    return bool(settings.sample.prompts) or any(each.generate for each in settings.data.concepts.values())


def deferred(options: DictConfig) -> functools.partial[Any]:
    """What `_target_` names, to be called later with the other keys."""
    checked = instantiate(options, _partial_=True, _convert_="all")
    # Hydra's own partial checks its target again at every call: half a millisecond a step for the schedule.
    return functools.partial(checked.func, *checked.args, **checked.keywords)


def data_options(settings: DictConfig, module: DiffusionModule) -> Data:
    """The dataset's settings; images without captions get those of the method, where it has any for them.

    Raises:
        SettingsError: it has, and prompts are no source of captions.
    """
    data: Data = OmegaConf.to_object(settings.data)  # type: ignore[assignment]
    if not isinstance(module.method, Captions):
        return data
    own = {"data": data} if data.path is not None else {}
    for name, each in (own | data.concepts).items():
        texts = module.method.captions(name)
        if texts:
            read = CaptionSource.prompt in captions.options(data)[name].sources
            templates.require_source(captions.setting(name), read=read)
        if each.prompt is None:
            each.prompt = "\n".join(texts) or None
    return data


def build_data(settings: DictConfig, module: DiffusionModule) -> BucketedDataModule:
    """The dataset of the run, to be scanned.

    Args:
        module: built, at least without weights.
    """
    return BucketedDataModule(
        data_options(settings, module),
        resolution=module.resolution,
        step=module.bucket_step,
        seed=settings.seed,
        inpaint=inpainting.mask_options(module),
        hides=module.inpaints,
    )


def plain(settings: DictConfig) -> dict[str, Any]:
    """The resolved settings as plain dicts, lists, words and numbers."""
    return OmegaConf.to_container(settings, resolve=True, enum_to_str=True)  # type: ignore[return-value]


def run_dir() -> Path:
    """The run's folder, which Hydra made."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def total_steps(trainer: DictConfig, batches: int) -> int:
    """Optimizer steps of the whole run.

    Args:
        trainer: the settings of that group.
        batches: in one epoch, of one rank.

    Raises:
        SettingsError: not a single step.
    """
    by_steps, by_epochs = trainer.max_steps, trainer.max_epochs
    per_epoch = steps_per_epoch(batches, trainer.accumulate_grad_batches)
    ends = [by_steps if by_steps is not None and by_steps >= 0 else None]
    ends.append(by_epochs * per_epoch if by_epochs is not None and by_epochs >= 0 else None)
    given = [end for end in ends if end is not None]
    total = min(given) if given else DEFAULT_STEPS
    if total < 1 or per_epoch < 1:
        raise SettingsError(
            f"the run would take no step ({batches} batches an epoch, trainer.max_steps={by_steps}, "
            f"trainer.max_epochs={by_epochs}): lower data.batch_size, set data.partial_batches=keep or add images"
        )
    return total
