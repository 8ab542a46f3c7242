"""The contact sheet of a plan: which images are on it, and what is drawn of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from otl.config import Data
from otl.tasks import contact
from otl.types import Sample, Size
from tests.commands import fork_otl


def row(name: str, size: tuple[int, int] | None, bucket: tuple[int, int] | None, **fate: Any) -> dict[str, Any]:
    """As a plan has it."""
    known = {"path": name, "size": size and list(size), "bucket": bucket and list(bucket), "scale": 1.0, "cropped": 0.0}
    return known | {"seen": 1, "dropped": bucket is None, "reason": None} | fate


def plan(rows: list[dict[str, Any]], held_out: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    sizes = sorted({tuple(each["bucket"]) for each in rows if each["bucket"]}, key=lambda size: size[0] / size[1])
    return {
        "images": rows,
        "validation": held_out or [],
        "buckets": [{"height": h, "width": w} for h, w in sizes],
    }


def names(tiles: list[contact.Tile]) -> list[str]:
    return [tile.row["path"] for tile in tiles]


def test_groups_go_from_what_is_left_out_over_wide_and_tall_to_what_is_held_out():
    rows = [
        row("square", (64, 64), (64, 64)),
        row("tall", (96, 64), (96, 64)),
        row("gone", (9, 9), None, reason="too small"),
        row("wide", (64, 96), (64, 96)),
    ]
    tiles = contact.tiles(plan(rows, [row("held", (64, 64), (64, 64))]), Data())
    assert names(tiles) == ["gone", "wide", "square", "tall", "held"]
    assert [tile.group for tile in tiles] == ["left out", "64 x 96", "64 x 64", "96 x 64", "held out"]


def test_the_worst_of_a_group_come_first_with_what_is_wrong():
    rows = [
        row("fine", (64, 64), (64, 64), cropped=0.1, scale=1.4),
        row("small", (16, 16), (64, 64), scale=4.0),
        row("cut", (64, 128), (64, 64), cropped=0.5),
        row("harder", (64, 256), (64, 64), cropped=0.75),
        row("never", (64, 64), (64, 64), dropped=True, reason="no batch"),
    ]
    tiles = contact.tiles(plan(rows), Data())
    assert names(tiles) == ["never", "harder", "cut", "small", "fine"]
    assert [tile.remarks for tile in tiles] == [
        ["no batch"], ["75% cut off"], ["50% cut off"], ["enlarged 4.00 times"], []]  # fmt: skip
    lenient = contact.tiles(plan(rows), Data(warn_crop=0.6, warn_upscale=5.0))
    assert [tile.row["path"] for tile in lenient if tile.remarks] == ["never", "harder"]


def test_of_more_than_there_is_room_for_the_worst_are_kept_and_others_evenly():
    tiles = [contact.Tile(row(str(n), (1, 1), (1, 1)), "a", gravity=n if n % 10 == 0 else 0) for n in range(100)]
    kept = [int(name) for name in names(contact.chosen(tiles, 9))]
    assert kept == sorted(kept) and len(kept) == 9
    assert {90, 80, 70, 60, 50, 40} < set(kept)  # two thirds
    assert {0, 99} < set(kept)  # from the first of the others to the last
    assert contact.chosen(tiles, 100) == tiles


def test_no_bucket_is_missing_where_there_is_not_room_for_all():
    groups = [*["a"] * 50, "b", "c", *["d"] * 50]
    tiles = [contact.Tile(row(str(n), (1, 1), (1, 1)), group, gravity=n) for n, group in enumerate(groups)]
    assert {tile.group for tile in contact.chosen(tiles, 6)} == {"a", "b", "c", "d"}
    assert len(contact.chosen(tiles, 6)) == 6


@pytest.mark.parametrize(
    ("size", "bucket", "box"),
    [
        (Size(300, 300), Size(512, 512), (0, 0, 150, 150)),
        (Size(100, 200), Size(512, 512), (38, 0, 112, 75)),  # the middle half
        (Size(400, 100), Size(128, 64), (0, 38, 38, 112)),  # half of the height
    ],
)
def test_the_box_is_what_the_bucket_shows(size, bucket, box):
    drawn = contact.crop_box(size, bucket, contact.thumbnail_size(size))
    assert all(abs(a - b) <= 1 for a, b in zip(drawn, box))


def test_a_picture_is_dark_where_it_is_cut_off_and_upright(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (150, 300), "white").save(tmp_path / "a.png", exif=turned)  # lies on its side
    tile = contact.Tile(row("a.png", (150, 300), (64, 64)), "64 x 64")
    drawn = contact.picture(tile, {"a.png": Sample(tmp_path / "a.png", Size(150, 300), [""])}, "white")
    assert drawn.size == (150, 75)
    assert [drawn.getpixel((x, 37)) == (255, 255, 255) for x in (5, 30, 45, 75, 105, 120, 145)] == [
        False, False, True, True, True, False, False]  # fmt: skip


def many(folder: Path, count: int) -> list[dict[str, Any]]:
    for number in range(count):
        Image.new("RGB", (16, 16), (number % 256, 0, 0)).save(folder / f"{number}.png")
    return [row(f"{number}.png", (16, 16), (64, 64)) for number in range(count)]


def test_pages_are_written_as_many_as_allowed_and_older_ones_go(tmp_path):
    rows = many(tmp_path, 250)
    files = {each["path"]: Sample(tmp_path / each["path"], Size(16, 16), [""]) for each in rows}
    for pages, expected in ((3, ["plan-2.png", "plan-3.png", "plan.png"]), (1, ["plan.png"])):
        written, broken = contact.write(plan(rows), files, tmp_path, Data(), pages=pages)
        assert sorted(path.name for path in tmp_path.glob("plan*.png")) == sorted(path.name for path in written)
        assert (sorted(path.name for path in written), broken) == (expected, [])


def test_a_picture_that_cannot_be_decoded_is_crossed_out_and_named(tmp_path):
    """A file that is gone is as good as any."""
    rows = [*many(tmp_path, 1), row("gone.png", (16, 16), (64, 64)), row("no.png", None, None, reason="no image")]
    files = {name: Sample(tmp_path / name, Size(16, 16), [""]) for name in ("0.png", "gone.png")}
    (path,), broken = contact.write(plan(rows), files, tmp_path, Data(), pages=1)
    assert broken == ["gone.png"]
    with Image.open(path) as page:
        assert (255, 0, 0) in {colour for _, colour in page.getcolors(2**24)}


def test_a_plan_draws_as_many_pages_as_its_setting_says_and_says_what_it_leaves_out(tmp_path, sd15_folder):
    """130 images fill more than one page of 120."""
    folder = tmp_path / "photos"
    folder.mkdir()
    many(folder, 130)
    line = [f"model.checkpoint={sd15_folder}", f"data.path={folder}", "data.prompt=x", "data.resolution=64"]
    done = fork_otl("task=plan", *line, "task.sheet_pages=1", f"hydra.run.dir={tmp_path / 'run'}", cwd=tmp_path)
    assert done.code == 0, done.err
    assert [path.name for path in (tmp_path / "run").glob("*.png")] == ["plan.png"]
    assert "the contact sheet leaves out 10 of 130 pictures" in done.out and "task.sheet_pages=2 draws all" in done.out
    said = json.loads((tmp_path / "run" / "plan.json").read_text())["contact_sheet"]
    assert said == {"pictures": 120, "of": 130, "pages_of_all": 2}
