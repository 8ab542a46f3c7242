"""Where captions come from, each source by its rules; and what becomes of an image without any."""

import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from otl.config import CaptionOptions, CaptionSource, Concept, Data, Missing
from otl.datamodules import captions
from otl.datamodules.captions import Unreadable, found
from otl.datamodules.scan import scan
from otl.types import Problem, Sample
from tests.datamodules.fakes import data, picture


def read(image: Path, *sources: str, prompt: str | None = None, given: tuple[str, ...] = (), **options) -> list[str]:
    """The captions of an image by those sources."""
    chosen = [CaptionSource(source) for source in sources]
    return found(image, CaptionOptions(sources=chosen, **options), prompt=prompt, given=given)


def described(path: Path, content: object) -> Path:
    """An image's path, with a JSON file beside it."""
    path.with_suffix(".json").write_text(json.dumps(content), encoding="utf-8")
    return path


# Text files


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        (b"a cat", ["a cat"]),
        (b"\xef\xbb\xbfa cat\r\n\r\n  two cats \r\n", ["a cat", "two cats"]),
        (b"a cat\rtwo cats", ["a cat", "two cats"]),
        ("ein Kätzchen, 猫\n".encode(), ["ein Kätzchen, 猫"]),
        ("one\u2028line\x0b".encode(), ["one\u2028line"]),
        (b"", []),
        (b"\xef\xbb\xbf\r\n \n", []),
    ],
)
def test_a_caption_a_line(tmp_path, content, captions):
    (tmp_path / "a.b.txt").write_bytes(content)
    assert read(tmp_path / "a.b.png", "file") == captions


@pytest.mark.parametrize("suffix", [".caption", "-tags.txt", ".png.txt"])
def test_the_text_file_has_the_suffix_of_choice(tmp_path, suffix):
    (tmp_path / "a.txt").write_text("not this one")
    (tmp_path / f"a{suffix}").write_text("this one")
    assert read(tmp_path / "a.png", "file", suffix=suffix) == ["this one"]


def test_a_text_file_may_carry_the_images_own_suffix_too(tmp_path):
    (tmp_path / "a.png.txt").write_text("of the png")
    assert read(tmp_path / "a.png", "file") == ["of the png"]
    assert read(tmp_path / "a.jpg", "file") == []
    (tmp_path / "a.txt").write_text("of both")
    assert read(tmp_path / "a.png", "file") == ["of both"]


def test_a_name_too_long_to_have_a_neighbour_has_none(tmp_path):
    assert read(tmp_path / f"{'x' * 251}.png", "file", "json") == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("Kätzchen".encode("latin-1"), "invalid.*byte 0xe4 at 1.*save it as UTF-8"),
        ("Kätzchen".encode("utf-16"), "looks like UTF-16.*save it as UTF-8"),
        ("a cat".encode("utf-16-le"), "looks like UTF-16"),
    ],
)
def test_another_encoding_is_named(tmp_path, content, reason):
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(Unreadable, match=f"a.txt is not UTF-8 text.*{reason}"):
        read(tmp_path / "a.png", "file")


def test_a_caption_that_cannot_be_read_is_reported_with_its_image(tmp_path):
    picture(tmp_path / "a.png").with_suffix(".txt").write_bytes("Kätzchen".encode("latin-1"))
    (problem,) = [each for each in scan(data(tmp_path))[1] if each.key == "data.broken_images"]
    assert problem.fatal and problem.details[0].startswith(f"{tmp_path / 'a.png'}: its caption a.txt is not UTF-8")


# JSON files


@pytest.mark.parametrize(
    ("content", "options", "caption"),
    [
        ({"caption": "a cat", "tags": "grass, sun"}, {}, "a cat, grass, sun"),  # as kohya joins them
        ({"tags": ["1girl", "", "red hair"]}, {}, "1girl, red hair"),
        ({"caption": "two\n\nparagraphs"}, {}, "two paragraphs"),
        ({"tags": "1girl"}, {"json_keys": ["caption"]}, None),
        ({"tag_string": "1girl long_hair", "rating": "g"}, {"json_keys": ["tag_string"]}, "1girl long_hair"),
        ({"tag_string": "1girl  solo"}, {"json_keys": ["tag_string"], "json_separator": " "}, "1girl, solo"),
        ({"tags": {"artist": ["a"], "general": ["b", "c"]}}, {}, "a, b, c"),  # e621's
        ({"tags": {"artist": ["a"], "general": ["b", "c"]}}, {"json_keys": ["tags.general"]}, "b, c"),
        ({"tags.x": "whole", "tags": {"x": "inside"}}, {"json_keys": ["tags.x"]}, "whole"),
        ({"tags": ["a", "b"]}, {"separator": "; "}, "a; b"),
        ({"caption": None}, {}, None),
        ({"caption": "猫"}, {}, "猫"),
    ],
)
def test_a_json_file_has_the_caption_under_the_chosen_keys(tmp_path, content, options, caption):
    image = described(tmp_path / "a.png", content)
    assert read(image, "json", **options) == ([] if caption is None else [caption])


