import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from otl.config import Broken, Data
from otl.datamodules import files
from otl.datamodules.scan import scan
from tests.datamodules.sources.conftest import NAMES, contents, folder, memory, tar
from tests.datamodules.sources.test_manifest import written
from tests.datamodules.sources.test_table import parquet


def test_what_lies_beside_images_is_left_out_and_named(tmp_path, searched):
    photos = folder(tmp_path / "photos")
    tar(photos / "old.tar")
    written(photos / "list.csv")
    samples, (problem,) = searched(photos)
    assert len(samples) == 3 and not problem.fatal
    assert problem.details == ["list.csv", "old.tar"] and "left out" in problem.message


def test_archives_and_tables_in_one_folder_are_not_chosen_between(tmp_path, searched):
    tar(tmp_path / "a.tar")
    parquet(tmp_path / "b.parquet")
    (problem,) = searched(tmp_path)[1]
    assert problem.fatal and "a.tar and b.parquet" in problem.message


def test_a_folder_with_a_manifest_alone_points_at_it(tmp_path, searched):
    (tmp_path / "lists").mkdir()
    written(tmp_path / "lists" / "m.csv")
    (problem,) = searched(tmp_path / "lists")[1]
    assert problem.fatal and "if m.csv lists them, give that file" in problem.message


@pytest.mark.parametrize("fields", [{"image_column": "x"}, {"caption_column": "x"}, {"mask_column": "x"}])
def test_columns_of_a_folder_of_images_are_refused(tmp_path, searched, fields):
    (problem,) = searched(folder(tmp_path / "photos"), **fields)[1]
    (name,) = fields
    assert problem.fatal and f"data.concepts.c.{name}=x: would have no effect" in problem.message


def test_a_file_has_no_subfolders_to_leave_out(tmp_path, searched):
    (problem,) = searched(tar(tmp_path / "a.tar"), recursive=False)[1]
    assert problem.fatal and "data.concepts.c.recursive=false would have no effect" in problem.message


def test_kinds_that_are_not_read_are_left_out_by_name(tmp_path, searched):
    photos = folder(tmp_path / "photos")
    (photos / "b.HEIC").write_bytes(b"x")
    (problem,) = searched(photos)[1]
    assert not problem.fatal and problem.left_out == [(str(photos / "b.HEIC"), "it is of a kind that is not read")]


def test_what_may_be_an_image_but_for_its_name_is_said(tmp_path, searched):
    photos = folder(tmp_path / "photos")
    for name in ("download", "b.jpg_large", "notes.md", "a.png.txt", "a-masklabel.webp"):
        (photos / name).write_bytes(b"x")
    samples, problems = searched(photos)
    (odd,) = [problem for problem in problems if "without the extension" in problem.message]
    assert len(samples) == 3 and not odd.fatal and odd.details == ["b.jpg_large", "download"]


def test_a_single_image_is_no_source(tmp_path, searched):
    (problem,) = searched(folder(tmp_path / "photos") / "a.png")[1]
    assert problem.fatal and "is a file; give the folder it is in" in problem.message


def test_a_concept_that_is_not_enabled_is_as_if_it_were_not_there(tmp_path, searched):
    assert searched(tmp_path / "nowhere", enabled=False)[0] == []
    assert len(searched(memory("enabled", contents()), enabled=True)[0]) == 3


def damaged() -> bytes:
    """Noise, whose header and end are whole."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(file, "PNG")
    content = file.getvalue()
    return content[:6000] + bytes(40) + content[6040:]


def everywhere(kind: str, path: Path) -> str:
    """The URL of three pictures, the second of which is damaged inside."""
    pictures = contents() | {"b.png": damaged()}
    if kind == "tar":
        return memory("decoded", {"a.tar": tar(path / "a.tar", pictures).read_bytes()}) + "/a.tar"
    if kind == "parquet":
        rows = [{"image": {"bytes": pictures[name], "path": name}, "text": name} for name in NAMES]
        return memory("decoded", {"t.parquet": parquet(path / "t.parquet", rows).read_bytes()}) + "/t.parquet"
    url = memory(f"decoded-{kind}", pictures)
    if kind == "folder":
        return url
    lines = "".join(json.dumps({"url": f"{url}/{name}", "text": name}) + "\n" for name in NAMES)
    return memory("decoded", {"m.jsonl": lines.encode()}) + "/m.jsonl"


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "list"])
def test_what_is_damaged_inside_is_left_out_wherever_it_lies_and_the_rest_is_fetched_once(kind, tmp_path, monkeypatch):
    path = everywhere(kind, tmp_path)
    options = Data(path=path, broken_images=Broken.skip, cache_dir=str(tmp_path / "cache"))
    samples, problems = scan(options)
    assert len(samples) == 2 and [problem.key for problem in problems] == ["data.broken_images"]
    assert "b.png" in problems[0].details[0] and not problems[0].fatal
    asked = []
    fetched = files.fetched
    monkeypatch.setattr(files, "fetched", lambda url, *rest: asked.append(url) or fetched(url, *rest))
    assert scan(options)[0] == samples
    assert {url.rpartition("/")[2] for url in asked} <= {"b.png", "m.jsonl", "t.parquet"}  # what was found broken
    assert len(scan(replace(options, broken_images=Broken.error))[0]) == 3  # by their headers
