"""What `method.embeddings` may say."""

import pytest

from otl.config import SettingsError
from otl.methods.specs import Spec, parse, pattern


def test_the_placeholder_is_the_name_in_brackets_unless_given():
    assert parse({"cat": {"vectors": 2}, "new": {"placeholder": "sks", "vectors": None}}) == {
        "cat": Spec("cat", "<cat>", vectors=2),
        "new": Spec("new", "sks"),
    }


def test_no_settings_are_no_embeddings():
    assert parse(None) == parse({}) == {}


WRONG = [
    ({"cat": {"vector": 2}}, r"embeddings\.cat\.vector=2: no such setting; did you mean vectors\?"),
    ({"cat": {"vectors": 2.5}}, r"vectors=2\.5: must be a whole number"),
    ({"cat": {"vectors": True}}, r"vectors=true: must be a whole number"),
    ({"cat": {"vectors": 0}}, r"vectors=0: must be at least 1"),
    ({"cat": {"output": 1}}, r"output=1: must be true or false"),
    ({"cat": {"lr": "fast"}}, r"lr=fast: must be a number"),
    ({"cat": {"stop_after": "3 epoch"}}, r"stop_after=3 epoch: must be a number, or whole epochs as in"),
    ({"cat": {"stop_after": True}}, r"stop_after=true: must be a number, or whole epochs as in"),
    ({"cat": {"init": 3}}, r"init=3: must be a text"),
    ({"cat": {"init": "a", "file": "b.pt"}}, r"init=a and file=b\.pt both say how it starts"),
    ({"cat": {"placeholder": " "}}, r"placeholder=' ': give a word"),
    ({"cat": "cat"}, r"embeddings\.cat=cat: give its fields"),
    ({"a.b": {}}, r"embeddings\.a\.b: the name becomes a file's name"),
    ({"a": {"placeholder": "sks"}, "b": {"placeholder": "sks"}}, r"b\.placeholder=sks: the embedding a has the same"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG)
def test_a_mistake_names_the_setting_and_what_to_do(settings, message):
    with pytest.raises(SettingsError, match=message):
        parse(settings)


def test_placeholders_are_found_as_whole_words():
    found = pattern(parse({"cat": {}, "gle": {"placeholder": "gle"}}).values())
    assert found.findall("eagle gle, x<cat>y gles (gle)") == ["gle", "<cat>", "gle"]


def test_without_embeddings_nothing_is_found():
    assert pattern([]).findall("anything") == []
