"""What a dataset's source does not have, and captions that cannot be written."""

import pytest

from otl.check import check


def told(settings, *lines):
    return {problem.key: problem.message for problem in check(settings(*lines))}


@pytest.mark.parametrize("role", ["image", "caption", "mask"])
def test_columns_are_of_tables(settings, tmp_path, role):
    line = [f"data.concepts.cat.path={tmp_path}", f"data.concepts.cat.{role}_column=x"]
    (tmp_path / "cat.png").write_bytes(b"")
    key = f"data.concepts.cat.{role}_column"
    assert f"x: would have no effect: {tmp_path} has no table" in told(settings, *line)[key]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "metadata.CSV").write_text("")
    assert told(settings, *line) == {}


@pytest.mark.parametrize(("name", "known"), [("cats.zip", {"data.concepts.cat.caption_column"}), ("cats.tsv", set())])
def test_a_table_is_a_file_too_and_an_archive_is_none(settings, tmp_path, name, known):
    (tmp_path / name).write_bytes(b"")
    line = [f"data.concepts.cat.path={tmp_path / name}", "data.concepts.cat.caption_column=x"]
    assert set(told(settings, *line)) == known


CAPTION = ["task=caption", "captioner=wd", "data.path=."]


@pytest.mark.parametrize(
    ("line", "key", "message"),
    [
        ("data.captions.suffix=''", "data.captions.suffix", "give at least one"),
        ("data.captions.suffix=.PNG", "data.captions.suffix", ".PNG: give that of a text file"),
        ("data.captions.suffix=txt", "data.captions.suffix", "such as .txt"),
        ("data.captions.sources=[json,prompt]", "data.captions.sources", "file is not one of them"),
        (
            "data.concepts.a.path=. data.concepts.a.captions.suffix=txt",
            "data.concepts.a.captions.suffix",
            "such as .txt",
        ),
        ("data.concepts.a.path=. data.captions.suffix=txt", "data.captions.suffix", "such as .txt"),
    ],
)
def test_captions_are_written_where_training_reads_them(settings, line, key, message):
    found = told(settings, *CAPTION, *line.split())
    assert list(found) == [key] and message in found[key]


@pytest.mark.parametrize("line", ["data.captions.suffix=.caption", "data.captions.sources=[json,file]"])
def test_other_text_files_are_accepted(settings, line):
    assert told(settings, *CAPTION, line) == {}
