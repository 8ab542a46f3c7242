"""CLIP's tokenizer gives CLIP's ids."""

import json

import pytest
from transformers import CLIPTokenizer

from otl.formats.tokenizer import write_clip_tokenizer

CAT = [49406, 320, 1125, 539, 320, 2368, 49407]  # "a photo of a cat", as published with CLIP


@pytest.mark.parametrize(
    ("folder", "family", "pad"),
    [("tokenizer", "sd15", 49407), ("tokenizer", "sdxl", 49407), ("tokenizer_2", "sdxl", 0)],
)
def test_ids_and_padding_are_those_of_the_published_tokenizers(config, folder, family, pad):
    tokenizer = CLIPTokenizer.from_pretrained(config[family], subfolder=folder)
    assert len(tokenizer) == 49408
    ids = tokenizer("a photo of a cat", padding="max_length", truncation=True).input_ids
    assert ids == CAT + [pad] * 70


def test_text_outside_ascii_is_spelled_in_bytes(config):
    tokenizer = CLIPTokenizer.from_pretrained(config["sd15"], subfolder="tokenizer")
    assert tokenizer.unk_token_id not in tokenizer("café 猫 🙂").input_ids[1:-1]
    assert tokenizer.decode(tokenizer("Café 猫").input_ids, skip_special_tokens=True) == "café 猫"


def test_transformers_4_finds_its_files(tmp_path):
    write_clip_tokenizer(tmp_path, pad_token="!", max_length=77)
    vocabulary = json.loads((tmp_path / "vocab.json").read_text())
    assert len(vocabulary) == 49408 and sorted(vocabulary.values()) == list(range(49408))
    assert len((tmp_path / "merges.txt").read_text().splitlines()) == 1 + 48894
    assert json.loads((tmp_path / "special_tokens_map.json").read_text())["pad_token"] == "!"
