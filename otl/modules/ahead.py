"""Text encoders too large to lie beside the denoiser: loaded alone, used for the cache, let go, and only then the rest.

T5-XXL is eight times PixArt's transformer. Whatever trains a text encoder needs it in every step: then it is loaded as
every other part.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)


def possible(module: DiffusionModule) -> bool:
    """Whether this run needs the text encoders for the cache and the prompts to draw alone."""
    trainer = module._trainer
    data = getattr(trainer, "datamodule", None)
    if data is None or not data.cached:
        return False
    parts = getattr(module.method, "parts", {})
    return not getattr(module.method, "embeddings", None) and not set(parts) & set(module.text_encoders)


def encode(module: DiffusionModule) -> dict[str, nn.Module]:
    """Fill the cache with all captions; returns the text encoders, their weights let go.

    The module has no pipeline afterwards, knows the prompts to draw, and what the captions' keys depend on.
    """
    others = [name for name in module.part_names if name not in module.text_encoders]
    module.pipeline = module.load_pipeline(without=others)
    encoders = {name: module.part(name) for name in module.text_encoders}
    for part in encoders.values():
        part.requires_grad_(False).eval()
        part.to(module.trainer.strategy.root_device)
    module.to(module.trainer.strategy.root_device)  # nothing of it yet, but where it is asked to encode
    data: Any = module.trainer.datamodule  # type: ignore[attr-defined]
    data.fill_cache(module, images=False, prompts=True, progress=module.track)
    module.keep_prompts()
    module.kept_identity = module.prompt_identity()
    log.info(f"{', '.join(encoders)} encoded all captions and made room for {module.denoiser}")
    for part in encoders.values():
        part.to("meta")
    module.pipeline = None
    return encoders


def assemble(module: DiffusionModule, encoders: dict[str, nn.Module]) -> Any:
    """The pipeline, with encoders that have no weights."""
    pipeline = module.load_pipeline(without=list(encoders))
    pipeline.register_modules(**encoders)
    module.released |= set(encoders)
    return pipeline
