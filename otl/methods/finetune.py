"""Full fine-tune: whole parts train."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from otl.config import CheckpointFormat, SettingsError
from otl.formats import single_file
from otl.formats.files import whole
from otl.formats.folder import DTYPES
from otl.formats.modelspec import checkpoint_metadata, with_hash
from otl.methods.embeddings import Embeddings
from otl.methods.parts import chosen_parts
from otl.types import ParamGroup, Size

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule


class Finetune:
    """Every weight of the chosen parts.

    Args:
        parts: part -> {"lr": learning rate or None for the optimizer's, "stop_after": when it stops training, below 1 a
            share of the run, else optimizer steps}; None or absent: frozen.
        embeddings: new words that train beside it, name -> the fields of `otl.methods.specs.Spec`.
    """

    def __init__(self, *, parts: dict[str, Any] | None = None, embeddings: dict[str, Any] | None = None) -> None:
        self.embeddings = Embeddings(embeddings)
        self.parts = chosen_parts(parts if parts is not None else {"denoiser": {}})
        self.whole_parts = tuple(self.parts)

    def attach(self, module: DiffusionModule) -> list[ParamGroup]:
        """One group of fp32 parameters for each part, and those of the embeddings."""
        single = module.output_options.checkpoint_format == CheckpointFormat.single_file
        if single and not module.writes_file:
            raise SettingsError(
                f"output.checkpoint_format=single_file: no program reads a whole "
                f"{type(module).__name__} from one file; leave it at diffusers"
            )
        groups = []
        for key, options in self.parts.items():
            name = module.part_name(key)
            if name == module.image_encoder:
                raise SettingsError(f"method.parts.{key}: the image encoder cannot be trained by this method")
            part = module.part(name)
            part.requires_grad_(True)
            if next(part.parameters()).device.type != "meta":
                part.to(torch.float32)
            groups.append(ParamGroup(name, list(part.parameters()), options.lr, options.stop_after))
        return groups + self.embeddings.attach(module)

    def export(self, module: DiffusionModule, path: Path) -> Path:
        """Write the whole model as the folder `path` or the file `<path>.safetensors`, read it back and compare; the
        embeddings beside it, for no stock text encoder holds them."""
        from otl.formats.folder import save_pipeline

        module.recover()  # a pipeline is whole
        self.embeddings.export(module, path)
        with self.embeddings.put_away(module):
            if module.output_options.checkpoint_format == CheckpointFormat.single_file:
                return save_file(module, path.with_name(path.name + ".safetensors"))
            with module.sampling_scheduler():  # v-prediction and zero-terminal-SNR belong to the weights
                return save_pipeline(module.pipeline, path, dtype=module.output_options.dtype)


def save_file(module: DiffusionModule, path: Path) -> Path:
    """The whole model in one file of the original code's names."""
    options = module.output_options
    header = checkpoint_metadata(
        architecture=(module.inpaints and module.inpaint_architecture) or module.architecture,
        title=options.title or path.stem,
        resolution=Size(module.data_resolution, module.data_resolution),
        implementation=module.file_implementation,
        prediction=module.noise_schedule.prediction,
    )
    with whole(path) as aside:
        single_file.save(module.single_file(), aside, header, dtype=DTYPES[options.dtype])
        with_hash(aside)
    return path
