"""Which images, timesteps and part of the model made a NaN or an infinity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from otl.callbacks import randomness
from otl.callbacks.snapshot import tensors
from otl.formats.files import listed
from otl.types import Batch

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

DATA, WEIGHTS, OVERFLOW, UNKNOWN = "data", "weights", "overflow", "unknown"
ADVICE = {
    DATA: "look at these images and their captions; data.cache_dir may hold them as they were",
    WEIGHTS: "the optimizer has made them so: resume an earlier checkpoint with a lower optimizer.lr, or with "
    "trainer.gradient_clip_val=1",
    OVERFLOW: "the numbers are too large for fp16: trainer.precision=bf16-mixed or 32-true",
    UNKNOWN: "try a lower optimizer.lr, trainer.gradient_clip_val=1, trainer.precision=bf16-mixed or 32-true, and look "
    "at these images and their captions",
}


@dataclass
class Finding:
    """What is known of a step that is not finite."""

    images: list[str] = field(default_factory=list)  # each with its timestep
    made_by: str = "nothing that could be found"
    cause: str = UNKNOWN

    def __str__(self) -> str:
        return f"in {listed(self.images)}, made by {self.made_by}; {ADVICE[self.cause]}"


def of_loss(module: DiffusionModule, batches: list[Batch], names: list[str]) -> Finding:
    """Of batches whose loss is not finite: their inputs are looked at, the weights, and each layer in another pass.

    Args:
        names: of all images, by sample number.
    """
    for batch in batches:
        for part, rows in inputs(batch):
            if not rows.all():
                return Finding(shown(module, batch, ~rows, names), f"the {part} that came from the data", DATA)
    if broken := broken_weights(module):
        return Finding(shown_all(module, batches, names), f"the weights of {listed(broken)}", WEIGHTS)
    found = Finding(shown_all(module, batches, names), "nothing that a second look finds: chance or hardware")
    for batch in batches:
        with torch.no_grad(), randomness.kept(), module.autocast(), watched(module) as seen:
            losses = module.batch_losses(batch)
        if not torch.isfinite(losses).all():
            images = shown(module, batch, ~torch.isfinite(losses), names)
            layer = next(iter(seen), ("the loss", losses.dtype))
            return Finding(images, layer[0], OVERFLOW if layer[1] == torch.float16 else UNKNOWN)
    return found


def of_gradient(module: DiffusionModule, batches: list[Batch], names: list[str], *, scaled: bool) -> Finding:
    """Of a step whose losses are finite and whose gradients are not.

    Args:
        scaled: whether fp16's scale was lowered as far as it goes before.
    """
    gradients = {name: p.grad for name, p in module.trained_parameters().items() if p.grad is not None}
    broken = [name for name, gradient in gradients.items() if not torch.isfinite(gradient).all()]
    return Finding(
        shown_all(module, batches, names), f"the gradient of {listed(broken, 3)}", OVERFLOW if scaled else UNKNOWN
    )


def inputs(batch: Batch) -> Iterator[tuple[str, Tensor]]:
    """Name of what the model is given -> [B] whether it is finite."""
    given = [*batch._asdict().items(), *((f"caption's {name}", each) for name, each in (batch.cond or {}).items())]
    for name, value in given:
        if isinstance(value, Tensor) and value.is_floating_point():
            yield name, torch.isfinite(value).reshape(len(value), -1).all(1).cpu()


def broken_weights(module: DiffusionModule) -> list[str]:
    """The parts whose weights, trained or frozen, are not all finite."""
    return [
        name
        for name in module.part_names
        if not all(p.is_meta or torch.isfinite(p).all() for p in module.part(name).parameters())
    ]


@contextmanager
def watched(module: DiffusionModule) -> Iterator[list[tuple[str, torch.dtype]]]:
    """Fills a list with the layers that make what is not finite of what is: name and dtype, the first one first."""
    seen: list[tuple[str, torch.dtype]] = []

    def look(name: str) -> Any:
        def hook(layer: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if all(map(finite, tensors([args, kwargs]))):
                seen.extend((name, tensor.dtype) for tensor in tensors(output) if not finite(tensor))

        return hook

    handles = [
        layer.register_forward_hook(look(f"{part} ({path})" if path else part), with_kwargs=True)
        for part in module.part_names
        for path, layer in module.part(part).named_modules()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def shown(module: DiffusionModule, batch: Batch, rows: Tensor, names: list[str]) -> list[str]:
    """Those of a batch's images, with their timesteps."""
    steps = module.batch_timesteps(batch).tolist()
    picked: Iterable[int] = rows.cpu().nonzero().flatten().tolist()
    return [f"{names[int(batch.index[row])]} (timestep {steps[row]:.4g})" for row in picked]


def shown_all(module: DiffusionModule, batches: list[Batch], names: list[str]) -> list[str]:
    return [text for batch in batches for text in shown(module, batch, torch.ones(len(batch.captions)).bool(), names)]
