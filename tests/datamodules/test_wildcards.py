"""Choices in captions, in the syntax of dynamic prompts."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otl.datamodules import wildcards
from otl.datamodules.wildcards import Malformed, expand, options

COUNT = 4000  # keys, for shares
FILES = {
    "season": options(["# comment", "summer", "", "{autumn|fall}"]),
    "colours/warm": options(["3::red"]),
    "colours/cold": options(["blue"]),
    "thing": options(["a __colours/*__ thing"]),
}


def shares(text: str) -> dict[str, float]:
    """What a text becomes -> how often."""
    counts = Counter(expand(text, key, FILES) for key in range(COUNT))
    return {outcome: count / COUNT for outcome, count in counts.items()}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain", {"plain": 1}),
        ("{a|b} c", {"a c": 0.5, "b c": 0.5}),
        ("{2::a|b}", {"a": 2 / 3, "b": 1 / 3}),
        ("{0.5::a|0.1::b|0.4::c}", {"a": 0.5, "b": 0.1, "c": 0.4}),
        ("{a|}b", {"ab": 0.5, "b": 0.5}),
        ("{a|{b|c}}", {"a": 0.5, "b": 0.25, "c": 0.25}),
        ("{2$$a|b|c}", dict.fromkeys(["a, b", "a, c", "b, a", "b, c", "c, a", "c, b"], 1 / 6)),
        ("{2$$ and $$a|b}", {"a and b": 0.5, "b and a": 0.5}),
        ("{1-2$$a|b}", {"a": 0.25, "b": 0.25, "a, b": 0.25, "b, a": 0.25}),
        ("{1-$$a|b}", {"a": 0.25, "b": 0.25, "a, b": 0.25, "b, a": 0.25}),
        ("{-2$$a|b}", {"a": 0.25, "b": 0.25, "a, b": 0.25, "b, a": 0.25}),
        ("{4$$a|b}", {"a, b": 0.5, "b, a": 0.5}),
        ("__season__ is here", {"summer is here": 0.5, "autumn is here": 0.25, "fall is here": 0.25}),
        ("__colours/*__", {"red": 0.75, "blue": 0.25}),
        ("__thing__", {"a red thing": 0.75, "a blue thing": 0.25}),
        ("{2$$__colours/*__}", {"red, blue": 0.75, "blue, red": 0.25}),
        (r"\{a\|b\} snake_case", {"{a|b} snake_case": 1}),
        ("a | b :: c", {"a | b :: c": 1}),
    ],
)
def test_a_text_becomes_each_of_what_is_meant_as_often_as_it_should(text, expected):
    assert shares(text) == pytest.approx(expected, abs=0.03)


def test_choices_are_made_apart_from_each_other():
    assert shares("{a|b}{a|b}") == pytest.approx(dict.fromkeys(["aa", "ab", "ba", "bb"], 0.25), abs=0.03)


@given(st.lists(st.text(alphabet=st.characters(exclude_characters="{}|_\\:$"), min_size=1), min_size=1), st.integers(0))
def test_one_of_the_options_comes_out_as_it_is(texts, key):
    assert expand("{" + "|".join(texts) + "}", key, {}) in texts


@given(st.text(), st.integers(0))
def test_any_text_can_be_read_or_is_refused(text, key):
    try:
        wildcards.check(text, {})
    except Malformed:
        return
    assert isinstance(expand(text, key, {}), str)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{a|b", "a { without its }"),
        ("a} b", "a } without its {"),
        ("__winter__", "__winter__ is no file with lines.*there are: colours/cold, colours/warm"),
        ("{a|__winter__}", "__winter__ is no file"),
        ("{3-2$$a|b}", "below the first"),
        ("{0::a}", "every weight is 0"),
    ],
)
def test_what_cannot_be_read_says_why(text, reason):
    with pytest.raises(Malformed, match=reason):
        wildcards.check(text, FILES)


def test_files_are_named_by_their_place_in_the_folder(tmp_path):
    (tmp_path / "colours").mkdir()
    (tmp_path / "colours" / "warm.txt").write_bytes(b"\xef\xbb\xbfred\r\n# none\r\n2::dark yellow\r\n")
    (tmp_path / "notes.md").write_text("no file of lines")
    assert wildcards.read(tmp_path) == {"colours/warm": ((1.0, ("red",)), (2.0, ("dark yellow",)))}


@pytest.mark.parametrize(("content", "reason"), [(b"\xe4", "a.txt is not UTF-8"), (b"{a", "a.txt: a { without its }")])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(Malformed, match=reason):
        wildcards.read(tmp_path)


def test_files_that_lead_back_to_themselves_or_nowhere_are_refused():
    with pytest.raises(Malformed, match="a -> b -> a leads back to itself"):
        wildcards.check_files({"a": options(["__b__"]), "b": options(["x {c|__a__}"])})
    with pytest.raises(Malformed, match="__c__ is no file"):
        wildcards.check_files({"a": options(["__c__"])})
    wildcards.check_files(FILES)
