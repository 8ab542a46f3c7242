"""A contact sheet shows every picture in its place."""

from __future__ import annotations

import pytest
from PIL import Image, ImageFont

from otl.callbacks.sheet import fitted, grid, sheet, wrapped


def test_every_picture_is_in_its_row_and_column() -> None:
    colours = [[(10, 0, 0), (20, 0, 0)], [(30, 0, 0), (40, 0, 0)], [(50, 0, 0), (60, 0, 0)]]
    rows = [("a caption", [Image.new("RGB", (200, 300), colour) for colour in row]) for row in colours]
    page = sheet(rows, ["seed 0", "seed 1"])
    found = {colour: count for count, colour in page.getcolors(1 << 20)}
    assert all(found[colour] == 200 * 300 for row in colours for colour in row)
    for k in range(2):
        middle = dict.fromkeys(page.getpixel((8 + 100 + k * 208, y)) for y in range(page.height))
        assert [colour for colour in middle if colour in found and found[colour] == 200 * 300] == [
            row[k] for row in colours
        ]


def test_pictures_of_any_shape_lie_in_equal_squares_of_a_grid() -> None:
    """A square is 256 pixels, 8 lie between two; a row is a square and what is under it high."""
    sizes = [(512, 512), (100, 50), (30, 300)]
    pictures = [Image.new("RGB", size, (10 * n + 10, 0, 0)) for n, size in enumerate(sizes)]
    page = grid([("a caption", picture) for picture in pictures], across=2)
    assert page.width == 8 + 2 * (256 + 8)
    found = {colour: count for count, colour in page.getcolors(1 << 20)}
    assert [found[10 * n + 10, 0, 0] for n in range(3)] == [256 * 256, 256 * 128, 26 * 256]
    row = (page.height - 8) // 2
    assert [page.getpixel(at)[0] for at in ((136, 136), (400, 136), (136, 136 + row))] == [10, 20, 30]


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (192, 192)), ((8, 16), (192, 384)), ((1024, 512), (512, 256)), ((256, 320), (256, 320))],
)
def test_tiles_can_be_looked_at(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert fitted(Image.new("RGB", size)).size == expected


def test_long_captions_are_wrapped_and_cut() -> None:
    font = ImageFont.load_default(12)
    lines = wrapped("a photo of a cat " * 20, font, 150)
    assert len(lines) == 3
    assert lines[-1].endswith("...")
    assert all(font.getlength(line) <= 150 for line in lines[:-1])
