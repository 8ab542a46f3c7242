"""LoKr: the Kronecker product of two small matrices, through PEFT."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoKrConfig
from peft.tuners.lokr import LoKrLayer as PeftLayer

from otl.config import SettingsError
from otl.methods.adapter import Adapter, Strength, span
from otl.methods.injected import ADAPTER, keep_autocast, replace_weights, state_of, weights_of
from otl.types import AdapterState, LokrLayer

NAMES = {f"lokr_{name}": name for name in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")}  # PEFT's -> ours


class Lokr(Adapter):
    """delta = alpha / rank * kron(w1, w2) (https://arxiv.org/abs/2309.14859).

    A weight [out, in] is cut into two factors: w1, small and whole, and w2, which is low-rank unless half its longer
    side is no more than the rank; it is whole then. Where both are whole the strength is 1, as in LyCORIS, and alpha
    does nothing. Starts as LyCORIS does: w2, or its second half, is zero.

    Args:
        rank: inner dimension of the factors that are low-rank.
        alpha: numerator of the strength.
        dropout: share of each layer's outputs that the adapter leaves alone in training, 0..1.
        factor: of the layer's outputs and inputs that w1 has, where it divides them; -1: about their square root.
        decompose_both: w1 is low-rank too, where it is large enough.
        tucker: give a convolution's kernel a tensor of its own: smaller files, for kernels larger than 1x1.
        targets: a preset of the family (attn-mlp, attn-only, full), patterns on layer names, or "file" for the layers
            of `from_file`.
        exclude: patterns on the names of layers that get none all the same.
        ranks: pattern on layer names -> rank; the first that matches counts, and alpha / rank stays what it was.
        parts: part -> {"lr": learning rate or None for the optimizer's, "rank", "alpha": its own, "stop_after": when it
            stops training: steps, a share of the run below 1, or epochs}; None or absent: no adapter there.
        from_file: an adapter file to go on from, whose layers keep its ranks, alphas and factors.
        embeddings: new words that train beside it, name -> the fields of `otl.methods.specs.Spec`.
        templates: captions of images that have none: "object", "style", or sentences with {} for the placeholder.
        bundle_embeddings: whether their vectors are written into the adapter's file, or each into one of its own.
    """

    kind = LokrLayer
    continues = ("LoKr",)

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 16.0,
        dropout: float = 0.0,
        factor: int = -1,
        decompose_both: bool = False,
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
        if factor != -1 and factor < 2:
            raise SettingsError(f"method.factor={factor}: must be at least 2, or -1 for the nearest to a square")
        self.factor, self.decompose_both, self.tucker = factor, decompose_both, tucker

    def config(self, target: str, strength: Strength, ranks: dict[str, int], alphas: dict[str, float]) -> LoKrConfig:
        return LoKrConfig(
            r=strength.rank,
            alpha=strength.alpha,  # type: ignore[arg-type]  # PEFT divides it, whole or not
            rank_dropout=self.dropout,
            rank_dropout_scale=True,
            decompose_both=self.decompose_both,
            decompose_factor=self.factor,
            use_effective_conv2d=self.tucker,
            init_weights="lycoris",
            target_modules=target,
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )

    def begin(self, layer: Any) -> None:
        layer.reset_adapter_parameters_lycoris_way(ADAPTER)  # again, in fp32
        set_strength(layer)
        keep_autocast(layer)

    def fill(self, layer: Any, given: Any) -> None:
        replace_weights(layer, NAMES, given)
        set_strength(layer)

    def width(self, layer: Any) -> int | None:
        """Of the narrower of the factors that are low-rank; a whole one has no rank."""
        found = []
        for name in ("w1", "w2"):
            halves = getattr(layer, f"lokr_{name}_a"), getattr(layer, f"lokr_{name}_b")
            if ADAPTER in halves[0]:
                rank, sides = layer.r[ADAPTER], [half[ADAPTER].numel() // layer.r[ADAPTER] for half in halves]
                middle = layer.lokr_t2[ADAPTER].numel() // rank**2 if name == "w2" and ADAPTER in layer.lokr_t2 else 1
                found.append(span(*sides, middle))
        return min(found, default=None)

    def network(self, state: AdapterState) -> tuple[str, dict[str, str]]:
        return "lycoris.kohya", {
            "algo": "lokr",
            "factor": str(self.factor),
            "decompose_both": str(self.decompose_both),
            "use_tucker": str(self.tucker),
            "conv_dim": str(self.rank),
            "conv_alpha": f"{self.alpha:g}",
        }


def set_strength(layer: Any) -> None:
    """1 where both factors are whole: LyCORIS and ComfyUI read such a layer so, PEFT would have alpha / rank."""
    whole = ADAPTER in layer.lokr_w1 and ADAPTER in layer.lokr_w2
    layer.scaling[ADAPTER] = 1.0 if whole else layer.alpha[ADAPTER] / layer.r[ADAPTER]


@state_of.register(PeftLayer)
def _(layer: Any) -> LokrLayer:
    tensors: dict[str, torch.Tensor] = weights_of(layer, NAMES)
    return LokrLayer(alpha=float(layer.alpha[ADAPTER]), **tensors)
