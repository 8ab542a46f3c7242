"""Captions for images that have none."""

import pytest

from otl.config import SettingsError
from otl.methods.embedding import Embedding
from otl.methods.finetune import Finetune
from otl.methods.inpaint import Inpaint
from otl.methods.loha import Loha
from otl.methods.lokr import Lokr
from otl.methods.lora import Dora, Lora
from otl.methods.oft import Oft
from otl.methods.templates import SETS, captions, chosen

METHODS = [Embedding, Lora, Dora, Loha, Lokr, Oft, Finetune, Inpaint]


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


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_every_method_has_captions_where_it_has_templates(method):
    assert method(embeddings={"cat": {}}).captions("data") == []
    assert method(embeddings={"cat": {}}, templates=["my {}"]).captions("data") == ["my <cat>"]


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.__name__)
def test_templates_need_an_embedding(method):
    assert method().captions("data") == []
    with pytest.raises(SettingsError, match=r"method\.templates=object: there are no embeddings"):
        method(templates="object")
