"""Which forms of a model there are to train, and of a file to write, on plain values."""

from __future__ import annotations

from dataclasses import fields

from otl.config import Inpaint, SampleOptions, SettingsError
from otl.wording import show


def require_inpainting(family: str, *, there: bool) -> None:
    """Raises SettingsError: the family has no inpainting form."""
    if not there:
        raise SettingsError(
            f"method=inpaint: {family} has no inpainting form: no program would feed its denoiser a mask. Stable "
            "Diffusion 1.5, 2 and XL have one"
        )


def require_hole(inpaint: Inpaint, sample: SampleOptions, *, family: str, checkpoint: str, there: bool) -> None:
    """Refuse what is set for inpainting, of a denoiser that takes no mask.

    Args:
        there: whether the family has an inpainting form.

    Raises:
        SettingsError: something is.
    """
    changed = [
        f"inpaint.{field.name}={show(getattr(inpaint, field.name))}"
        for field in fields(Inpaint)
        if getattr(inpaint, field.name) != getattr(Inpaint(), field.name)
    ]
    changed += [f"sample.{key}={getattr(sample, key)}" for key in ("image", "mask") if getattr(sample, key) is not None]
    if not changed:
        return
    if not there:
        raise SettingsError(f"{changed[0]}: {no_inpainting(family)}; leave the setting out")
    raise SettingsError(
        f"{changed[0]}: the denoiser of {checkpoint} takes no mask. Choose an inpainting checkpoint (such as "
        "model=sd15_inpaint) with any method, or widen this one with method=inpaint. A LoRA goes onto a widened model "
        "in two runs: method=inpaint first, then method=lora with model.checkpoint=<the folder that it wrote>"
    )


def no_inpainting(family: str) -> str:
    return f"{family} has no inpainting form: there is no program that would feed its denoiser a mask"


def require_adapters(concept: str, method: str, *, there: bool) -> None:
    """Raises SettingsError: nothing is left that predicts as the frozen model, for the images of a concept."""
    if not there:
        raise SettingsError(
            f"data.concepts.{concept}.type=prior: its target is the prediction without the adapters, and {method} has "
            "none: take method=lora or one of its kin, or type=train"
        )


def require_single_file(family: str, *, written: bool) -> None:
    """Raises SettingsError: no program reads the whole family from one file."""
    if not written:
        raise SettingsError(
            f"output.checkpoint_format=single_file: no program reads a whole {family} from one file; leave it at "
            "diffusers"
        )


def require_peft(*, written: bool) -> None:
    """Raises SettingsError: PEFT's format has no such adapter."""
    if not written:
        raise SettingsError(
            "output.format=peft: PEFT's OFT rotates the inputs of layers, and cannot hold rotated outputs; set "
            "output.format=kohya"
        )
