"""How many vectors a new word has, and what they start as."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from otl import rng
from otl.config import SettingsError
from otl.formats import embedding as embedding_file
from otl.methods import specs, vocabulary
from otl.methods.rows import median_norm, of_norm, random_rows
from otl.methods.specs import Spec

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

log = logging.getLogger(__name__)


def is_skeleton(module: DiffusionModule) -> bool:
    """Whether the text encoders have shapes alone; their tokenizers then know no words."""
    return vocabulary.table(module.part(module.text_encoders[0])).device.type == "meta"


def from_file(module: DiffusionModule, each: Spec) -> dict[str, Tensor]:
    """text encoder -> [n, D] the vectors of `file`."""
    try:
        tensors = embedding_file.read(Path(str(each.file)).expanduser())
        return embedding_file.from_file(
            embedding_file.from_bundle(tensors, each.name),
            keys=module.embedding_keys,
            widths={encoder: vocabulary.table(module.part(encoder)).shape[1] for encoder in module.text_encoders},
            output=each.output,
        )
    except SettingsError as error:
        raise SettingsError(f"{each.key}.file={each.file}: {error}") from error


def count(module: DiffusionModule, each: Spec, loaded: dict[str, Tensor] | None) -> int:
    """How many vectors an embedding has; `loaded`: those of its file."""
    key = each.key
    if loaded is not None:
        found = len(next(iter(loaded.values())))
        if each.vectors not in (None, found):
            raise SettingsError(f"{key}.vectors={each.vectors}: {each.file} has {found}; leave vectors out")
        if found > (room := vocabulary.room(module)):
            raise SettingsError(f"{key}.file={each.file} has {found} vectors: a prompt has room for {room} tokens")
        return found
    if is_skeleton(module):  # a skeleton has no tokenizer to ask, and a few rows more or less change no plan
        return each.vectors or len((each.init or "*").split())
    tokenizer = vocabulary.tokenizer(module, module.text_encoders[0])
    words = vocabulary.ids(tokenizer, each.init) if each.init else []
    if each.init is not None and not words:
        raise SettingsError(f"{key}.init={each.init!r}: no word that the tokenizer knows; give one, or null")
    count = each.vectors or len(words) or 1
    if len(words) > count:
        log.warning(f"{key}.init={each.init!r} takes {len(words)} tokens: the first {count} are used")
    specs.require_room(each, count, room=vocabulary.room(module))
    if vocabulary.knows(tokenizer, each.placeholder):
        log.warning(
            f"{key}.placeholder={each.placeholder} is a word that the model knows already: in this run it means "
            f"the new vectors alone, and diffusers will not load them under that name; <{each.name}> would be free"
        )
    return count


def rows(module: DiffusionModule, encoder: str, each: Spec, loaded: dict[str, Tensor] | None, *, count: int) -> Tensor:
    """[count, D] fp32 what stands at the input at first, a function of the seed."""
    table = vocabulary.table(module.part(encoder))
    if is_skeleton(module):
        return torch.empty(count, table.shape[1], dtype=torch.float32, device="meta")
    if loaded is not None and not each.output:
        return loaded[encoder].to(table.device)
    if each.init is None:
        return random_rows(table, count, rng.generator(module.seed, "embedding", each.name, encoder)).to(table.device)
    words = vocabulary.ids(vocabulary.tokenizer(module, encoder), each.init)
    chosen = torch.tensor([words[k % len(words)] for k in range(count)], device=table.device)
    found = table[chosen].detach().to(torch.float32, copy=True)
    # As after each step; else the first would change what was drawn before it. An output embedding's are only read.
    return of_norm(found, median_norm(table)) if each.preserve_norm and not each.output else found
