"""Textual inversion: new words train, and nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from otl.methods import specs
from otl.methods.embeddings import Embeddings
from otl.types import ParamGroup

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule


class Embedding:
    """The vectors of one or more new words (https://arxiv.org/abs/2208.01618).

    Args:
        embeddings: name -> {"placeholder", "vectors", "init", "file", "lr", "stop_after", "output", "preserve_norm"}:
            see `otl.methods.specs.Spec`.
        templates: captions of images that have none: "object", "style", or sentences with {} for the placeholder.
    """

    whole_parts: tuple[str, ...] = ()
    output_settings: tuple[str, ...] = ()

    def __init__(self, *, embeddings: dict[str, Any], templates: str | list[str] | None = None) -> None:
        self.embeddings = Embeddings(embeddings, templates)
        specs.require(self.embeddings.specs, "method.embeddings")

    def captions(self, concept: str) -> list[str]:
        """Of an image of `concept` that has none of its own: the templates around an embedding's placeholder."""
        return self.embeddings.captions(concept)

    def attach(self, module: DiffusionModule) -> list[ParamGroup]:
        """One group of fp32 vectors for each embedding and text encoder."""
        return self.embeddings.attach(module)

    def export(self, module: DiffusionModule, path: Path) -> Path:
        """Write `<path>.safetensors`, or the folder `path` with a file for each embedding; read back and compared."""
        names = list(self.embeddings.specs)
        if len(names) == 1:
            return self.embeddings.write(module, names[0], path.with_name(path.name + ".safetensors"))
        path.mkdir(parents=True, exist_ok=True)
        for name in names:
            self.embeddings.write(module, name, path / f"{name}.safetensors")
        return path
