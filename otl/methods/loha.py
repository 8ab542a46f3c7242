"""LoHa: the elementwise product of two low-rank matrices, through PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoHaConfig
from peft.tuners.loha import LoHaLayer as PeftLayer
from torch import nn

from otl.methods.adapter import Adapter, Strength, span
from otl.methods.injected import ADAPTER, keep_autocast, replace_weights, state_of, weights_of
from otl.types import AdapterState, LohaLayer

NAMES = {f"hada_{name}": name for name in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")}  # PEFT's -> ours


class Loha(Adapter):
    """delta = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b), of rank up to rank**2 (https://arxiv.org/abs/2108.06098).

    Starts as LyCORIS does (w1_a of deviation 0.1, w1_b and w2_b of 1, w2_a zero), so that its learning rates are right.

    Args:
        rank: inner dimension of both products.
        alpha: numerator of the strength.
        dropout: share of each layer's outputs that the adapter leaves alone in training, 0..1.
        tucker: give a convolution's kernel a tensor of its own: smaller files, for kernels larger than 1x1.
        targets: a preset of the family (attn-mlp, attn-only, full), patterns on layer names, or "file" for the layers
            of `from_file`.
        exclude: patterns on the names of layers that get none all the same.
        ranks: pattern on layer names -> rank; the first that matches counts, and alpha / rank stays what it was.
        parts: part -> {"lr": learning rate or None for the optimizer's, "rank", "alpha": its own, "stop_after": when it
            stops training: steps, a share of the run below 1, or epochs}; None or absent: no adapter there.
        from_file: an adapter file to go on from, whose layers keep its ranks and alphas.
        embeddings: new words that train beside it, name -> the fields of `otl.methods.specs.Spec`.
        templates: captions of images that have none: "object", "style", or sentences with {} for the placeholder.
        bundle_embeddings: whether their vectors are written into the adapter's file, or each into one of its own.
    """

    kind = LohaLayer
    continues = ("LoHa",)

    def __init__(
        self,
        *,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.0,
        tucker: bool = False,
        targets: str | list[str] = "attn-mlp",
        exclude: str | list[str] | None = None,
        ranks: dict[str, int] | None = None,
        parts: dict[str, Any] | None = None,
        from_file: str | None = None,
        embeddings: dict[str, Any] | None = None,
        templates: str | list[str] | None = None,
        bundle_embeddings: bool = False,
    ) -> None:
        super().__init__(
            rank=rank,
            alpha=alpha,
            dropout=dropout,
            targets=targets,
            exclude=exclude,
            ranks=ranks,
            parts=parts,
            from_file=from_file,
            embeddings=embeddings,
            templates=templates,
            bundle_embeddings=bundle_embeddings,
        )
        self.tucker = tucker

    def config(self, target: str, strength: Strength, ranks: dict[str, int], alphas: dict[str, float]) -> LoHaConfig:
        return LoHaConfig(
            r=strength.rank,
            alpha=strength.alpha,  # type: ignore[arg-type]  # PEFT divides it, whole or not
            rank_dropout=self.dropout,
            use_effective_conv2d=self.tucker,
            target_modules=target,
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )

    def begin(self, layer: Any) -> None:
        nn.init.normal_(layer.hada_w1_a[ADAPTER], std=0.1)
        nn.init.normal_(layer.hada_w1_b[ADAPTER], std=1)
        nn.init.zeros_(layer.hada_w2_a[ADAPTER])
        nn.init.normal_(layer.hada_w2_b[ADAPTER], std=1)
        for tensors in (layer.hada_t1, layer.hada_t2):
            if ADAPTER in tensors:
                nn.init.normal_(tensors[ADAPTER], std=0.1)
        keep_autocast(layer)

    def fill(self, layer: Any, given: Any) -> None:
        replace_weights(layer, NAMES, given)

    def width(self, layer: Any) -> int:
        """Of each of both products: any matrix times any other is any matrix."""
        weight = layer.get_base_layer().weight
        if ADAPTER in layer.hada_t1:
            return span(weight.shape[0], weight.shape[1], weight.shape[2:].numel())
        return span(weight.shape[0], weight.shape[1:].numel())

    def network(self, state: AdapterState) -> tuple[str, dict[str, str]]:
        dims = {"conv_dim": str(self.rank), "conv_alpha": f"{self.alpha:g}"}
        return "lycoris.kohya", {"algo": "loha", "use_tucker": str(self.tucker), **dims}


@state_of.register(PeftLayer)
def _(layer: Any) -> LohaLayer:
    tensors: dict[str, torch.Tensor] = weights_of(layer, NAMES)
    return LohaLayer(**tensors, alpha=float(layer.alpha[ADAPTER]))
