"""Full fine-tune: whole parts train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from otl.config import SettingsError
from otl.methods.parts import chosen_parts
from otl.types import ParamGroup

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule


class Finetune:
    """Every weight of the chosen parts.

    Args:
        parts: part -> {"lr": learning rate or None for the optimizer's}; None or absent: frozen.
    """

    def __init__(self, *, parts: dict[str, Any] | None = None) -> None:
        self.parts = chosen_parts(parts if parts is not None else {"denoiser": {}})
        self.whole_parts = tuple(self.parts)

    def attach(self, module: DiffusionModule) -> list[ParamGroup]:
        """One group of fp32 parameters for each part."""
        groups = []
        for key, lr in self.parts.items():
            name = module.part_name(key)
            if name == module.image_encoder:
                raise SettingsError(f"method.parts.{key}: the image encoder cannot be trained by this method")
            part = module.part(name)
            part.requires_grad_(True)
            if next(part.parameters()).device.type != "meta":
                part.to(torch.float32)
            groups.append(ParamGroup(name, list(part.parameters()), lr))
        return groups

    def export(self, module: DiffusionModule, path: Path) -> Path:
        """Write the folder `path`, the whole pipeline in diffusers' layout, read it back and compare."""
        from otl.formats.folder import save_pipeline

        module.recover()  # a pipeline is whole
        with module.sampling_scheduler():  # v-prediction and zero-terminal-SNR belong to the weights
            return save_pipeline(module.pipeline, path, dtype=module.output_options.dtype)
