"""LoRA and DoRA: low-rank adapters beside frozen layers, through PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer as PeftLayer

from otl.config import LoraFormat, SettingsError
from otl.formats.deltas import delta, row_norms, with_lengths
from otl.formats.lora import FROZEN, LENGTHS
from otl.methods.adapter import Adapter, Strength, span
from otl.methods.injected import ADAPTER, base_weight, state_of
from otl.types import AdapterState, LoraLayer

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

Reader = Literal["comfyui", "lycoris"]


class Lora(Adapter):
    """delta = alpha / rank * up @ down on each targeted layer (https://arxiv.org/abs/2106.09685).

    Args:
        rank: inner dimension.
        alpha: numerator of the strength.
        dropout: share of the adapter's inputs that are zeroed in training, 0..1.
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

    kind = LoraLayer
    continues: ClassVar[tuple[str, ...]] = ("LoRA",)
    dora = False

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 16.0,
        dropout: float = 0.0,
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

    def config(self, target: str, strength: Strength, ranks: dict[str, int], alphas: dict[str, float]) -> LoraConfig:
        return LoraConfig(
            r=strength.rank,
            lora_alpha=strength.alpha,  # type: ignore[arg-type]  # PEFT divides it, whole or not
            lora_dropout=self.dropout,
            use_dora=self.dora,
            target_modules=target,
            rank_pattern=ranks,
            alpha_pattern=alphas,
        )

    def fill(self, layer: Any, given: LoraLayer) -> None:
        with torch.no_grad():
            layer.lora_A[ADAPTER].weight.copy_(given.down)
            layer.lora_B[ADAPTER].weight.copy_(given.up)

    def width(self, layer: Any) -> int:
        weight = layer.get_base_layer().weight
        return span(weight.shape[0], weight.shape[1:].numel())

    def network(self, state: AdapterState) -> tuple[str, dict[str, str]]:
        kernels = [layer for part in state.values() for layer in part.values() if kernel(layer) > 1]
        if not kernels:
            return "networks.lora", {}
        return "networks.lora", {"conv_dim": str(self.rank), "conv_alpha": f"{self.alpha:g}"}


class Dora(Lora):
    """LoRA whose rows' lengths train apart from their directions (https://arxiv.org/abs/2402.09353).

    Args:
        rank: inner dimension.
        alpha: numerator of the strength.
        dropout: share of the adapter's inputs that are zeroed in training, 0..1.
        reader: whose meaning `dora_scale` has in a file of output.format=kohya: "comfyui" (and Forge), which divides by
            the frozen rows' lengths, or "lycoris", which divides by the adapted ones', as the paper does.
        targets: a preset of the family (attn-mlp, attn-only, full), patterns on layer names, or "file" for the layers
            of `from_file`.
        exclude: patterns on the names of layers that get none all the same.
        ranks: pattern on layer names -> rank; the first that matches counts, and alpha / rank stays what it was.
        parts: part -> {"lr": learning rate or None for the optimizer's, "rank", "alpha": its own, "stop_after": when it
            stops training: steps, a share of the run below 1, or epochs}; None or absent: no adapter there.
        from_file: an adapter file to go on from, a plain LoRA too, whose layers keep its ranks and alphas.
        embeddings: new words that train beside it, name -> the fields of `otl.methods.specs.Spec`.
        templates: captions of images that have none: "object", "style", or sentences with {} for the placeholder.
        bundle_embeddings: whether their vectors are written into the adapter's file, or each into one of its own.
    """

    dora = True
    continues = ("DoRA", "LoRA")

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 16.0,
        dropout: float = 0.0,
        reader: Reader = "comfyui",
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
        if reader not in get_args(Reader):
            raise SettingsError(f"method.reader={reader}: must be {' or '.join(get_args(Reader))}")
        self.reader = reader

    def begin(self, layer: Any) -> None:
        """The lengths as they are, from the fp32 weight: PEFT has measured them in the frozen weight's dtype."""
        self.measure(layer)

    def fill(self, layer: Any, given: LoraLayer) -> None:
        super().fill(layer, given)
        if given.magnitude is None:  # of a plain LoRA: it goes on as it is
            self.measure(layer)
        else:
            set_magnitude(layer, given.magnitude)

    def measure(self, layer: Any) -> None:
        """Set the lengths to those of the adapted rows, so that nothing changes."""
        down, up = layer.lora_A[ADAPTER].weight.detach(), layer.lora_B[ADAPTER].weight.detach()
        weight = layer.get_base_weight().float()
        set_magnitude(layer, row_norms(weight + delta(LoraLayer(down, up, layer.lora_alpha[ADAPTER]), weight)))

    def network(self, state: AdapterState) -> tuple[str, dict[str, str]]:
        """kohya's own module knows no DoRA."""
        arguments = {"algo": "lora", "dora_wd": "True", "wd_on_output": "True"}
        arguments |= {"conv_dim": str(self.rank), "conv_alpha": f"{self.alpha:g}"}
        if any(layer.frozen_lengths for part in state.values() for layer in part.values()):  # type: ignore[union-attr]
            arguments[LENGTHS] = FROZEN
        return "lycoris.kohya", arguments

    def to_write(self, module: DiffusionModule) -> AdapterState:
        """The magnitudes for the lengths that the file's reader divides by."""
        frozen = self.reader == "comfyui" and module.output_options.format == LoraFormat.kohya
        return {
            part: {
                path: with_lengths(layer, base_weight(module, part, path), frozen=frozen)  # type: ignore[arg-type]
                for path, layer in of_part.items()
            }
            for part, of_part in super().to_write(module).items()
        }


def kernel(layer: Any) -> int:
    """Pixels under the kernel of a LoRA's convolution; 1 for a linear layer."""
    return layer.down[0, 0].numel()


def set_magnitude(layer: Any, values: torch.Tensor) -> None:
    with torch.no_grad():
        weight = layer.lora_magnitude_vector[ADAPTER].weight
        weight.copy_(values.reshape(weight.shape))


@state_of.register(PeftLayer)
def _(layer: Any) -> LoraLayer:
    lengths = layer.lora_magnitude_vector[ADAPTER].weight if ADAPTER in layer.lora_magnitude_vector else None
    return LoraLayer(
        layer.lora_A[ADAPTER].weight.detach().float().cpu(),
        layer.lora_B[ADAPTER].weight.detach().float().cpu(),
        float(layer.lora_alpha[ADAPTER]),
        lengths.detach().float().flatten().cpu() if lengths is not None else None,
    )
