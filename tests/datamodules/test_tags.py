"""What is done to tags: which stay, which go, in which order and letters."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otl.config import Capitals, TagDropout
from otl.datamodules import tags
from otl.datamodules.tags import Listed

KEYS = st.integers(0, 2**63 - 1)
TAGS = st.lists(st.text(min_size=1).map(lambda text: text.replace(",", "").strip()).filter(bool), max_size=12)
COUNT = 4000  # keys, for shares


def shares(outcomes: list[list[str]]) -> dict[str, float]:
    """Tag -> share of the outcomes that have it."""
    counts = Counter(tag for tags in outcomes for tag in tags)
    return {tag: count / len(outcomes) for tag, count in counts.items()}


def thinned(words: str, key: int, *, share: float = 1.0, mode: TagDropout = TagDropout.each, never="", only=""):
    white, black = Listed.of(never.split(), patterns=False), Listed.of(only.split(), patterns=False)
    return tags.thinned(
        words.split(),
        share=share,
        mode=mode,
        droppable=lambda tag: tag not in white and (not black or tag in black),
        key=key,
    )


# Which of them stay


@pytest.mark.parametrize(
    ("caption", "keep", "mark", "parts"),
    [
        ("a, b,c", 0, "", ([], ["a", "b", "c"], [])),
        ("a, b, c", 2, "", (["a", "b"], ["c"], [])),
        ("a, b", 5, "", (["a", "b"], [], [])),
        ("a, , b,", 0, "", ([], ["a", "b"], [])),
        ("a, b ||| c, d", 1, "|||", (["a", "b"], ["c", "d"], [])),  # as kohya's keep_tokens_separator
        ("a ||| b, c ||| d, e", 0, "|||", (["a"], ["b", "c"], ["d", "e"])),
        ("a, b, c", 1, "|||", (["a"], ["b", "c"], [])),  # there is none in it
        ("", 1, "", ([], [], [])),
    ],
)
def test_the_first_tags_stay_or_those_before_a_mark_and_behind_a_second(caption, keep, mark, parts):
    assert tags.parted(caption, separator=",", keep=keep, keep_separator=mark) == parts


@pytest.mark.parametrize(("separator", "joiner"), [(",", ", "), (";", "; "), (". ", ". "), (" ", " ")])
def test_tags_are_joined_as_they_were_parted(separator, joiner):
    caption = joiner.join(["a", "b", "c"])
    assert tags.joiner(separator) == joiner
    assert joiner.join(tags.split(caption, separator)) == caption


# Dropout


def test_all_are_dropped_together_or_none():
    outcomes = [thinned("a b c", key, share=0.3, mode=TagDropout.whole) for key in range(COUNT)]
    assert {len(outcome) for outcome in outcomes} == {0, 3}
    assert shares(outcomes)["a"] == pytest.approx(0.7, abs=0.03)


def test_each_is_dropped_by_itself():
    outcomes = [thinned("a b c", key, share=0.3) for key in range(COUNT)]
    assert shares(outcomes) == pytest.approx({"a": 0.7, "b": 0.7, "c": 0.7}, abs=0.03)
    assert sum(outcome == [] for outcome in outcomes) / COUNT == pytest.approx(0.3**3, abs=0.01)


def test_later_ones_are_dropped_more_often_where_weighted():
    """OneTrainer's random weighted: the i-th of n that may be dropped with p * i / n."""
    outcomes = [thinned("a k b c d", key, share=0.4, mode=TagDropout.weighted, never="k") for key in range(COUNT)]
    assert shares(outcomes) == pytest.approx({"a": 0.9, "k": 1.0, "b": 0.8, "c": 0.7, "d": 0.6}, abs=0.03)


