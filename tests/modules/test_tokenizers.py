"""How long captions are, before any weight is loaded."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otl.modules import tokenizers
from tests import tiny


@pytest.fixture(scope="module")
def clip():
    """That which ships with OTL."""
    return tokenizers.of_assets("sd15", "tokenizer")


def tokens(tokenizer, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False).input_ids)


def test_clips_own_tokenizer_is_the_published_one(clip):
    """The size of its vocabulary, and ids from its vocab.json."""
    assert len(clip) == 49408
    assert clip("a photo of a cat", add_special_tokens=False).input_ids == [320, 1125, 539, 320, 2368]


@given(st.text(st.one_of(st.sampled_from(" ,.-_()'\n\t\u00a0"), st.characters(codec="utf-8")), max_size=60))
def test_the_tokens_of_a_text_are_those_of_its_words(clip, text):
    counts = tokenizers.word_counts(clip, [text])
    assert sum(counts[word] for word in tokenizers.WORD.findall(text)) == tokens(clip, text)


@given(st.text(st.sampled_from(" abcXYZ,.!<>\n"), max_size=60))
def test_so_are_those_of_t5(text):
    t5 = tiny.t5_tokenizer()
    counts = tokenizers.word_counts(t5, [text])
    assert sum(counts[word] for word in tokenizers.WORD.findall(text)) == tokens(t5, text)


def test_a_folder_without_a_vocabulary_is_none(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "CLIPTokenizer"}')
    assert tokenizers.read(tmp_path) is None
