"""A layer whose outputs are rotated block by block: OFT, in the direction that LyCORIS, kohya and ComfyUI have it.

PEFT has a layer of this name that rotates the inputs, is wrong on convolutions larger than 1x1 (0.21), and whose files
none of them reads. This one is in all else a layer of PEFT's: it can be switched off, and what wraps those finds it.
"""

from __future__ import annotations

import contextlib

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from otl.formats.deltas import rotation


class RotatedLayer(nn.Module, BaseTunerLayer):
    """A linear layer or convolution with rotated outputs; the bias stays.

    Args:
        base_layer: the frozen layer.
        adapter: its name.
        size: of the blocks, a divisor of the number of outputs.
        dropout: share of the blocks that are left unrotated in training, 0..1.
    """

    adapter_layer_names = ("oft_blocks",)

    def __init__(self, base_layer: nn.Linear | nn.Conv2d, adapter: str, *, size: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._active_adapter, self._disable_adapters, self.merged_adapters = adapter, False, []
        self.dropout = dropout
        weight = base_layer.weight
        blocks = torch.zeros(weight.shape[0] // size, size, size, device=weight.device, dtype=torch.float32)
        self.oft_blocks = nn.ParameterDict({adapter: nn.Parameter(blocks)})

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        active = [name for name in self.active_adapters if name in self.oft_blocks]
        if self.disable_adapters or not active:
            return y
        outputs = 1 if isinstance(self.base_layer, nn.Conv2d) else -1
        bias = self.base_layer.bias
        turned = (y if bias is None else y - per_channel(bias, y, outputs)).movedim(outputs, -1)
        for name in active:
            turned = turned_by(turned, self.rotation(name))
        turned = turned.movedim(-1, outputs).to(y.dtype)
        return turned if bias is None else turned + per_channel(bias, turned, outputs)

    def rotation(self, adapter: str) -> Tensor:
        """[k, n, n] in fp32: rounded to bf16 it would not keep lengths."""
        blocks = self.oft_blocks[adapter]
        meta = blocks.device.type == "meta"  # which knows no autocast
        with contextlib.nullcontext() if meta else torch.autocast(blocks.device.type, enabled=False):
            turns = rotation(blocks)
        if not self.training or not self.dropout:
            return turns
        kept = torch.rand(len(turns), 1, 1).to(turns.device, non_blocking=True) >= self.dropout
        return torch.where(kept, turns, torch.eye(turns.shape[1], device=turns.device))


def per_channel(bias: Tensor, like: Tensor, dim: int) -> Tensor:
    """[out] -> a shape that adds to a layer's outputs, which lie in dimension `dim`."""
    return bias.to(like.dtype).reshape(-1, *[1] * (like.dim() - 2)) if dim == 1 else bias.to(like.dtype)


def turned_by(y: Tensor, turns: Tensor) -> Tensor:
    """[..., k * n] outputs, each block of n times its [n, n] of `turns`."""
    blocks = y.unflatten(-1, turns.shape[:2])
    return torch.einsum("... k n, k n m -> ... k m", blocks.to(turns.dtype), turns).flatten(-2)
