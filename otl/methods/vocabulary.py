"""What a text encoder and its tokenizer know of words."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken
from torch import Tensor

from otl.methods.rows import Span

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule


def tokenizer_name(encoder: str) -> str:
    """The pipeline's name of a text encoder's tokenizer."""
    return encoder.replace("text_encoder", "tokenizer")


def tokenizer(module: DiffusionModule, encoder: str) -> Any:
    """A text encoder's tokenizer."""
    return getattr(module.pipeline, tokenizer_name(encoder))


def room(module: DiffusionModule) -> int:
    """Tokens between those that begin and end a prompt, by the family or its first text encoder's tokenizer."""
    return module.prompt_tokens or tokenizer(module, module.text_encoders[0]).model_max_length - 2


def table(part: Any) -> Tensor:
    """[V, D] a text encoder's vocabulary."""
    return part.get_input_embeddings().weight


def ids(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, without those that begin and end a prompt."""
    return tokenizer(text, add_special_tokens=False).input_ids


def knows(tokenizer: Any, word: str) -> bool:
    """Whether a word is one entry of the vocabulary; CLIP marks those that end a word, T5 those that begin one."""
    lower = word.lower()
    return bool({word, lower, f"{lower}</w>", f"▁{word}"} & set(tokenizer.get_vocab()))


def enlarged(tokenizer: Any, tokens: dict[str, list[str]]) -> tuple[Any, dict[str, Span]]:
    """A copy of a tokenizer that knows further tokens, and the ids of each name's."""
    tokenizer = copy.deepcopy(tokenizer)
    spans = {}
    for name, each in tokens.items():
        # lstrip: what stands before is split as if the prompt ended there, without a token for the space.
        tokenizer.add_tokens([AddedToken(token, lstrip=True, normalized=False) for token in each])
        spans[name] = Span(tokenizer.convert_tokens_to_ids(each[0]), len(each))
    return tokenizer, spans
