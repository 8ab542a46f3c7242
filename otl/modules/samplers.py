"""How pictures are denoised: the schedulers behind `sample.sampler`, and which timesteps they visit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import diffusers

from otl import noise
from otl.config import Sampler, SettingsError, TimestepSpacing

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
        SettingsError: the schedule is not discrete, has its own timesteps, or would not begin at pure noise.
    """
    if sampler is None and spacing is None:
        return
    if not isinstance(module.noise_schedule, noise.Discrete):
        given = f"sample.sampler={sampler.value}" if sampler else f"sample.timestep_spacing={spacing and spacing.value}"
        raise SettingsError(
            f"{given}: {type(module).__name__} has a noise schedule of its own, which only its pipeline's sampler "
            "knows; leave it at null"
        )
    pure = noise.ends_in_noise(module.noise_schedule)
    if spacing is not None and karras(module, sampler):
        raise SettingsError(
            f"sample.timestep_spacing={spacing.value} would have no effect: Karras' noise levels, which "
            f"{'the checkpoint asks for' if sampler is None else f'sample.sampler={sampler.value} means'}, are spaced "
            "by a rule of their own; set sample.sampler=dpmpp_2m or another one, or leave the spacing out"
        )
    if sampler is Sampler.dpmpp_2m_karras and pure:
        raise SettingsError(
            "sample.sampler=dpmpp_2m_karras: with zero terminal SNR its steps would all be spent near pure noise; take "
            "dpmpp_2m"
        )
    if spacing is TimestepSpacing.leading and pure:
        raise SettingsError(
            "sample.timestep_spacing=leading: with zero terminal SNR a picture begins at the last timestep, which this "
            "leaves out; take trailing"
        )


def karras(module: DiffusionModule, sampler: Sampler | None) -> bool:
    """Whether the noise levels are those of https://arxiv.org/abs/2206.00364, equation 5."""
    config = module.pipeline.scheduler.config if sampler is None else SAMPLERS[sampler][1]
    return bool(config.get("use_karras_sigmas"))
