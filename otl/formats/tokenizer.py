"""CLIP's tokenizer as files, from the one copy of its byte-pair merges that ships with OTL."""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path

from otl.config import assets_dir

START, END = "<|startoftext|>", "<|endoftext|>"


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def byte_letters() -> list[str]:
    """One printable letter for each byte, in the order of GPT-2's ids: first those that print as they are, then the
    rest, moved above 255. https://github.com/openai/gpt-2/blob/master/src/encoder.py"""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + number) for number in range(256 - len(printable))]


def clip_vocabulary(merges: list[str]) -> dict[str, int]:
    """Token -> id: the bytes, the bytes that end a word, the merges in their order, start and end."""
    letters = byte_letters()
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    return {token: number for number, token in enumerate([*tokens, START, END])}


def clip_merges() -> str:
    """The text of CLIP's merges.txt: a line of its version, then one pair a line."""
    return gzip.decompress((assets_dir() / "clip_tokenizer" / "merges.txt.gz").read_bytes()).decode()


def write_clip_tokenizer(folder: Path, *, pad_token: str, max_length: int = 77, merges: str | None = None) -> None:
    """Write the tokenizer of OpenAI's CLIP as `CLIPTokenizer.from_pretrained` of transformers 4 and 5 reads it.

    Args:
        folder: made where it is absent.
        pad_token: "<|endoftext|>", or "!" for SDXL's second text encoder.
        max_length: tokens of a prompt, with start and end.
        merges: the text of a merges.txt; None: CLIP's own.
    """
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    merges = merges or clip_merges()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "merges.txt").write_text(merges, encoding="utf-8")
    write_json(folder / "vocab.json", clip_vocabulary(merges.splitlines()[1:]))
    write_json(folder / "special_tokens_map.json", tokens)
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": max_length, "do_lower_case": True, **tokens},
    )
