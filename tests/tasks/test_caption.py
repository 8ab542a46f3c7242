"""`task=caption`: which files are written, with what, and which are left alone."""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig
from PIL import Image

from otl.check import require
from otl.cli import options
from otl.config import RunEnded, SettingsError
from otl.datamodules.captions import lines
from otl.tasks.caption import caption
from otl.tools.taggers import Tagger
from tests.commands import run_otl
from tests.tools import tiny

RED, BLUE = (255, 0, 0), (0, 0, 255)
Run = Callable[..., list[dict[str, str]]]


def read_captions(file: Path) -> list[str]:
    return lines(file.read_text(encoding="utf-8"))


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A red picture without a caption, and below, a blue one with two."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    Image.new("RGB", (20, 20), RED).save(folder / "red.png")
    Image.new("RGB", (20, 20), BLUE).save(folder / "more" / "sky.v2.jpg", quality=100)
    (folder / "more" / "sky.v2.txt").write_bytes("\ufeffa sky\r\n\r\nthe sky\r\n".encode())
    return folder


@pytest.fixture
def run(settings: Callable[..., DictConfig], photos: Path, tmp_path: Path) -> Run:
    """Caption with the tiny tagger, whose tags are red and blue sky; returns the rows of caption.csv."""
    folder = tiny.tagger(tmp_path / "tagger")

    def run(*overrides: str) -> list[dict[str, str]]:
        line = ["task=caption", "captioner=wd", f"captioner.checkpoint={folder}", f"data.path={photos}"]
        composed = settings(*line, "captioner.character_threshold=1", *overrides)
        require(composed)
        caption(composed, **options(composed.task), folder=tmp_path)
        return list(csv.DictReader((tmp_path / "caption.csv").open(encoding="utf-8", newline="")))

    return run


def test_filling_writes_what_is_missing_and_leaves_what_is_there_bit_for_bit(run: Run, photos: Path) -> None:
    there = (photos / "more" / "sky.v2.txt").read_bytes()
    rows = run()
    assert (photos / "red.txt").read_bytes() == b"red\n"
    assert (photos / "more" / "sky.v2.txt").read_bytes() == there
    assert [(row["outcome"], row["reason"], row["caption"]) for row in rows] == [
        ("left", "captioned already", ""),
        ("written", "", "red"),
    ]


def test_an_empty_file_is_no_caption(run: Run, photos: Path) -> None:
    (photos / "red.txt").write_text(" \n\n")
    run()
    assert read_captions(photos / "red.txt") == ["red"]


def test_replacing_keeps_the_old_captions_in_the_table(run: Run, photos: Path) -> None:
    rows = run("task.mode=replace")
    assert read_captions(photos / "more" / "sky.v2.txt") == ["blue sky"]
    assert {Path(row["image"]).name: row["before"] for row in rows} == {"red.png": "", "sky.v2.jpg": "a sky\nthe sky"}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task.mode=append"], ["a sky, blue sky", "the sky, blue sky"]),
        (["task.mode=prepend"], ["blue sky, a sky", "blue sky, the sky"]),
        (["task.mode=append", "task.separator='. '"], ["a sky. blue sky", "the sky. blue sky"]),
        (["task.mode=append", "task.separator=''"], ["a skyblue sky", "the skyblue sky"]),
    ],
)
def test_adding_goes_to_every_caption(run: Run, photos: Path, overrides: list[str], expected: list[str]) -> None:
    run(*overrides)
    assert read_captions(photos / "more" / "sky.v2.txt") == expected
    assert read_captions(photos / "red.txt") == ["red"]


def test_prefix_and_suffix_are_put_around_as_they_are(run: Run, photos: Path) -> None:
    run("task.prefix='gle, '", "task.suffix=' here'")
    assert (photos / "red.txt").read_text() == "gle, red here\n"


def test_captions_go_where_training_reads_them(run: Run, photos: Path) -> None:
    (photos / "more" / "sky.v2.txt").rename(photos / "more" / "sky.v2.jpg.txt")
    run("task.mode=append")
    assert sorted(path.name for path in photos.rglob("*.txt")) == ["red.txt", "sky.v2.jpg.txt"]
    assert read_captions(photos / "more" / "sky.v2.jpg.txt") == ["a sky, blue sky", "the sky, blue sky"]


def test_their_suffix_is_that_of_the_data(run: Run, photos: Path) -> None:
    run("data.captions.suffix=.caption")
    assert sorted(path.name for path in photos.rglob("*.caption")) == ["red.caption", "sky.v2.caption"]
    assert not (photos / "red.txt").exists()


def test_a_caption_in_json_is_one_too_and_is_added_to(run: Run, photos: Path) -> None:
    (photos / "red.json").write_text('{"caption": "a wall"}')
    sources = "data.captions.sources=[file,json,name]"
    assert [row["reason"] for row in run(sources)] == ["captioned already"] * 2
    run(sources, "task.mode=append", "output.overwrite=true")
    assert read_captions(photos / "red.txt") == ["a wall, red"]


def test_a_caption_that_training_would_read_first_is_left_alone(run: Run, photos: Path) -> None:
    (photos / "red.json").write_text('{"caption": "a wall"}')
    rows = run("data.captions.sources=[json,file]", "task.mode=replace")
    assert [row["outcome"] for row in rows] == ["left", "written"]
    assert not (photos / "red.txt").exists()


