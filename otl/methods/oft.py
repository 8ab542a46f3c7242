"""OFT: rotations of what the layers put out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from otl.config import LoraFormat, SettingsError
from otl.methods.adapter import Adapter, Strength
from otl.methods.forms import require_peft
from otl.methods.injected import ADAPTER, state_of
from otl.methods.rotation import RotatedLayer
from otl.types import AdapterState, OftLayer, ParamGroup, Problem
from otl.wording import counted


class Oft(Adapter):
    """Blocks of each layer's outputs are rotated: angles between them, and lengths, stay (https://arxiv.org/abs/2306.07280).

    Args:
        block_size: outputs that are rotated together; the largest number up to it that divides a layer's outputs.
        dropout: share of the blocks that are left unrotated in training, 0..1.
        targets: a preset of the family (attn-mlp, attn-only, full), patterns on layer names, or "file" for the layers
            of `from_file`.
        exclude: patterns on the names of layers that get none all the same.
        block_sizes: pattern on layer names -> block size; the first that matches counts.
        parts: part -> {"lr": learning rate or None for the optimizer's, "stop_after": when it stops training: steps, a
            share of the run below 1, or epochs}; None or absent: no adapter there.
        from_file: an adapter file to go on from, whose layers keep its block sizes.
        embeddings: new words that train beside it, name -> the fields of `otl.methods.specs.Spec`.
        templates: captions of images that have none: "object", "style", or sentences with {} for the placeholder.
        bundle_embeddings: whether their vectors are written into the adapter's file, or each into one of its own.
    """

    kind = OftLayer
    continues = ("OFT",)
    part_settings = ("lr", "stop_after")
    size_setting = "block_sizes"
    writes_peft = False

    def __init__(
        self,
        *,
        block_size: int = 32,
        dropout: float = 0.0,
        targets: str | list[str] = "attn-mlp",
        exclude: str | list[str] | None = None,
        block_sizes: dict[str, int] | None = None,
        parts: dict[str, Any] | None = None,
        from_file: str | None = None,
        embeddings: dict[str, Any] | None = None,
        templates: str | list[str] | None = None,
        bundle_embeddings: bool = False,
    ) -> None:
        super().__init__(
            rank=block_size,
            alpha=1.0,
            dropout=dropout,
            targets=targets,
            exclude=exclude,
            ranks=block_sizes,
            parts=parts,
            from_file=from_file,
            embeddings=embeddings,
            templates=templates,
            bundle_embeddings=bundle_embeddings,
        )
        if min(block_size, *self.ranks.values(), 2) < 2:
            raise SettingsError("method.block_size: must be at least 2, there is nothing to rotate in one output")
        self.smaller: list[str] = []  # layers whose blocks are smaller than asked for, and why

    def advice(self, module: Any) -> Iterator[Problem]:
        """Blocks that are smaller than asked for, because that does not divide their layers' outputs."""
        if self.smaller:
            message = (
                f"does not divide the outputs of {counted(len(self.smaller), 'layer')}, whose blocks are smaller; give "
                "a number that does, or give these layers their own by method.block_sizes"
            )
            yield Problem("method.block_size", message, False, self.smaller)

    def attach(self, module: Any) -> list[ParamGroup]:
        if module.output_options.format == LoraFormat.peft:
            require_peft(written=self.writes_peft)
        self.smaller = []
        return super().attach(module)

    def strength(self, options: Any, rank: int | None, given: Any) -> Strength:
        """The block size in the place of the rank."""
        return Strength(given.blocks.shape[1] if given is not None else rank or self.rank, 1.0)

    def inject(self, part: nn.Module, strengths: dict[str, Strength], *, seed: int) -> None:
        """Rotations by nothing at all: there is nothing to draw."""
        for path, strength in strengths.items():
            parent, _, name = path.rpartition(".")
            layer: Any = part.get_submodule(path)
            size = divisor(layer.weight.shape[0], strength.rank)
            if size < 2:
                raise SettingsError(
                    f"method.block_size={strength.rank}: nothing up to it divides the outputs of {path}"
                )
            if size < strength.rank:
                outputs = layer.weight.shape[0]
                self.smaller.append(f"{path}: blocks of {size}, not {strength.rank}, for {outputs} outputs")
            rotated = RotatedLayer(layer, ADAPTER, size=size, dropout=self.dropout)
            setattr(part.get_submodule(parent), name, rotated.train(layer.training))

    def fill(self, layer: Any, given: Any) -> None:
        with torch.no_grad():
            layer.oft_blocks[ADAPTER].copy_(given.blocks)

    def network(self, state: AdapterState) -> tuple[str, dict[str, str]]:
        return "lycoris.kohya", {"algo": "diag-oft", "conv_dim": str(self.rank)}


def divisor(number: int, most: int) -> int:
    """The largest divisor of `number` that is no more than `most`."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)


@state_of.register(RotatedLayer)
def _(layer: Any) -> OftLayer:
    return OftLayer(layer.oft_blocks[ADAPTER].detach().float().cpu())
