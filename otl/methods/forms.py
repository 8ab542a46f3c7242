"""Which forms of a model there are to train, and of a file to write, on plain values."""

from __future__ import annotations

from otl.config import SettingsError


def require_inpainting(family: str, *, there: bool) -> None:
    """Raises SettingsError: the family has no inpainting form."""
    if not there:
        raise SettingsError(
            f"method=inpaint: {family} has no inpainting form: no program would feed its denoiser a mask. Stable "
            "Diffusion 1.5, 2 and XL have one"
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
