import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from otl.config import Inpaint
from tests.datamodules.sources.conftest import contents, folder, memory, png

ROWS = [{"file_name": "photos/a.png", "text": "one"}, {"file_name": "photos/sub/c.png", "text": "two"}]


def written(path, rows=ROWS):
    """A manifest in the format of its suffix."""
    names = list(rows[0])
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(f"{json.dumps(row)}\n\n" for row in rows), encoding="utf-8-sig")
    else:
        separator = {".csv": ",", ".tsv": "\t"}[path.suffix]
        lines = [names, *([row[name] for name in names] for row in rows)]
        path.write_text("".join(f"{separator.join(line)}\r\n" for line in lines), encoding="utf-8-sig")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".tsv", ".parquet"])
def test_paths_are_relative_to_the_manifest(tmp_path, searched, suffix):
    photos = folder(tmp_path / "photos")
    samples, problems = searched(written(tmp_path / f"m{suffix}"))
    assert [(sample.path, sample.captions) for sample in samples] == [
        (photos / "a.png", ["one"]),
        (photos / "sub" / "c.png", ["two"]),
    ]
    assert problems == []


def test_a_manifest_may_list_urls_and_absolute_paths(tmp_path, searched):
    url, photos = memory("listed", contents()), folder(tmp_path / "photos")
    rows = [{"url": f"{url}/b.png", "caption": "far"}, {"url": str(photos / "a.png"), "caption": "near"}]
    samples, _ = searched(written(tmp_path / "m.csv", rows))
    assert [(str(sample.path), sample.captions) for sample in samples] == [
        (f"{url}/b.png", ["far"]),
        (str(photos / "a.png"), ["near"]),
    ]


def test_files_outside_of_the_folder_of_a_table_are_read_and_said(tmp_path, searched):
    """Also those of masks, and in a folder's metadata; what an absolute path names inside of it is nothing special."""
    photos, own = folder(tmp_path / "photos"), folder(tmp_path / "set")
    rows = [
        {"file_name": "../photos/a.png", "mask": ""},
        {"file_name": str(photos / "b.png"), "mask": ""},
        {"file_name": str(own / "a.png"), "mask": "../photos/b.png"},
    ]
    samples, problems = searched(written(own / "m.csv", rows), Inpaint())
    assert [sample.path.read_bytes() for sample in samples] == [png(0), png(1), png(0)]
    (said,) = [problem for problem in problems if "outside of its folder" in problem.message]
    assert not said.fatal and said.message.startswith(f"{own / 'm.csv'} names 3 files outside")
    assert said.details == [str(own / "../photos/a.png"), str(photos / "b.png"), str(own / "../photos/b.png")]
    written(own / "metadata.csv", [{"file_name": "a.png", "mask": "../photos/b.png"}])
    _, problems = searched(own, Inpaint())
    assert "metadata.csv names 1 file outside of its folder" in str(problems)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@pytest.mark.parametrize(
    "address", ["file:///etc/hostname", "reference:///x", "simplecache::file:///a.png", "ssh://me@host/a.png"]
)
def test_a_table_names_no_address_that_would_open_other_things(tmp_path, searched, suffix, address):
    """Neither as an image nor as a mask; fsspec would have gone where it leads, or ended in a traceback."""
    folder(tmp_path / "photos")
    rows = [{"file_name": address, "mask": "x"}, {"file_name": "photos/a.png", "mask": address}]
    samples, problems = searched(written(tmp_path / f"m{suffix}", rows), Inpaint())
    assert samples == []
    (broken,) = [problem for problem in problems if problem.key == "data.broken_images"]
    named = f"it names {address.replace('me@', '')}, and a list may name images by path"
    assert broken.fatal and [named in line for line in broken.details] == [True, True]


def test_a_manifest_elsewhere_lists_what_lies_beside_it(searched):
    lines = "".join(f"{json.dumps({'file_name': name, 'text': name})}\n" for name in ("a.png", "sub/c.png"))
    url = memory("beside", contents() | {"m.jsonl": lines.encode()})
    samples, problems = searched(f"{url}/m.jsonl")
    assert [sample.captions for sample in samples] == [["a.png"], ["sub/c.png"]] and problems == []


def test_one_image_may_have_several_rows(tmp_path, searched):
    folder(tmp_path / "photos")
    rows = [{"file_name": "photos/a.png", "text": text} for text in ("one", "two")]
    assert [sample.captions for sample in searched(written(tmp_path / "m.csv", rows))[0]] == [["one"], ["two"]]