def test_a_separator_that_nothing_uses_is_refused(run: Run) -> None:
    with pytest.raises(SettingsError, match=r"task\.separator: .*needs task\.mode=append or prepend"):
        run("task.separator=x")


def test_what_fails_is_named_and_the_others_are_written(run: Run, photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"no picture")
    (photos / "latin.png").write_bytes((photos / "red.png").read_bytes())
    (photos / "latin.txt").write_bytes("größer".encode("latin-1"))
    Image.new("RGB", (9, 9), (20, 20, 20)).save(photos / "dark.png")
    with pytest.raises(RunEnded) as ended:
        run("task.mode=replace", "task.batch_size=2")
    failed = [line.strip().partition(": ")[0] for line in str(ended.value).splitlines()[1:]]
    assert failed == [str(photos / name) for name in ("latin.png", "broken.png", "dark.png")]
    assert "nothing to say" in str(ended.value)
    assert read_captions(photos / "red.txt") == ["red"]
    assert not (photos / "dark.txt").exists()
    assert (photos / "latin.txt").read_bytes() == "größer".encode("latin-1")


def test_so_many_images_are_captioned_at_once(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (20, 20), BLUE).save(photos / "another.png")
    sizes, captions = [], Tagger.captions
    monkeypatch.setattr(Tagger, "captions", lambda tagger, some: sizes.append(len(some)) or captions(tagger, some))
    run("task.mode=replace", "task.batch_size=2")
    assert sizes == [2, 1]


def test_the_summary_counts_written_and_left(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        run()
    lines = [record.getMessage() for record in caplog.records]
    assert "1 left: captioned already" in lines
    assert "1 written" in lines


def test_two_images_of_one_name_do_not_write_over_each_other(run: Run, photos: Path) -> None:
    Image.new("RGB", (9, 9), BLUE).save(photos / "red.webp")
    rows = run("task.mode=append")
    assert read_captions(photos / "red.txt") == ["red"]
    assert [row["reason"] for row in rows if row["image"].endswith(".webp")] == [
        "another image of that name has the file"
    ]


def test_a_folder_that_is_in_the_dataset_twice_is_captioned_once(run: Run, photos: Path) -> None:
    rows = run("task.mode=append", f"data.concepts.more.path={photos / 'more'}")
    assert len(rows) == 2
    assert read_captions(photos / "more" / "sky.v2.txt") == ["a sky, blue sky", "the sky, blue sky"]


def test_an_earlier_table_is_not_written_over_unasked(run: Run, photos: Path) -> None:
    run()
    with pytest.raises(SettingsError, match=r"caption\.csv is of an earlier run"):
        run("task.mode=replace")
    assert read_captions(photos / "red.txt") == ["red"]


def test_where_all_are_captioned_nothing_is_loaded(run: Run, photos: Path) -> None:
    (photos / "red.txt").write_text("red")
    assert [row["outcome"] for row in run("captioner.checkpoint=no/such/folder")] == ["left", "left"]


def test_a_caption_in_a_manifest_is_one_too(run: Run, photos: Path) -> None:
    (photos / "metadata.csv").write_text("file_name,text\nred.png,a wall\n")
    assert [row["reason"] for row in run()] == ["captioned already"] * 2


def test_a_table_writes_nothing_outside_of_its_folder(run: Run, photos: Path, tmp_path: Path) -> None:
    Image.new("RGB", (20, 20), RED).save(tmp_path / "mine.png")
    (photos / "metadata.csv").write_text("file_name,text\nred.png,a wall\n../mine.png,\n")
    assert sorted(Path(row["image"]).name for row in run()) == ["red.png", "sky.v2.jpg"]
    assert not (tmp_path / "mine.txt").exists()


def test_images_that_lie_in_no_folder_are_refused(run: Run, photos: Path) -> None:
    (photos / "list.csv").write_text("file_name,text\nred.png,a wall\n")
    with pytest.raises(SettingsError, match=r"data\.path: .*list\.csv is no folder on a disk"):
        run(f"data.path={photos / 'list.csv'}")


def test_what_training_takes_for_broken_fails_here_too(run: Run, photos: Path) -> None:
    with pytest.raises(RunEnded, match=r"red\.png: 20x20 .* more than data\.max_megapixels=0\.0002"):
        run("data.max_megapixels=0.0002")


def test_an_empty_folder_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(SettingsError, match=r"data\.path: .*holds no images"):
        run(f"data.path={tmp_path / 'empty'}")


def test_from_the_command_line(photos: Path, tmp_path: Path) -> None:
    folder = tiny.tagger(tmp_path / "tagger")
    (photos / "broken.png").write_bytes(b"no picture")
    line = ["task=caption", "captioner=wd", f"captioner.checkpoint={folder}", "data.path=photos", "hydra.run.dir=out"]
    done = run_otl(*line, cwd=tmp_path)
    assert done.code == 1
    assert (tmp_path / "photos" / "red.txt").read_text() == "red\n"
    assert done.err.startswith("1 image failed:\n  photos/broken.png: no image of a kind that is read")
    assert "images 2/2" in done.out
    assert "each in " in done.out
