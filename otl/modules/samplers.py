"""How pictures are denoised: the schedulers behind `sample.sampler`, and which timesteps they visit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers

from otl import agreement, noise
from otl.config import Sampler, TimestepSpacing

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

DPM = diffusers.DPMSolverMultistepScheduler
SAMPLERS: dict[Sampler, tuple[Any, dict[str, Any]]] = {  # class, and what of its config the name means
    Sampler.ddim: (diffusers.DDIMScheduler, {"clip_sample": False}),  # latents are not bounded by 1
    Sampler.ddpm: (diffusers.DDPMScheduler, {"clip_sample": False}),
    Sampler.euler: (diffusers.EulerDiscreteScheduler, {"use_karras_sigmas": False}),
    Sampler.euler_a: (diffusers.EulerAncestralDiscreteScheduler, {}),
    Sampler.dpmpp_2m: (DPM, {"algorithm_type": "dpmsolver++", "use_karras_sigmas": False}),
    Sampler.dpmpp_2m_karras: (DPM, {"algorithm_type": "dpmsolver++", "use_karras_sigmas": True}),
    Sampler.dpmpp_2m_sde: (DPM, {"algorithm_type": "sde-dpmsolver++", "use_karras_sigmas": False}),
    Sampler.unipc: (diffusers.UniPCMultistepScheduler, {"use_karras_sigmas": False}),
}


def scheduler(module: DiffusionModule, sampler: Sampler | None, spacing: TimestepSpacing | None) -> Any:
    """The pipeline's own scheduler, or one that agrees with how the run trains and with what is asked for.

    Raises:
        SettingsError: as `refuse`.
    """
    refuse(module, sampler, spacing)
    own = module.pipeline.scheduler
    changes: dict[str, Any] = {}
    if module.prediction is not None:
        changes["prediction_type"] = module.prediction
    if module.zero_terminal_snr is not None:
        changes["rescale_betas_zero_snr"] = module.zero_terminal_snr
    if module.zero_terminal_snr:
        changes["timestep_spacing"] = "trailing"
    if changes:  # not every scheduler knows of them
        sampler = sampler or Sampler.ddim
    if spacing is not None:
        changes["timestep_spacing"] = spacing.value
    if sampler is None:
        return own if not changes else type(own).from_config(own.config, **changes)
    kind, options = SAMPLERS[sampler]
    return kind.from_config(own.config, **options, **changes)


def refuse(module: DiffusionModule, sampler: Sampler | None, spacing: TimestepSpacing | None) -> None:
    """Refuse what the model cannot be drawn with; weights are not needed.

    Raises:
        SettingsError: as `agreement.require_sampler`.
    """
    agreement.require_sampler(sampler, spacing, schedule(module), family=type(module).__name__)


def refuse_steps(module: DiffusionModule, steps: int, sampler: Sampler | None) -> None:
    """Refuse numbers of steps that cannot be drawn; weights are not needed.

    Raises:
        SettingsError: as `agreement.require_steps`.
    """
    config = module.pipeline.scheduler.config
    changed = module.prediction is not None or module.zero_terminal_snr is not None
    agreement.require_steps(
        steps,
        sampler or (Sampler.ddim if changed else config.get("_class_name")),
        timesteps=config["num_train_timesteps"] if isinstance(module.noise_schedule, noise.Discrete) else None,
        alone=module.single_step,
        family=type(module).__name__,
    )


def schedule(module: DiffusionModule) -> agreement.Schedule:
    """What samplers have to know of the module's noise schedule."""
    return agreement.Schedule(
        prediction=module.noise_schedule.prediction,
        discrete=isinstance(module.noise_schedule, noise.Discrete),
        pure=noise.ends_in_noise(module.noise_schedule),
        karras=bool(module.pipeline.scheduler.config.get("use_karras_sigmas")),
    )
