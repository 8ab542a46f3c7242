"""What an image is called: a function of its key and of the settings, each of which shows in it."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from otl.config import Capitals, CaptionOptions, Concept, Data, SettingsError, TagDropout
from otl.datamodules import texts
from otl.datamodules.scan import scan
from otl.datamodules.texts import Texts, Writer, choose, dropped
from otl.types import Sample, Size
from tests.datamodules.fakes import data, picture

KEYS = st.integers(0, 2**63 - 1)
TAGS = st.lists(st.text(min_size=1).map(lambda text: text.replace(",", "").strip()).filter(bool), max_size=12)
SEVERAL = range(60)  # keys, enough for each of a few outcomes


def sample(*captions: str, concept: str = "data") -> Sample:
    return Sample(Path("a.png"), Size(64, 64), list(captions), concept=concept)


def written(caption: str, key: int = 0, *, varied: bool = True, **options) -> str:
    return Writer(CaptionOptions(**options), varied=varied).text(caption, key)


def outcomes(caption: str, **options) -> set[str]:
    writer = Writer(CaptionOptions(**options))
    return {writer.text(caption, key) for key in SEVERAL}


def called(*, dropout: float = 0.0, variants: int | None = None, seed: int = 0, **options) -> Texts:
    return Texts({"data": Writer(CaptionOptions(**options))}, {"data": seed}, dropout=dropout, variants=variants)


# Which caption


def test_every_caption_is_chosen_about_as_often():
    chosen = [choose(["a", "b", "c"], key) for key in range(3000)]
    assert all(900 < chosen.count(caption) < 1100 for caption in "abc")


def test_the_choice_is_a_function_of_the_key():
    assert [choose(["a", "b"], key) for key in range(50)] == [choose(["a", "b"], key) for key in range(50)]


def test_the_share_of_captions_is_dropped():
    assert 900 < sum(dropped(key, 0.1) for key in range(10000)) < 1100
    assert not any(dropped(key, 0.0) for key in range(1000))
    assert all(dropped(key, 1.0) for key in range(1000))


def test_dropping_does_not_depend_on_the_choice():
    kept = [choose(["a", "b"], key) for key in range(4000) if not dropped(key, 0.5)]
    assert 0.45 < kept.count("a") / len(kept) < 0.55


# Each setting


@given(st.text(), KEYS)
def test_without_settings_a_caption_stays_as_it_is_written(caption, key):
    assert written(caption, key) == caption.strip()


def test_tags_are_shuffled_and_the_first_ones_kept():
    assert outcomes("a, b,c", shuffle=True, keep=1) == {"a, b, c", "a, c, b"}
    assert outcomes("a, b; c", shuffle=True, separator=";") == {"a, b; c", "c; a, b"}
    assert outcomes("a, b ||| c, d", shuffle=True, keep_separator="|||") == {"a, b, c, d", "a, b, d, c"}


def test_a_mark_that_keeps_tags_is_no_part_of_the_text():
    assert written("a ||| b", keep_separator="|||") == "a, b"
    assert written("a ||| b", varied=False, keep_separator="|||") == "a, b"


def test_tags_are_dropped_as_the_settings_say():
    """OneTrainer's three cases."""
    options = {"tag_dropout": 1.0, "tag_dropout_mode": TagDropout.whole, "keep": 1}
    assert written("a, b, c", **options) == "a"
    assert written("a, b, c", **options, tag_dropout_never=["b"]) == "a, b"
    assert written("a, b, c", **options, tag_dropout_only=["b"]) == "a, c"
    assert written("a, b, bb", **options, tag_dropout_only=["b+"], tag_dropout_patterns=True) == "a"
    assert outcomes("a, b", tag_dropout=0.5) == {"a, b", "a", "b", ""}
    assert outcomes("a, b", tag_dropout=0.5, tag_dropout_mode=TagDropout.whole) == {"a, b", ""}
    assert "b" not in outcomes("a, b", tag_dropout=0.01, tag_dropout_mode=TagDropout.weighted)


def test_a_list_of_tags_may_lie_in_a_file(tmp_path):
    (tmp_path / "never.txt").write_text("b\nRed Hair\n")
    never = [f"file:{tmp_path / 'never.txt'}", "d"]
    assert written("a, b, red hair, c, d", tag_dropout=1.0, tag_dropout_never=never) == "b, red hair, d"
    with pytest.raises(SettingsError, match=r"gone\.txt does not exist"):
        written("a", tag_dropout_never=[f"file:{tmp_path / 'gone.txt'}"])


