"""Settings of the dataset that make no sense together are refused, with what to do."""

import pytest

from otl.check import check

OF_CAT = "data.concepts.cat"
CAT = f"{OF_CAT}.path=."
CLASS = ["type=regularisation", "prompt=a cat"]


def found(settings, *lines: str) -> dict[str, str]:
    """Key -> message of what is wrong with the dataset."""
    return {each.key: each.message for each in check(settings(*lines)) if each.key.startswith("data")}


@pytest.mark.parametrize(
    "lines",
    [
        ["data.path=."],
        [CAT, "data.concepts.cat.repeats=2.5", "data.concepts.cat.seed=3"],
        [CAT, "data.concepts.cat.samples=100"],
        [CAT, "data.path=.", "data.concepts.cat.type=validation"],
        ["data.path=.", CAT, f"{OF_CAT}.type=regularisation", f"{OF_CAT}.prompt=a cat", f"{OF_CAT}.generate=9"],
        ["data.path=.", CAT, f"{OF_CAT}.type=regularisation", f"{OF_CAT}.enabled=false"],
        ["data.path=.", "data.resolution=512"],
        ["data.path=.", "data.resolution=[512,768,1024]", "data.each_resolution=false"],
        [CAT, "data.resolution=512", "data.concepts.cat.resolution=[512,768]", "data.each_resolution=false"],
        ["data.path=.", "data.bucket_sizes=[768x1344,1024x1024]", "data.no_upscale=true"],
        ["data.path=.", "data.min_bucket_side=512", "data.max_bucket_side=512"],
        ["data.path=.", "data.buckets=false", "data.no_upscale=true", "data.min_side=64", "data.max_aspect=2.5"],
    ],
)
def test_what_makes_sense_is_accepted(settings, lines):
    assert found(settings, *lines) == {}


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        (["repeats=2", "samples=10"], "samples", "10 and data.concepts.cat.repeats=2.0: leave one of them out"),
        (["type=validation", "repeats=2"], "repeats", "2.0 would have no effect: data.concepts.cat.type=validation"),
        (["type=validation", "samples=9"], "samples", "9 would have no effect"),
        (["type=validation", "loss_weight=0.5"], "loss_weight", "0.5 would have no effect"),
        (["type=validation", "validation_share=0.5"], "validation_share", "0.5 would have no effect"),
        (["validation_share=1"], "validation_share", "below 1"),
        (["type=validation", "generate=3"], "generate", "3 images of the model's own say nothing about validation"),
        (["type=regularisation"], "prompt", "must be given: the class prompt"),
        (["type=regularisation", "prompt=' '"], "prompt", "must be given: the class prompt"),
        ([*CLASS, "validation_share=0.1"], "validation_share", "class images are never held out"),
        ([*CLASS, "captions.trigger=sks"], "captions.trigger", "sks would be taught with class images"),
        ([*CLASS, "captions.keep=1"], "captions.keep", "1 would have no effect"),
        ([*CLASS, "captions.sources=[file]"], "prompt", "it needs prompt among"),
        (
            ["path=s3://a/b", "generate=3"],
            "generate",
            "3 images cannot be drawn into s3://a/b: give a folder on a disk",
        ),
        (["repeats=0"], "repeats", "above 0"),
        (["repeats=-1.5"], "repeats", "above 0"),
        (["samples=0"], "samples", "at least 1"),
        (["seed=-1"], "seed", "at least 0"),
    ],
)
def test_a_concept_that_makes_no_sense_is_refused(settings, lines, key, message):
    problems = found(settings, "data.path=.", CAT, *(f"data.concepts.cat.{line}" for line in lines))
    assert list(problems) == [f"data.concepts.cat.{key}"]
    assert message in problems[f"data.concepts.cat.{key}"]


