import os

import pytest

from otl.config import Inpaint
from otl.datamodules import files, images
from otl.datamodules.files import Remote
from tests.datamodules.sources.conftest import NAMES, contents, folder, memory, png


def test_subfolders_are_searched_unless_told_otherwise(tmp_path, searched):
    path, url = folder(tmp_path / "photos"), memory("recursive", contents())
    for place in (path, url):
        assert [sample.path.name for sample in searched(place)[0]] == ["a.png", "b.png", "c.png"]
        assert [sample.path.name for sample in searched(place, recursive=False)[0]] == ["a.png", "b.png"]


def test_a_folder_elsewhere_is_as_one_on_a_disk(tmp_path, searched):
    here, there = searched(folder(tmp_path / "photos")), searched(memory("same", contents()))
    for samples, problems in (here, there):
        assert [sample.captions for sample in samples] == [[f"caption of {name}"] for name in NAMES]
        assert {sample.size for sample in samples} == {(48, 64)}
        assert problems == []
    for one, other in zip(here[0], there[0]):
        assert images.load(one.path, "white").tobytes() == images.load(other.path, "white").tobytes()


def test_the_second_start_reads_nothing_that_has_not_changed(searched, monkeypatch):
    url = memory("again", contents())
    first, _ = searched(url)
    asked = []
    fetched = files.fetched
    monkeypatch.setattr(files, "fetched", lambda url, *rest: asked.append(url) or fetched(url, *rest))
    assert searched(url)[0] == first and asked == []
    memory("again", {"b.png": png(99, h=80)})
    again, _ = searched(url)
    assert [sample.size for sample in again] == [(48, 64), (80, 64), (48, 64)]
    assert {Remote(each).name for each in asked} == {"b.png"}


def test_masks_elsewhere_lie_beside_their_images_too(searched, monkeypatch):
    url = memory("masks", contents() | {"sub/c-masklabel.png": png(255)})
    samples, problems = searched(url, Inpaint())
    assert [sample.mask and sample.mask.name for sample in samples] == [None, None, "c-masklabel.png"]
    assert problems == []
    monkeypatch.setattr(files, "fetched", lambda *asked: pytest.fail("read again"))
    assert searched(url, Inpaint())[0] == samples


def test_a_broken_file_elsewhere_is_named_and_looked_at_again(searched):
    url = memory("broken", contents() | {"b.png": png(1)[:50]})
    samples, problems = searched(url)
    assert len(samples) == 2 and "/broken/b.png: " in problems[0].details[0]
    memory("broken", {"b.png": png(1)})
    assert len(searched(url)[0]) == 3


def test_a_pattern_chooses_files(tmp_path, searched):
    path, url = folder(tmp_path / "photos"), memory("pattern", contents())
    for place in (f"{path}/[!a]*.png", f"{url}/b.p?g"):
        assert [sample.path.name for sample in searched(place)[0]] == ["b.png"]
    for place in (path, url):
        assert [sample.path.name for sample in searched(f"{place}/**/*.png")[0]] == ["a.png", "b.png", "c.png"]
        assert [sample.captions for sample in searched(f"{place}/s*/*")[0]] == [["caption of sub/c.png"]]


def test_a_pattern_that_fits_nothing_is_an_error(tmp_path, searched):
    for place in (tmp_path, "memory://pattern"):
        assert searched(f"{place}/*.tar")[1][0].fatal


def test_an_address_without_files_says_so(searched):
    (problem,) = searched("memory://nothing/here")[1]
    assert (
        problem.fatal
        and problem.key == "data.concepts.c.path"
        and "memory://nothing/here: there are no" in problem.message
    )


def test_hidden_files_elsewhere_are_no_images(searched):
    url = memory("hidden", contents() | {".cache/d.png": png(5), "sub/.e.png": png(6)})
    assert len(searched(url)[0]) == 3


def test_a_name_that_is_no_text_is_read_and_can_be_written(tmp_path, searched):
    name = os.fsdecode(b"caf\xe9.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / name).write_bytes(png(1))
    samples, _ = searched(tmp_path / "photos", prompt="x")
    assert samples[0].path.name == name


@pytest.mark.parametrize("path", ["lambdalabs/pokemon-blip-captions"])
def test_a_dataset_of_the_hub_that_is_no_folder_is_recognised(searched, path):
    (problem,) = searched(path)[1]
    assert f"give hf://datasets/{path}" in problem.message