@pytest.mark.parametrize("mode", [TagDropout.whole, TagDropout.each])
@pytest.mark.parametrize(("never", "only", "left"), [("b", "", "b"), ("", "b", "c"), ("", "", ""), ("b", "b c", "b")])
def test_white_and_black_lists(mode, never, only, left):
    """OneTrainer's: on a, b, c with the first kept and a probability of 1, {b} leaves b or c, no list nothing."""
    assert thinned("b c", 5, mode=mode, never=never, only=only) == left.split()


def test_a_list_is_of_whole_tags_capitals_aside_or_of_patterns():
    words = Listed.of(["Red Hair", " x "], patterns=False)
    assert "red hair" in words and "X" in words and "red" not in words and "red hair b" not in words
    patterns = Listed.of([r"\d+girls?", "red .*"], patterns=True)
    assert "2girls" in patterns and "1girl" in patterns and "Red hair" in patterns and "a 1girl" not in patterns
    assert not Listed.of(["", " "], patterns=True)


@given(TAGS, KEYS, st.floats(0, 1), st.sampled_from(TagDropout), st.data())
def test_what_is_on_the_white_list_is_never_dropped_and_the_rest_keeps_its_order(words, key, share, mode, data):
    never = data.draw(st.lists(st.sampled_from(words)) if words else st.just([]))
    listed = Listed.of(never, patterns=False)
    left = tags.thinned(words, share=share, mode=mode, droppable=lambda tag: tag not in listed, key=key)
    assert [tag for tag in left if tag in never] == [tag for tag in words if tag in never]
    remaining = iter(words)
    assert all(tag in remaining for tag in left)


# Order


@given(TAGS, KEYS)
def test_a_shuffle_keeps_the_tags(words, key):
    assert Counter(tags.shuffled(words, key)) == Counter(words)


def test_every_order_is_as_likely():
    orders = Counter("".join(tags.shuffled("abc", key)) for key in range(COUNT))
    assert len(orders) == 6 and all(abs(count / COUNT - 1 / 6) < 0.03 for count in orders.values())


# Letters


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Capitals.upper, "RED HAIR, IT'S"), (Capitals.title, "Red Hair, It's"), (Capitals.first, "Red hair, it's")],
)
def test_capitals_of_each_kind(kind, expected):
    assert tags.capitalized("red hair, it's", kind, key=0, index=0) == expected


def test_random_capitals_are_half_of_the_letters():
    letters = "".join(tags.capitalized("abcdefgh", Capitals.random, key=key, index=0) for key in range(500))
    assert sum(map(str.isupper, letters)) / len(letters) == pytest.approx(0.5, abs=0.05)
    assert tags.capitalized("ABCDEFGHIJKLMNOP", Capitals.random, key=0, index=0) != "ABCDEFGHIJKLMNOP"


def test_a_share_of_tags_has_capitals_each_kind_as_often():
    kinds = [Capitals.upper, Capitals.first]
    outcomes = [tags.recased(["red hair"], share=0.6, kinds=kinds, key=key) for key in range(COUNT)]
    assert shares(outcomes) == pytest.approx({"red hair": 0.4, "RED HAIR": 0.3, "Red hair": 0.3}, abs=0.03)


@given(st.text(), st.sampled_from(Capitals), KEYS)
def test_letters_stay_the_same_but_for_their_case(tag, kind, key):
    assert tags.capitalized(tag, kind, key=key, index=0).casefold() == tag.casefold()
    assert tags.lowered(tag).casefold() == tag.casefold()


def test_the_word_of_an_embedding_keeps_its_letters():
    assert tags.capitalized("a <My_cat> b", Capitals.upper, key=0, index=0) == "A <My_cat> B"
    assert tags.lowered("A <My_cat> B") == "a <My_cat> b"
    assert tags.spaced("a_big <My_cat>", ",") == "a big <My_cat>"


def test_underscores_become_spaces_but_in_faces():
    assert tags.spaced("long_hair,^_^, o_o , looking_at_viewer", ",") == "long hair,^_^, o_o , looking at viewer"
