"""Prompts for families that read CLIP's hidden states, also longer ones than CLIP has room for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from otl.modules.base import DiffusionModule
from otl.types import Dtype, Prediction


class ClipModule(DiffusionModule):
    """What such families share: long prompts are read in chunks, as A1111 and ComfyUI read them.

    Args:
        checkpoint: hub name, diffusers folder or .safetensors file.
        config: folder under otl/assets/configs that describes the networks where the checkpoint is no folder itself;
            None: the family's own.
        native_resolution: pixels per side that the weights were trained at; None: the family's usual.
        dtype: of the frozen weights: "fp32", "bf16", "fp16", or "auto" for the precision's own.
        prediction: "epsilon", "v_prediction" or "sample"; None: as the checkpoint's scheduler says.
        zero_terminal_snr: whether the last timestep is pure noise; None: as the checkpoint's scheduler says.
        gradient_checkpointing: compute activations twice instead of keeping them: less memory, about a third slower.
        chunks: of 75 tokens for which every prompt has room, each read with a start and an end of its own.
        clip_skip: last layers of each text encoder that are not read, beside those that the family never reads; 1 is
            what A1111 and kohya's scripts call a clip skip of 2, and ComfyUI a last layer of -2.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        config: str | None = None,
        native_resolution: int | None = None,
        dtype: Dtype = "auto",
        prediction: Prediction | None = None,
        zero_terminal_snr: bool | None = None,
        gradient_checkpointing: bool = False,
        chunks: int = 1,
        clip_skip: int = 0,
    ) -> None:
        super().__init__(
            checkpoint,
            config=config,
            native_resolution=native_resolution,
            dtype=dtype,
            prediction=prediction,
            zero_terminal_snr=zero_terminal_snr,
            gradient_checkpointing=gradient_checkpointing,
        )
        self.chunks, self.clip_skip = chunks, clip_skip

    @property
    def reading(self) -> str:
        """Shorter prompts have another conditioning in several chunks, too: empty ones lie behind them."""
        return f"{self.chunks} chunks, {self.clip_skip} layers skipped"

    def prompt_room(self) -> int:
        return (self.pipeline.tokenizer.model_max_length - 2) * self.chunks

    def prompt_advice(self, tokens: int) -> str:
        return f", or read them whole with model.chunks={-(-tokens * self.chunks // self.prompt_room())}"

    def tokens(self, tokenizer: Any, captions: list[str]) -> Tensor:
        """B captions -> [B * chunks, 77] token ids on the module's device, the chunks of a caption in a row."""
        return tokenize(tokenizer, captions, chunks=self.chunks).to(self.device, non_blocking=True)

    def joined(self, hidden: Tensor) -> Tensor:
        """[B * chunks, 77, D] -> [B, chunks * 77, D]."""
        return hidden.reshape(-1, self.chunks * hidden.shape[1], hidden.shape[2])

    def first(self, pooled: Tensor) -> Tensor:
        """[B * chunks, D] -> [B, D], those of the first chunks."""
        return pooled[:: self.chunks]


def tokenize(tokenizer: Any, captions: list[str], *, chunks: int = 1) -> Tensor:
    """B captions -> [B * chunks, L] token ids: each chunk begins, ends and is padded as a prompt of its own.

    What follows behind chunks * (L - 2) tokens is cut off.
    """
    room = tokenizer.model_max_length - 2  # without start and end
    length = chunks * room + 2
    found = tokenizer(captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    if chunks == 1:
        return found.input_ids
    start, ids = found.input_ids[:, :1], found.input_ids[:, 1:-1].reshape(-1, room)
    counts = found.attention_mask.sum(1, keepdim=True) - 2  # [B, 1] tokens of each caption
    counts = (counts - room * torch.arange(chunks, device=counts.device)).clamp(0, room).reshape(-1, 1)
    place = torch.arange(room + 2, device=ids.device)
    chunk = torch.nn.functional.pad(ids, (1, 1))
    chunk = torch.where(place > counts, tokenizer.pad_token_id, chunk)
    chunk = torch.where(place == counts + 1, tokenizer.eos_token_id, chunk)
    return torch.where(place == 0, start.repeat_interleave(chunks, dim=0), chunk)
