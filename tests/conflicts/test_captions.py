"""Settings of captions that would do nothing are refused, with what they would need."""

from __future__ import annotations

import pytest

from otl.check import check


def found(settings, *lines: str) -> dict[str, str]:
    """Key -> message of what is wrong with the dataset's settings, `data.` left out of both."""
    problems = check(settings("data.path=.", *(f"data.{line}" for line in lines)))
    return {each.key.removeprefix("data."): each.message for each in problems if each.key.startswith("data.")}


CLASS_IMAGES = ["concepts.cat.path=.", "concepts.cat.type=regularisation", "concepts.cat.prompt=x"]


def test_what_class_images_do_serves_no_common_setting(settings):
    """Theirs are not those of data.captions."""
    lines = [*CLASS_IMAGES, "concepts.cat.captions.shuffle=true", "captions.keep=1"]
    assert list(found(settings, *lines)) == ["captions.keep"]


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["captions.shuffle=true", "captions.keep=2", "captions.separator=';'", "caption_variants=4"],
        ["captions.tag_dropout=0.1", "captions.tag_dropout_mode=weighted"],
        [
            "captions.tag_dropout=0.1",
            "captions.tag_dropout_only=[a+]",
            "captions.tag_dropout_patterns=true",
        ],
        ["captions.capitals=1", "captions.capitals_kinds=[title]"],
        ["captions.lowercase=true", "captions.keep=1"],
        ["captions.wildcards=true", "captions.wildcard_folder=.", "caption_variants=4"],
        ["captions.sources=[json,name]", "captions.json_keys=[a]", "captions.name_spaces=false"],
        ["captions.sources=[json]", "captions.separator=';'"],
        ["captions.trigger=x", "captions.separator=';'", "captions.prefix=a", "captions.postfix=b"],
        ["captions.keep=1", "concepts.cat.path=.", "concepts.cat.captions.shuffle=true"],
        ["captions.shuffle=true", "concepts.cat.path=.", "concepts.cat.captions.keep=1"],
        ["prompt=x"],
        ["captions.sources=[file]", *CLASS_IMAGES],
        ["captions.sources=[file]", "concepts.cat.path=.", "concepts.cat.prompt=x", "concepts.cat.generate=3"],
    ],
)
def test_what_makes_sense_is_accepted(settings, lines):
    assert found(settings, *lines) == {}


@pytest.mark.parametrize(
    ("line", "needs"),
    [
        ("captions.json_suffix=.x", "json among data.captions.sources"),
        ("captions.json_keys=[a]", "json among data.captions.sources"),
        ("captions.json_separator=x", "json among data.captions.sources"),
        ("captions.name_spaces=false", "name among data.captions.sources"),
        ("captions.name_cut_numbers=false", "name among data.captions.sources"),
        ("captions.separator=';'", "shuffle, tag_dropout"),
        ("captions.keep=1", "shuffle, tag_dropout"),
        ("captions.tag_dropout_mode=whole", "tag_dropout above 0"),
        ("captions.tag_dropout_never=[a]", "tag_dropout above 0"),
        ("captions.tag_dropout_only=[a]", "tag_dropout above 0"),
        ("captions.tag_dropout_patterns=true", "tag_dropout_never or tag_dropout_only"),
        ("captions.capitals_kinds=[upper]", "capitals above 0"),
        ("captions.wildcard_folder=.", "wildcards=true"),
        ("caption_variants=4", "shuffle, tag_dropout"),
    ],
)
def test_a_setting_of_something_that_is_off_is_refused(settings, line, needs):
    key = line.partition("=")[0]
    problems = found(settings, line)
    assert list(problems) == [key] and "would have no effect" in problems[key] and needs in problems[key]


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        (["captions.sources=[json]", "captions.suffix=.x"], "captions.suffix", "needs file among"),
        (["captions.sources=[file]", "prompt=a cat"], "prompt", "needs prompt among"),
        (
            ["concepts.a.path=.", "concepts.a.prompt=x", "concepts.a.captions.sources=[file]"],
            "concepts.a.prompt",
            "needs prompt among",
        ),
        (["concepts.a.path=.", "concepts.a.captions.keep=2"], "concepts.a.captions.keep", "2 would have no effect"),
        (
            ["captions.shuffle=true", "caption_variants=4", "cache=false"],
            "caption_variants",
            "cache",
        ),
        (["captions.sources=[]"], "captions.sources", "at least one"),
        (["captions.suffix=''"], "captions.suffix", "at least one"),
        (["captions.shuffle=true", "captions.separator=''"], "captions.separator", "at least one"),
        (
            ["captions.wildcards=true", "captions.wildcard_folder=gone"],
            "captions.wildcard_folder",
            "gone is",
        ),
        (
            [
                "captions.tag_dropout=1",
                "captions.tag_dropout_patterns=true",
                "captions.tag_dropout_only=['(']",
            ],
            "captions.tag_dropout_only",
            "no regular expression",
        ),
        (["captions.tag_dropout=2"], "captions.tag_dropout", "at most 1"),
        (["concepts.a.path=.", "concepts.a.captions.capitals=-1"], "concepts.a.captions.capitals", "at least 0"),
        (["captions.shuffle=true", "captions.keep=-1"], "captions.keep", "at least 0"),
        (["captions.shuffle=true", "caption_variants=0"], "caption_variants", "at least 1"),
    ],
)
def test_what_cannot_be_meant_is_refused(settings, lines, key, message):
    problems = found(settings, *lines)
    assert list(problems) == [key] and message in problems[key]