def test_a_caption_may_be_a_list(tmp_path, searched):
    folder(tmp_path / "photos")
    path = written(tmp_path / "m.jsonl", [{"file_name": "photos/a.png", "text": ["one", "two"]}])
    assert searched(path)[0][0].captions == ["one", "two"]


def test_a_row_without_caption_takes_the_file_beside_the_image(tmp_path, searched):
    folder(tmp_path / "photos")
    rows = [{"file_name": "photos/a.png", "text": ""}, {"file_name": "photos/b.png", "text": "own"}]
    assert [sample.captions for sample in searched(written(tmp_path / "m.csv", rows))[0]] == [
        ["caption of a.png"],
        ["own"],
    ]


def test_rows_that_lead_nowhere_are_named(tmp_path, searched):
    photos = folder(tmp_path / "photos")
    rows = [*ROWS, {"file_name": "photos/gone.png", "text": "x"}, {"file_name": "", "text": "y"}]
    samples, problems = searched(written(tmp_path / "m.csv", rows))
    assert len(samples) == 2 and problems[0].key == "data.broken_images"
    assert problems[0].details == [
        f"{photos / 'gone.png'}: No such file or directory",
        f"{tmp_path / 'm.csv'}: row 3 has no file_name",
    ]


def test_masks_may_have_a_column(tmp_path, searched):
    photos = folder(tmp_path / "photos")
    rows = [{"image": "photos/a.png", "text": "x", "mask": "photos/b.png"}]
    assert searched(written(tmp_path / "m.csv", rows), Inpaint())[0][0].mask == photos / "b.png"
    rows[0]["other"] = "photos/a.png"
    path = written(tmp_path / "m.csv", rows)
    assert searched(path, Inpaint(), mask_column="other")[0][0].mask == photos / "a.png"


def test_masks_that_are_images_beside_paths_are_refused(tmp_path, searched):
    rows = [{"file_name": "photos/a.png", "text": "x", "mask": png(1)}]
    (problem,) = searched(written(tmp_path / "m.parquet", rows), Inpaint())[1]
    assert problem.fatal and "set data.concepts.c.mask_column to a column of paths" in problem.message


@pytest.mark.parametrize(
    ("line", "words"), [("{", "line 2: is not JSON"), ('["a.png"]', "line 2: is no object"), ("\xe4", "is not JSON")]
)
def test_a_line_that_is_no_row_is_named(tmp_path, searched, line, words):
    (tmp_path / "m.jsonl").write_text(f'{{"file_name": "a.png"}}\n{line}\n')
    (problem,) = searched(tmp_path / "m.jsonl")[1]
    assert problem.fatal and f"{tmp_path / 'm.jsonl'}" in problem.message and words in problem.message


def test_a_manifest_in_another_encoding_is_named(tmp_path, searched):
    (tmp_path / "m.csv").write_bytes("path,text\na.png,Kätzchen\n".encode("latin-1"))
    assert "write it as UTF-8" in searched(tmp_path / "m.csv")[1][0].message


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "metadata.parquet"])
def test_metadata_gives_captions_to_the_images_of_its_folder(tmp_path, searched, name):
    """The layout of Hugging Face's imagefolder; what it does not list keeps its own caption."""
    photos = folder(tmp_path / "photos")
    written(photos / "sub" / name, [{"file_name": "c.png", "text": "from the list"}])
    samples, problems = searched(photos)
    assert [sample.captions for sample in samples] == [["caption of a.png"], ["caption of b.png"], ["from the list"]]
    assert problems == []


def test_metadata_elsewhere_too(searched):
    listed = b'{"file_name": "sub/c.png", "text": "from the list"}'
    samples, problems = searched(memory("imagefolder", contents() | {"metadata.jsonl": listed}))
    assert samples[2].captions == ["from the list"] and problems == []


def test_metadata_that_names_what_is_not_there_is_an_error(tmp_path, searched):
    photos = folder(tmp_path / "photos")
    path = written(photos / "metadata.csv", [{"file_name": "gone.png", "text": "x"}])
    (problem,) = searched(photos)[1]
    assert problem.fatal and problem.details == [f"{path}: it names gone.png, which is not there"]


def test_metadata_of_several_splits_is_refused(tmp_path, searched):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.png").write_bytes(png(1))
        written(tmp_path / split / "metadata.csv", [{"file_name": "a.png", "text": split}])
    assert "several splits (test, train)" in searched(tmp_path)[1][0].message
    assert searched(tmp_path / "train")[0][0].captions == ["train"]
