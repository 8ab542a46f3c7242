"""Inpainting: a denoiser that is given a mask and the masked picture, made from one that is not, or trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from otl.config import SettingsError
from otl.methods.finetune import Finetune
from otl.methods.forms import require_inpainting
from otl.types import ParamGroup

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule


class Inpaint(Finetune):
    """A fine-tune of an inpainting checkpoint, or of another one whose first convolution is widened before.

    The new input channels begin with zeros, so that the first prediction is that of the checkpoint.
    """

    def attach(self, module: DiffusionModule) -> list[ParamGroup]:
        """One group of fp32 parameters for each part."""
        if module.inpaints:
            return super().attach(module)
        self.refuse(module)
        widen(module.part("denoiser"))
        groups = super().attach(module)
        if not module.part("denoiser").conv_in.weight.requires_grad:
            raise SettingsError(
                f"method.targets={self.targets}, method.exclude={self.exclude}: they leave out conv_in, whose new "
                "channels for the mask and the masked picture would stay zero; choose it too"
            )
        return groups

    def refuse(self, module: DiffusionModule) -> None:
        """Raises SettingsError: the family has no inpainting form, or the new channels would not be trained."""
        require_inpainting(type(module).__name__, there=module.inpaint_pipeline_class is not None)
        if module.denoiser not in map(module.part_name, self.parts):
            raise SettingsError(
                "method.parts.denoiser: the denoiser gets new input channels, and they do nothing unless it trains; "
                "set method.parts.denoiser={}"
            )


def widen(denoiser: Any) -> None:
    """Room behind the noisy latents for a mask and the masked picture's latents: 4 channels become 9."""
    narrow: nn.Conv2d = denoiser.conv_in
    channels = 2 * narrow.in_channels + 1
    wide = nn.Conv2d(
        channels,
        narrow.out_channels,
        kernel_size=narrow.kernel_size,  # type: ignore[arg-type]
        padding=narrow.padding,  # type: ignore[arg-type]
        device=narrow.weight.device,
        dtype=torch.float32,
    )
    with torch.no_grad():
        wide.weight.zero_()
        wide.weight[:, : narrow.in_channels] = narrow.weight
        wide.bias.copy_(narrow.bias)  # type: ignore[union-attr]
    denoiser.conv_in = wide.requires_grad_(False)
    denoiser.register_to_config(in_channels=channels)