def test_letters_change_but_in_kept_tags():
    options = {"capitals": 1.0, "capitals_kinds": [Capitals.upper]}
    assert written("a, Bb", keep=1, **options) == "a, BB"
    assert outcomes("ab", capitals=0.5) >= {"ab", "AB", "Ab"}
    assert written("A, Bb", lowercase=True) == "a, bb"
    assert written("A, Bb", keep=1, lowercase=True) == "A, bb"
    assert outcomes("RED", capitals=0.5, capitals_kinds=[Capitals.first], lowercase=True) == {"red", "Red"}


def test_underscores_become_spaces():
    assert written("long_hair, ^_^", spaces=True) == "long hair, ^_^"


def test_choices_are_made(tmp_path):
    (tmp_path / "my_colours.txt").write_text("red\nblue\n")
    assert outcomes("{a|b}", wildcards=True) == {"a", "b"}
    assert outcomes("{a|b}") == {"{a|b}"}
    options = {"wildcards": True, "wildcard_folder": str(tmp_path)}
    assert outcomes("__my_colours__ hair", **options, spaces=True) == {"red hair", "blue hair"}
    both = outcomes("x", **options, prefix="{a|b}", postfix="{c|d}")
    assert both == {"a x c", "a x d", "b x c", "b x d"}
    assert outcomes("{a, b|c, d}", wildcards=True, shuffle=True) == {"a, b", "b, a", "c, d", "d, c"}


@pytest.mark.parametrize(
    ("caption", "options", "text"),
    [
        ("a cat", {"prefix": "photo of"}, "photo of a cat"),
        ("a cat", {"prefix": "photo of "}, "photo of a cat"),
        ("a cat", {"postfix": "in the sun"}, "a cat in the sun"),
        ("a cat", {"postfix": ", in the sun"}, "a cat, in the sun"),
        ("", {"prefix": "photo", "postfix": "sun"}, "photo sun"),
        ("a cat", {"trigger": "sks"}, "sks, a cat"),
        ("a cat", {"trigger": "sks", "separator": ";"}, "sks; a cat"),
        ("a cat", {"trigger": "sks", "prefix": "photo of", "postfix": "x"}, "photo of sks, a cat x"),
        ("a SKS cat", {"trigger": "sks"}, "a SKS cat"),
        ("asks", {"trigger": "sks"}, "sks, asks"),
        ("a cat", {"trigger": "sks", "prefix": "sks,"}, "sks, a cat"),
        ("a <cat>", {"trigger": "<cat>"}, "a <cat>"),
        ("", {"trigger": "sks"}, "sks"),
    ],
)
def test_what_is_put_before_and_behind(caption, options, text):
    assert written(caption, **options) == text


def test_a_dropped_trigger_is_put_back():
    assert outcomes("a, sks, b", trigger="sks", tag_dropout=1.0) == {"sks"}


@given(TAGS, KEYS, st.integers(0, 4))
def test_a_shuffle_keeps_the_tags_and_the_first_ones_where_they_are(words, key, keep):
    text = written(", ".join(words), key, shuffle=True, keep=keep)
    assert sorted(text.split(", ")) == sorted(", ".join(words).split(", "))
    assert text.startswith(", ".join(words[:keep]))


def test_held_out_captions_do_not_vary_but_in_their_choices():
    options = {"shuffle": True, "tag_dropout": 0.5, "capitals": 0.5, "trigger": "sks", "prefix": "x", "lowercase": True}
    writer = Writer(CaptionOptions(**options, wildcards=True), varied=False)
    assert {writer.text("A, {b|c}", key) for key in SEVERAL} == {"x sks, a, b", "x sks, a, c"}


# Of a draw


def test_each_draw_has_a_text_of_its_own_where_nothing_is_cached():
    draws = {called(shuffle=True).of(sample("a, b, c, d, e"), key) for key in range(500)}
    assert len(draws) > 100  # of 120 orders


def test_a_draw_takes_one_of_the_variants_each_as_often():
    some = called(shuffle=True, variants=4)
    caption = sample("a, b, c, d, e, f")
    draws = [some.of(caption, key) for key in range(4000)]
    assert len(set(draws)) == 4 == len(some.all_of(caption))
    assert set(draws) == set(some.all_of(caption))
    assert all(abs(draws.count(text) / 4000 - 0.25) < 0.03 for text in set(draws))


