"""How long captions are by a family's tokenizer, before any weight is loaded."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from otl.config import SettingsError, assets_dir
from otl.formats.tokenizer import write_clip_tokenizer
from otl.methods import vocabulary
from otl.modules.folders import said
from otl.modules.loading import quiet

if TYPE_CHECKING:
    from otl.modules.base import DiffusionModule

WORD = re.compile(r"[^ \t\r\n]+")
TOGETHER = 1000  # words tokenized at once


class Cut(NamedTuple):
    """A text of which not all is read."""

    tokens: int  # of all of it, without start and end
    rest: str  # what is not read


def at_hand(module: DiffusionModule) -> Any | None:
    """The first text encoder's tokenizer, new words included: the checkpoint's, where it is in a folder here or in the
    hub's cache; else CLIP's own, which ships with OTL; None where it is neither."""
    name = vocabulary.tokenizer_name(module.text_encoders[0])
    tokenizer = of_checkpoint(module.checkpoint, name) or of_assets(module.config_name, name)
    if tokenizer is None or not module.embeddings:
        return tokenizer
    new = {each.name: module.embeddings.tokens(each) for each in module.embeddings.specs.values()}
    return vocabulary.enlarged(tokenizer, new)[0]


def of_checkpoint(checkpoint: str, name: str) -> Any | None:
    """From a diffusers folder, or what the hub's cache holds of one."""
    from huggingface_hub import try_to_load_from_cache

    file = Path(checkpoint).expanduser() / name / "tokenizer_config.json"
    if not file.is_file() and checkpoint.count("/") == 1:
        cached = try_to_load_from_cache(checkpoint, f"{name}/tokenizer_config.json")
        file = Path(cached) if isinstance(cached, str) else file
    return read(file.parent) if file.is_file() else None


def of_assets(config_name: str, name: str) -> Any | None:
    """CLIP's, where it is that of a family."""
    settings = json.loads((assets_dir() / "configs" / config_name / name / "tokenizer_config.json").read_text())
    if settings["tokenizer_class"] != "CLIPTokenizer":
        return None
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder), pad_token=settings["pad_token"], max_length=settings["model_max_length"])
        return read(Path(folder))


def read(folder: Path) -> Any | None:
    """A tokenizer of its files; None where they hold no words: a folder without a vocabulary is read all the same."""
    from transformers import AutoTokenizer

    quiet()
    try:  # to trust is never asked for: whatever code a checkpoint brings along is not run
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the libraries below have errors of their own
        raise SettingsError(f"{folder}: there is no tokenizer that can be read ({said(error)})") from error
    return tokenizer if len(tokenizer) > len(tokenizer.all_special_tokens) + 1 else None


def too_long(module: DiffusionModule, tokenizer: Any, texts: Sequence[str]) -> dict[str, Cut]:
    """Those of some texts that a family does not read to their end."""
    room = module.prompt_room()
    assert room is not None
    rewritten = module.embeddings.rewrite(texts) if module.embeddings else texts
    written = [module.spelled(text) for text in rewritten]
    counts = word_counts(tokenizer, written)
    found = {}
    for text, each in zip(texts, written):
        if sum(counts[word] for word in WORD.findall(each)) > room:
            places = tokenizer(each, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
            found[text] = Cut(len(places), each[places[room][0] :])
    return found


def word_counts(tokenizer: Any, texts: Iterable[str]) -> dict[str, int]:
    """The tokens of each word. Of no tokenizer here does a token reach across a space, so that those of a text are
    those of its words: on one core, 100,000 captions of 30 words take a second instead of fourteen."""
    words = list({word for text in texts for word in WORD.findall(text)})
    counts: dict[str, int] = {}
    for start in range(0, len(words), TOGETHER):
        some = words[start : start + TOGETHER]
        counts |= zip(some, map(len, tokenizer(some, add_special_tokens=False).input_ids))
    return counts