@pytest.mark.parametrize(
    ("lines", "key", "message"),
    [
        (["resolution=[512,500]"], "resolution[1]", "500 is not accepted: must be a whole number, at least 64"),
        (["resolution=many"], "resolution", "many is not a number"),
        (["resolution=[]"], "resolution", "the list is empty"),
        (["resolution=[512,512]"], "resolution", "512 is there more than once"),
        (["resolution=512", "each_resolution=false"], "each_resolution", "false would have no effect"),
        (["resolution=512", "bucket_sizes=[512x512]"], "resolution", "512 would have no effect: data.bucket_sizes"),
        (["bucket_sizes=[512]"], "bucket_sizes[0]", "512 is not accepted: give height x width"),
        (["bucket_sizes=[512x512,32x512]"], "bucket_sizes[1]", "32x512 is not accepted"),
        (["bucket_sizes=[512x512]", "buckets=false"], "buckets", "leave one of them out"),
        (["bucket_sizes=[512x512]", "max_bucket_side=512"], "max_bucket_side", "512 would have no effect"),
        (["cache=false", "encode_batch_size=8"], "encode_batch_size", "8 would have no effect: data.cache=false"),
        (["buckets=false", "min_bucket_side=512"], "min_bucket_side", "512 would have no effect: data.buckets=false"),
        (["min_bucket_side=768", "max_bucket_side=512"], "min_bucket_side", "768 is above data.max_bucket_side=512"),
        (["max_bucket_side=32"], "max_bucket_side", "at least 64"),
        (["min_side=0"], "min_side", "at least 1"),
        (["max_megapixels=0"], "max_megapixels", "above 0"),
        (["max_aspect=0.5"], "max_aspect", "at least 1"),
        (["warn_crop=15"], "warn_crop", "at most 1"),
        (["warn_upscale=0.5"], "warn_upscale", "at least 1"),
        (["warn_upscale=2", "no_upscale=true"], "warn_upscale", "2.0 would have no effect: data.no_upscale=true"),
    ],
)
def test_buckets_that_make_no_sense_are_refused(settings, lines, key, message):
    problems = found(settings, "data.path=.", *(f"data.{line}" for line in lines))
    assert list(problems) == [f"data.{key}"]
    assert message in problems[f"data.{key}"]


def test_a_concepts_resolution_is_refused_where_buckets_are_given(settings):
    lines = [CAT, "data.concepts.cat.resolution=512", "data.bucket_sizes=[512x512]"]
    assert list(found(settings, *lines)) == ["data.concepts.cat.resolution"]


def test_a_concept_is_not_named_as_the_images_of_the_path(settings):
    assert found(settings, "data.concepts.data.path=.") == {}
    assert list(found(settings, "data.concepts.data.path=.", "data.path=.")) == ["data.concepts.data"]


@pytest.mark.parametrize(
    "path", ["photos", "a.tar", "t.parquet", "m.jsonl", "*.zip", "s3://photos/x", "hf://datasets/a/b"]
)
def test_images_come_from_folders_files_and_urls(settings, tmp_path, path):
    (tmp_path / "photos").mkdir()
    for name in ("a.tar", "t.parquet", "m.jsonl"):
        (tmp_path / name).touch()
    assert found(settings, f"data.path={path if '://' in path else tmp_path / path}") == {}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a.png", "is a file: give the folder it is in, or a file of images: .tar"),
        ("user/name", "does not exist (looked for "),
        ("user/name", "give hf://datasets/user/name"),
        ("s33://a", "s33:// is no protocol that fsspec knows; did you mean s3?"),
        ("s3://", "it names nothing: give s3://BUCKET/FOLDER"),
        ("hf:///a", "it names nothing: give hf://datasets/OWNER/NAME"),
        ("gs://a", "gs:// needs gcsfs, which is not installed; pip install gcsfs"),
    ],
)
def test_what_cannot_be_a_source_is_refused(settings, tmp_path, monkeypatch, path, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").touch()
    assert message in found(settings, f"data.path={path}")["data.path"]


def test_a_concept_that_is_not_enabled_is_not_looked_for(settings):
    assert found(settings, "data.path=.", "data.concepts.cat.path=no/where", "data.concepts.cat.enabled=false") == {}
