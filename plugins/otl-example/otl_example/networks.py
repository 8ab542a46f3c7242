"""The networks: a transformer over blocks of pixels, and an encoder of words in no order."""

from __future__ import annotations

import hashlib
import math
import re

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional as F

MAX_WORDS = 32  # of a caption; the rest is not seen


class WordEncoder(ModelMixin, ConfigMixin):
    """One vector for a caption: a layer over the sum of its words' vectors.

    Args:
        words: rows of the table; a word's row is a hash of its letters, so that two words may share one.
        width: of the vector.
    """

    _supports_gradient_checkpointing = True  # asked for with the transformer; one layer has nothing to compute twice

    @register_to_config
    def __init__(self, words: int = 4096, width: int = 128) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.embedding = nn.Embedding(words, width)
        self.proj = nn.Linear(width, width)

    def forward(self, ids: Tensor) -> Tensor:
        """[B, L] rows of the table, 0 for no word -> [B, width]."""
        known = (ids > 0).unsqueeze(-1).to(self.embedding.weight.dtype)
        # Divided by the root of the count, the sum of random vectors has the size of one.
        summed = (self.embedding(ids) * known).sum(1) / known.sum(1).clamp(min=1).sqrt()
        return self.proj(summed)


def word_ids(captions: list[str], *, words: int) -> list[list[int]]:
    """B captions -> B lists of MAX_WORDS rows in 1..words-1, filled up with 0."""
    rows = [[word_id(word, words) for word in re.findall(r"\w+", caption.lower())[:MAX_WORDS]] for caption in captions]
    return [row + [0] * (MAX_WORDS - len(row)) for row in rows]


def word_id(word: str, words: int) -> int:
    digest = hashlib.blake2b(word.encode(), digest_size=8).digest()
    return 1 + int.from_bytes(digest, "little") % (words - 1)


class BlockTransformer(ModelMixin, ConfigMixin):
    """Every position attends to every other; time and words scale and shift what each layer sees
    (https://arxiv.org/abs/2212.09748).

    Args:
        channels: numbers in a block of pixels.
        width: of a position's vector.
        depth: layers.
        heads: of the attention.
    """

    _supports_gradient_checkpointing = True

    @register_to_config
    def __init__(self, channels: int = 48, width: int = 128, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.gradient_checkpointing = False
        self.proj_in = nn.Linear(channels, width)
        self.time_in = nn.Linear(width, width)
        self.words_in = nn.Linear(width, width)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.norm_out = nn.LayerNorm(width)
        self.proj_out = nn.Linear(width, channels)

    def forward(self, noisy: Tensor, t: Tensor, words: Tensor) -> Tensor:
        """[B, channels, h, w] at times [B] in 0..1, led by [B, width] -> [B, channels, h, w]."""
        h, w = noisy.shape[-2:]
        width = self.config.width
        hidden = self.proj_in(noisy.flatten(2).transpose(1, 2))
        hidden = hidden + positions(h, w, width, like=hidden)
        lead = F.silu(self.time_in(waves(1000 * t.float(), width).to(hidden)) + self.words_in(words))
        for block in self.blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                hidden = self._gradient_checkpointing_func(block, hidden, lead)
            else:
                hidden = block(hidden, lead)
        return self.proj_out(self.norm_out(hidden)).transpose(1, 2).unflatten(2, (h, w))


class Block(nn.Module):
    """Attention between positions, then two layers on each."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.lead = nn.Linear(width, 4 * width)
        self.norm = nn.LayerNorm(width, elementwise_affine=False)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor, lead: Tensor) -> Tensor:
        """[B, N, width] led by [B, width] -> [B, N, width]."""
        scale, shift, mlp_scale, mlp_shift = self.lead(lead).unsqueeze(1).chunk(4, dim=-1)
        seen = self.norm(hidden) * (1 + scale) + shift
        q, k, v = (
            layer(seen).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        hidden = hidden + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return hidden + self.mlp(self.norm(hidden) * (1 + mlp_scale) + mlp_shift)


def waves(at: Tensor, width: int) -> Tensor:
    """[N] numbers -> [N, width] sines and cosines of them, wavelengths 2π to 20,000π
    (https://arxiv.org/abs/1706.03762, section 3.5)."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=at.device) / (width // 2))
    angles = at.unsqueeze(-1) * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def positions(h: int, w: int, width: int, *, like: Tensor) -> Tensor:
    """[h * w, width]: one half says the row, the other the column."""
    rows, columns = (waves(torch.arange(n, device=like.device).float(), width // 2) for n in (h, w))
    grid = torch.cat([rows.unsqueeze(1).expand(h, w, -1), columns.unsqueeze(0).expand(h, w, -1)], dim=-1)
    return grid.flatten(0, 1).to(like)