def test_every_caption_has_its_variants():
    some, image = called(shuffle=True, variants=3), sample("a, b, c, d, e, f", "g, h, i, j, k, l")
    assert len(some.all_of(image)) == 6
    assert set(some.all_of(image)) == set(some.all_of(sample(*reversed(image.captions))))
    assert {some.of(image, key) for key in range(300)} == set(some.all_of(image))


def test_images_with_one_caption_share_its_variants_and_other_images_do_not_move_them():
    some = called(shuffle=True, variants=3)
    assert some.distinct([sample("a, b, c, d, e, f")] * 5) == set(some.all_of(sample("a, b, c, d, e, f")))


def test_variants_are_others_with_another_seed():
    image = sample("a, b, c, d, e, f")
    assert called(shuffle=True, variants=3).all_of(image) == called(shuffle=True, variants=3).all_of(image)
    assert called(shuffle=True, variants=3).all_of(image) != called(shuffle=True, variants=3, seed=1).all_of(image)


class Counting(Writer):
    """Counts what it writes."""

    count = 0

    def text(self, caption: str, key: int) -> str:
        self.count += 1
        return super().text(caption, key)


def test_captions_that_do_not_vary_are_written_once_each():
    writer = Counting(CaptionOptions(wildcards=True, prefix="x"))
    some = Texts({"data": writer}, {"data": 0}, variants=16)
    assert some.distinct([sample("b"), sample("a"), sample("{c|c}")]) == {"x a", "x b", "x c"}
    assert writer.count == 1 + 1 + 16


def test_the_empty_text_is_among_them_where_captions_are_dropped():
    assert called(variants=2, dropout=0.1).distinct([sample("b", "a"), sample("a")]) == {"", "a", "b"}
    assert called(variants=2).distinct([sample("b", "a"), sample("a")]) == {"a", "b"}
    assert {called(dropout=0.5, prefix="x").of(sample("a"), key) for key in SEVERAL} == {"", "x a"}


def test_the_texts_of_a_concept_are_written_its_way():
    concept = Concept(path="x")
    concept.captions.prefix = "photo of"
    some = Texts.of_dataset(Data(concepts={"cat": concept}), seed=0, training=True, cached=True)
    assert some.of(sample("a cat", concept="cat"), 0) == "photo of a cat"
    assert some.of(sample("a dog"), 0) == "a dog"


def test_a_concept_with_a_seed_of_its_own_has_variants_of_its_own():
    concepts = {"cat": Concept(path="x", seed=5), "dog": Concept(path="x")}
    settings = Data(concepts=concepts, captions=CaptionOptions(shuffle=True))
    some = [Texts.of_dataset(settings, seed=seed, training=True, cached=True) for seed in (0, 1)]
    cats, dogs = ([each.all_of(sample("a, b, c, d, e", concept=name)) for each in some] for name in concepts)
    assert cats[0] == cats[1] and cats[0] != dogs[0] and dogs[0] != dogs[1]


# What cannot be read


def test_choices_that_cannot_be_read_are_named_with_their_images(tmp_path):
    picture(tmp_path / "a.png", caption="a {red|blue} cat")
    picture(tmp_path / "b.png", shade=9, caption="{red")
    picture(tmp_path / "c.png", shade=19, caption="__colour__")
    (problem,) = scan(data(tmp_path, captions=CaptionOptions(wildcards=True)))[1]
    assert problem.fatal and problem.key == "data.captions.wildcards"
    assert [re.match(r"(.*?): (.*?) ", detail)[1] for detail in problem.details] == [
        str(tmp_path / "b.png"),
        str(tmp_path / "c.png"),
    ]
    assert scan(data(tmp_path))[1] == []


def test_a_prefix_or_a_folder_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"data\.captions\.prefix.*without its }"):
        texts.writers(Data(captions=CaptionOptions(wildcards=True, prefix="{a")))
    with pytest.raises(SettingsError, match=rf"wildcard_folder={tmp_path}.*no \.txt file"):
        texts.writers(Data(captions=CaptionOptions(wildcards=True, wildcard_folder=str(tmp_path))))
    (tmp_path / "a.txt").write_text("__a__")
    with pytest.raises(SettingsError, match="a -> a leads back"):
        texts.writers(Data(captions=CaptionOptions(wildcards=True, wildcard_folder=str(tmp_path))))
