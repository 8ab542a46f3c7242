"""Full fine-tune: the weights of whole parts train, or those of chosen layers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from otl.config import CheckpointFormat
from otl.formats import stored
from otl.formats.files import whole
from otl.formats.folder import DTYPES
from otl.formats.modelspec import checkpoint_metadata, with_hash
from otl.methods.embeddings import Embeddings
from otl.methods.forms import require_single_file
from otl.methods.parts import OF_EACH, PartOptions, by_pipeline_name, chosen_parts
from otl.methods.patterns import as_list
from otl.methods.targets import excluding, matching
from otl.types import ParamGroup, Size

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule


class Finetune:
    """The weights of the chosen parts.

    Args:
        targets: a preset of the family, or patterns on the names of layers, searched for anywhere in them; None: all.
        exclude: patterns on the names of layers that stay frozen all the same.
        parts: part -> {"lr": learning rate or None for the optimizer's, "stop_after": when it stops training: steps, a
            share of the run below 1, or epochs}; None or absent: frozen.
        embeddings: new words that train beside it, name -> the fields of `otl.methods.specs.Spec`.
        templates: captions of images that have none: "object", "style", or sentences with {} for the placeholder.
    """

    part_settings: ClassVar[tuple[str, ...]] = OF_EACH
    output_settings: tuple[str, ...] = ("checkpoint_format",)

    def __init__(
        self,
        *,
        targets: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        parts: dict[str, Any] | None = None,
        embeddings: dict[str, Any] | None = None,
        templates: str | list[str] | None = None,
    ) -> None:
        self.targets = targets
        self.exclude = as_list(exclude)
        self.embeddings = Embeddings(embeddings, templates)
        self.parts = chosen_parts(parts if parts is not None else {"denoiser": {}}, accepted=self.part_settings)
        self.whole_parts = tuple(self.parts)

    def captions(self, concept: str) -> list[str]:
        """Of an image of `concept` that has none of its own: the templates around an embedding's placeholder."""
        return self.embeddings.captions(concept)

    def attach(self, module: DiffusionModule) -> list[ParamGroup]:
        """One group of fp32 parameters for each part, and those of the embeddings."""
        single = module.output_options.checkpoint_format == CheckpointFormat.single_file
        if single:
            require_single_file(type(module).__name__, written=module.writes_file)
        options = self.options_by_part(module)
        groups = []
        for name, paths in self.chosen(module, list(options)).items():
            part = module.part(name)
            if next(part.parameters()).device.type != "meta":
                part.to(torch.float32)
            weights = {id(p): p for path in paths for p in own_parameters(part.get_submodule(path))}  # T5 ties two
            for parameter in weights.values():
                parameter.requires_grad_(True)
            groups.append(ParamGroup(name, list(weights.values()), options[name].lr, options[name].stop_after))
        return groups + self.embeddings.attach(module)

    def options_by_part(self, module: DiffusionModule) -> dict[str, PartOptions]:
        """The pipeline's name of each part -> its options.

        Raises:
            SettingsError: a part is not there, is the image encoder, or is named twice.
        """
        trainable = [name for name in module.part_names if name != module.image_encoder]
        return by_pipeline_name(self.parts, module.part_name, trainable=trainable)

    def chosen(self, module: DiffusionModule, parts: list[str]) -> dict[str, list[str]]:
        """part -> paths of the layers that train.

        Raises:
            SettingsError: a pattern finds nothing, or nothing of a part is left.
        """
        names = {
            part: [path for path, layer in module.part(part).named_modules() if own_parameters(layer)] for part in parts
        }
        if self.targets is not None:
            names = matching(names, self.targets, module.lora_targets)
        return excluding(names, self.exclude)

    def export(self, module: DiffusionModule, path: Path) -> Path:
        """Write the whole model as the folder `path` or the file `<path>.safetensors`, read it back and compare; the
        embeddings beside it, for no stock text encoder holds them. Text encoders that were let go are copied from the
        checkpoint, one tensor after the other: T5-XXL has no room beside the network."""
        from otl.formats.folder import save_pipeline

        self.embeddings.export(module, path)
        with module.readable(), self.embeddings.put_away(module):  # a pipeline is whole
            if module.output_options.checkpoint_format == CheckpointFormat.single_file:
                return save_file(module, path.with_name(path.name + ".safetensors"))
            weights = {name: module.weights(name) for name in module.released}
            with module.sampling_scheduler():  # v-prediction and zero-terminal-SNR belong to the weights
                return save_pipeline(module.pipeline, path, dtype=module.output_options.dtype, weights=weights)


def own_parameters(layer: nn.Module) -> list[nn.Parameter]:
    """Not those of layers inside it."""
    return list(layer.parameters(recurse=False))


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
        stored.write(aside, module.single_file(), header, dtype=DTYPES[options.dtype])
        with_hash(aside)
    return path
