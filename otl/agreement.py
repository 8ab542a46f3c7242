"""What goes together of prediction, schedule, loss weight, noise and samplers: on plain values. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from otl.config import LossWeight, Sampler, SettingsError, TimestepSpacing

ONE_STEP = (  # samplers that also say what the picture would be, which PixArt's pipeline reads after a single step
    *(Sampler.ddim, Sampler.ddpm, Sampler.euler, Sampler.euler_a),
    *("DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"),
)


MOST_LAYERS = 1_000  # of a block, or blocks of a network
MOST = 2**20  # of channels, words of a vocabulary and all else that is counted


@dataclass(frozen=True)
class Schedule:
    """What samplers have to know of a noise schedule."""

    prediction: str  # epsilon, v_prediction, sample or flow
    discrete: bool  # whether it has timesteps of its own, among which a sampler chooses
    pure: bool  # whether nothing of the picture is left at the last one: zero terminal SNR, a flow
    karras: bool = False  # whether the checkpoint asks for the noise levels of https://arxiv.org/abs/2206.00364


def require_size(config: Mapping[str, Any], *, where: str) -> None:
    """Refuse a network that nobody has: it would be built for ever, or fill the memory.

    Args:
        config: of the network.
        where: it lies.

    Raises:
        SettingsError: it has more layers, channels or anything else that is counted.
    """
    for name, value in config.items():
        most = MOST_LAYERS if re.search("layers|blocks", name) else MOST
        for number in value if isinstance(value, list) else [value]:
            if isinstance(number, int) and number > most:
                raise SettingsError(
                    f"model.checkpoint={where}: asks for {name}={number}, and no network has more than {most}: the "
                    "file is damaged or made to do harm; give another checkpoint"
                )


def require_prediction(prediction: str, accepted: Sequence[str], *, zero_snr: bool | None, family: str) -> None:
    """Refuse what the denoiser cannot be trained to predict.

    Args:
        accepted: what this family's can be.
        zero_snr: as set; None: as the checkpoint's scheduler says.

    Raises:
        SettingsError: none of these, or pure noise with epsilon-prediction, which says nothing about the picture then.
    """
    if zero_snr and prediction == "epsilon":
        way = "add model.prediction=v_prediction" if "v_prediction" in accepted else "leave it out"
        raise SettingsError(f"model.zero_terminal_snr=true: does not go with epsilon-prediction: {way}")
    if prediction not in accepted:
        raise SettingsError(f"model.prediction={prediction}: {family} learns with {', '.join(accepted)} only")


def require_weight(weight: LossWeight, prediction: str) -> None:
    """Refuse a weight that means nothing for what the denoiser predicts.

    Raises:
        SettingsError: weights by signal to noise ratio with a flow, or by sigma without one.
    """
    if prediction == "flow" and weight in (LossWeight.min_snr, LossWeight.debiased, LossWeight.p2):
        raise SettingsError(
            f"loss.weight={weight.value}: is made for predictions of the noise, of v or of the picture; this model "
            "predicts a flow, from the picture to noise. Set loss.weight=constant or loss.weight=sigma"
        )
    if prediction != "flow" and weight is LossWeight.sigma:
        raise SettingsError(
            f"loss.weight=sigma: is made for models that predict a flow; this one's prediction is {prediction}. "
            "Set loss.weight to constant, min_snr, debiased or p2"
        )


def require_offset(*, pure: bool) -> None:
    """Raises SettingsError: generalized offset noise would be 0 at every step but the last."""
    if pure:
        raise SettingsError(
            "noise.offset_generalized=true: does not go with a schedule that ends in pure noise (zero terminal SNR, or "
            "a flow): its strength is relative to that of the last step. Set noise.offset_generalized=false"
        )


def require_sampler(
    sampler: Sampler | None, spacing: TimestepSpacing | None, schedule: Schedule, *, family: str
) -> None:
    """Refuse what pictures of the model cannot be drawn with.

    Raises:
        SettingsError: the schedule is not discrete, has its own timesteps, or would not begin at pure noise.
    """
    if sampler is None and spacing is None:
        return
    if not schedule.discrete:
        given = f"sample.sampler={sampler.value}" if sampler else f"sample.timestep_spacing={spacing and spacing.value}"
        raise SettingsError(
            f"{given}: {family} has a noise schedule of its own, which only its pipeline's sampler knows; leave it at "
            "null"
        )
    karras = schedule.karras if sampler is None else sampler is Sampler.dpmpp_2m_karras
    if spacing is not None and karras:
        raise SettingsError(
            f"sample.timestep_spacing={spacing.value}: would have no effect: Karras' noise levels, which "
            f"{'the checkpoint asks for' if sampler is None else f'sample.sampler={sampler.value} means'}, are spaced "
            "by a rule of their own; set sample.sampler=dpmpp_2m or another one, or leave the spacing out"
        )
    if sampler is Sampler.dpmpp_2m_karras and schedule.pure:
        raise SettingsError(
            "sample.sampler=dpmpp_2m_karras: with zero terminal SNR its steps would all be spent near pure noise; take "
            "dpmpp_2m"
        )
    if spacing is TimestepSpacing.leading and schedule.pure:
        raise SettingsError(
            "sample.timestep_spacing=leading: with zero terminal SNR a picture begins at the last timestep, which this "
            "leaves out; take trailing"
        )


def require_steps(
    steps: int, sampler: Sampler | str | None, *, timesteps: int | None, alone: bool, family: str
) -> None:
    """Refuse numbers of denoising steps that a sampler or the stock pipeline cannot take.

    Args:
        sampler: or the name of diffusers' class; None: it is not known.
        timesteps: of the schedule; None: it is continuous.
        alone: whether the pipeline can draw in a single step with any sampler.

    Raises:
        SettingsError: there are not so many timesteps, or one step alone is taken by other samplers only.
    """
    if timesteps is not None and steps > timesteps:
        raise SettingsError(f"sample.steps={steps}: the schedule has {timesteps} timesteps, one for each step at most")
    if steps == 1 and not alone and sampler is not None and sampler not in ONE_STEP:
        names = ", ".join(each.value for each in ONE_STEP if isinstance(each, Sampler))
        raise SettingsError(
            f"sample.steps=1: the stock pipeline of {family} draws in a single step with {names} only; set "
            "sample.sampler to one of these, or give more steps"
        )


def require_decoder(decoder: str | None) -> str:
    """The place of a cascade's decoders. Raises SettingsError: there is none."""
    if decoder is None:
        raise SettingsError(
            "model.decoder: null, and no picture can be drawn without the decoders: give a hub name or a folder in "
            "diffusers' layout, or set sample.prompts=[]"
        )
    return decoder


def require_sides(height: int | None, width: int | None, *, step: int) -> None:
    """Raises SettingsError: a cascade's decoders cannot make a picture of that size."""
    for name, side in (("height", height), ("width", width)):
        if side is not None and side % step:
            raise SettingsError(f"sample.{name}={side}: three latents are {step} pixels, so give a multiple of that")


def require_no_fp16(precision: object) -> None:
    """Raises SettingsError: Stable Cascade's prior would be computed with in fp16, in which it overflows."""
    if precision in ("16-mixed", "16", "fp16", 16):
        raise SettingsError(
            f"trainer.precision={precision}: Stable Cascade's prior overflows in fp16; set "
            "trainer.precision=bf16-mixed, or 32-true where the device has no bf16"
        )