def test_the_json_file_has_the_suffix_of_choice(tmp_path):
    described(tmp_path / "a.png", {"caption": "not this one"})
    (tmp_path / "a.meta.json").write_text('{"caption": "this one"}')
    assert read(tmp_path / "a.png", "json", json_suffix=".meta.json") == ["this one"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [("{", "a.json is not JSON"), ("[]", "no JSON object"), ('{"tags": [1]}', "a.json, tags is 1: a string or a list")],
)
def test_a_json_file_of_another_kind_is_named(tmp_path, content, reason):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(Unreadable, match=reason):
        read(tmp_path / "a.png", "json")


# Names


@pytest.mark.parametrize(
    ("name", "options", "caption"),
    [
        ("red_cat_001.png", {}, "red cat"),
        ("red cat (12).jpg", {}, "red cat"),
        ("shot_2024-05-01.png", {}, "shot"),
        ("2girls.png", {}, "2girls"),
        ("red_cat2.png", {"name_cut_numbers": False}, "red cat2"),
        ("red_cat.png", {"name_spaces": False}, "red_cat"),
        ("0001.png", {}, None),
    ],
)
def test_a_name_is_a_caption_by_its_rules(name, options, caption):
    assert read(Path(name), "name", **options) == ([] if caption is None else [caption])


# Which of them


def test_the_first_source_that_has_a_caption_counts(tmp_path):
    image = described(tmp_path / "red_cat.png", {"caption": "of the json"})
    order = ("manifest", "file", "json", "name", "prompt")
    assert read(image, *order, prompt="p", given=("of the manifest",)) == ["of the manifest"]
    assert read(image, *order, prompt="p") == ["of the json"]
    image.with_suffix(".txt").write_text("of the text")
    assert read(image, *order, prompt="p") == ["of the text"]
    assert read(image, *reversed(order), prompt="one\ntwo") == ["one", "two"]
    assert read(image, "name", "file") == ["red cat"]
    assert read(image, "prompt") == []


def test_by_default_a_text_file_goes_before_the_prompt(tmp_path):
    picture(tmp_path / "a.png", caption="its own")
    picture(tmp_path / "b.png", caption=None)
    samples, problems = scan(data(tmp_path, prompt="a sks dog"))
    assert [sample.captions for sample in samples] == [["its own"], ["a sks dog"]] and not problems[1:]


def test_an_empty_prompt_is_a_caption(tmp_path):
    assert read(tmp_path / "a.png", "file", "prompt", prompt="") == [""]


def test_a_concept_overrides_field_by_field():
    own = OmegaConf.merge(
        OmegaConf.structured(Data(captions=CaptionOptions(suffix=".caption", separator=";"))),
        {"concepts": {"cat": {"path": "x", "captions": {"suffix": "-cat.txt", "sources": ["name", "file"]}}}},
        {"concepts": {"dog": {"path": "x"}}},
    )
    of_concept = captions.options(OmegaConf.to_object(own))
    assert of_concept["data"] == of_concept["dog"] == CaptionOptions(suffix=".caption", separator=";")
    assert of_concept["cat"] == CaptionOptions(
        suffix="-cat.txt", separator=";", sources=[CaptionSource.name, CaptionSource.file]
    )


def test_the_images_of_a_concept_are_captioned_its_way(tmp_path):
    picture(tmp_path / "cats" / "red_cat.png", caption="from a file")
    picture(tmp_path / "dogs" / "red_dog.png", shade=9, caption="from a file")
    settings = Data(concepts={name: Concept(path=str(tmp_path / name)) for name in ("cats", "dogs")})
    settings.concepts["cats"].captions.sources = [CaptionSource.name]
    assert [sample.captions for sample in scan(settings)[0]] == [["red cat"], ["from a file"]]


# None of them


def lacking(path: Path, policy: Missing, caption: str | None = None) -> tuple[list[Sample], Problem]:
    """One image without a caption and one with, under a policy."""
    picture(path / "a.png", caption=caption)
    picture(path / "b.png", shade=9)
    samples, (problem,) = scan(data(path, missing_captions=policy))
    assert problem.key == "data.missing_captions" and "1 of 2 images" in problem.message
    return samples, problem


@pytest.mark.parametrize("caption", [None, "", "\n \n"])
def test_a_missing_caption_is_an_error_that_names_the_image_and_where_one_was_sought(tmp_path, caption):
    samples, problem = lacking(tmp_path, Missing.error, caption)
    assert problem.fatal and problem.details == [str(tmp_path / "a.png")]
    assert "a .txt of the same name" in problem.message and "data.prompt" in problem.message
    assert [sample.caption_missing for sample in samples] == [True, False]


@pytest.mark.parametrize(("policy", "named"), [(Missing.warn, True), (Missing.allow, False)])
def test_a_missing_caption_may_be_the_empty_one(tmp_path, policy, named):
    samples, problem = lacking(tmp_path, policy)
    assert not problem.fatal and problem.details == [str(tmp_path / "a.png")] * named
    assert [(sample.captions, sample.caption_missing) for sample in samples] == [([""], True), (["a picture"], False)]


def test_an_image_without_a_caption_may_be_left_out(tmp_path):
    samples, problem = lacking(tmp_path, Missing.skip)
    assert not problem.fatal and problem.details == [str(tmp_path / "a.png")]
    assert [sample.name for sample in samples] == ["b.png"]


def test_leaving_out_every_image_is_an_error(tmp_path):
    picture(tmp_path / "a.png", caption=None)
    (problem,) = scan(data(tmp_path, missing_captions=Missing.skip))[1]
    assert problem.fatal
