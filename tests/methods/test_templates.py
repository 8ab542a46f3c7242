"""Captions for images that have none."""

import pytest

from otl.config import SettingsError
from otl.methods.embedding import Embedding
from otl.methods.templates import SETS, captions, chosen


@pytest.mark.parametrize("name", SETS)
def test_every_sentence_has_one_place_for_the_word(name):
    assert len(SETS[name]) == len(set(SETS[name])) >= 8
    assert all(sentence.count("{}") == 1 for sentence in SETS[name])


def test_own_sentences_are_taken_as_they_are():
    assert chosen(["a {}", "{} and {}"]) == ("a {}", "{} and {}")
    assert chosen(None) == ()


@pytest.mark.parametrize("wrong", ["objects", ["a photo"]])
def test_a_set_that_does_not_exist_and_a_sentence_without_a_place_are_refused(wrong):
    with pytest.raises(SettingsError, match=r"method\.templates"):
        chosen(wrong)


def test_an_image_shows_the_only_embedding_or_the_one_named_like_its_concept():
    assert captions(["a {}"], {"cat": "<cat>"}, "data") == ["a <cat>"]
    two = {"cat": "<cat>", "dog": "sks"}
    assert captions(["a {}", "the {}"], two, "dog") == ["a sks", "the sks"]
    assert captions(["a {}"], two, "data") == []


def test_the_method_has_captions_only_with_templates():
    assert Embedding(embeddings={"cat": {}}).captions("data") == []
    assert Embedding(embeddings={"cat": {}}, templates=["my {}"]).captions("data") == ["my <cat>"]
