"""The contact sheet of a plan: every image small, with what its bucket shows of it; of a large dataset the worst."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from otl.callbacks.progress import track
from otl.config import Data, SettingsError
from otl.datamodules import buckets, images
from otl.datamodules.views import View
from otl.formats.files import whole
from otl.types import Crop, Sample, Size

Row = dict[str, Any]
"""One image as plan.json has it."""

TILES, COLUMNS = 120, 8  # of a page
THREADS = 16  # for images elsewhere, which wait for the network
SIDE, GAP = 150, 12  # pixels: longest side of a picture, and what is between two
LINES = 4  # of text under a picture
FONT, HEADING = ImageFont.load_default(12), ImageFont.load_default(18)
LINE, HEADING_LINE = 15, 34  # pixels
DIM = 0.35  # brightness of what is cut off
LEFT_OUT, HELD_OUT = "left out", "held out"  # groups beside the buckets


@dataclass
class Tile:
    """One picture on the sheet."""

    row: Row
    group: str
    remarks: list[str] = field(default_factory=list)  # what is wrong with it, the gravest first
    gravity: float = 0.0  # above 0 something is wrong


def write(
    plan: dict[str, Any], samples: Mapping[str, Sample], folder: Path, data: Data, *, pages: int
) -> tuple[list[Path], list[str]]:
    """plan.png, plan-2.png and so on.

    Args:
        plan: as plan.json has it.
        samples: by path, all that can be read.
        folder: of the run; pages of an earlier plan there are replaced.
        data: the settings.
        pages: at most.

    Returns:
        The pages, and the paths of images that cannot be decoded.
    """
    everything = tiles(plan, data)
    shown = chosen(everything, pages * TILES)
    elsewhere = any(not isinstance(sample.path, Path) for sample in samples.values())
    counts = {group: sum(tile.group == group for tile in everything) for group in {tile.group for tile in shown}}
    of_all = "" if len(shown) == len(everything) else f"{len(shown)} of {len(everything)}: the worst, others evenly"
    broken: list[str] = []
    written = []
    starts = range(0, len(shown), TILES)
    for number, start in enumerate(track(starts, "pages of the contact sheet", len(starts))):
        here = shown[start : start + TILES]
        with ThreadPoolExecutor(THREADS if elsewhere else os.cpu_count()) as pool:
            pictures = list(pool.map(lambda tile: picture(tile, samples, data.background), here))
        broken += [tile.row["path"] for tile, drawn in zip(here, pictures) if drawn is None and tile.row["size"]]
        path = folder / ("plan.png" if number == 0 else f"plan-{number + 1}.png")
        with whole(path) as aside:
            page(list(zip(here, pictures)), counts, of_all).save(aside, "PNG")
        written.append(path)
    for old in set(folder.glob("plan-*.png")) - set(written):
        old.unlink()
    return written, broken


def coverage(plan: dict[str, Any], pages: int) -> Row:
    """How many pictures the sheet has, of how many, and the pages that would show all."""
    total = len(plan["images"]) + len(plan["validation"])
    return {"pictures": min(total, pages * TILES), "of": total, "pages_of_all": math.ceil(total / TILES)}


def tiles(plan: dict[str, Any], data: Data) -> list[Tile]:
    """Every image of the plan: those left out, then bucket by bucket from wide to tall, then those held out."""
    left_out = [remarked(row, LEFT_OUT, data) for row in plan["images"] if row["bucket"] is None]
    held_out = [remarked(row, HELD_OUT, data) for row in plan["validation"]]
    by_bucket: dict[str, list[Tile]] = {f"{each['height']} x {each['width']}": [] for each in plan["buckets"]}
    for row in plan["images"]:
        if row["bucket"] is not None:
            group = "{} x {}".format(*row["bucket"])
            by_bucket[group].append(remarked(row, group, data))
    groups = [left_out, *by_bucket.values(), held_out]
    return [tile for group in groups for tile in sorted(group, key=lambda tile: -tile.gravity)]


def remarked(row: Row, group: str, data: Data) -> Tile:
    """An image with what is wrong with it."""
    tile = Tile(row, group)
    if row.get("dropped"):
        tile.remarks.append(row["reason"])
        tile.gravity += 1e6
    if row["bucket"] and row["cropped"] > data.warn_crop:
        tile.remarks.append(f"{row['cropped']:.0%} cut off")
        tile.gravity += 1e3 * row["cropped"]
    if row["bucket"] and row["scale"] > data.warn_upscale:
        tile.remarks.append(f"enlarged {row['scale']:.2f} times")
        tile.gravity += row["scale"]
    return tile


def chosen(everything: list[Tile], room: int) -> list[Tile]:
    """As many as there is room for, in their order: the worst of each group, and two thirds for the worst of all.

    The rest is taken evenly from all others.
    """
    if len(everything) <= room:
        return everything
    grave = sorted((n for n, tile in enumerate(everything) if tile.gravity), key=lambda n: -everything[n].gravity)
    groups = [tile.group for tile in everything]
    firsts = [groups.index(group) for group in dict.fromkeys(groups)]
    worst = set([*firsts, *grave[: room * 2 // 3]][:room])
    others = [n for n in range(len(everything)) if n not in worst]
    evenly = {others[k] for k in np.linspace(0, len(others) - 1, room - len(worst)).round().astype(int).tolist()}
    return [everything[n] for n in sorted(worst | evenly)]


def picture(tile: Tile, samples: Mapping[str, Sample], background: str) -> Image.Image | None:
    """The whole image, small, what is cut off darkened; None where it cannot be decoded."""
    sample = samples.get(tile.row["path"])
    if sample is None:
        return None
    small = thumbnail_size(sample.size)
    try:
        pixels = images.pixels(sample.path, View(small, small, Crop(0, 0)), background)
    except SettingsError:
        return None
    whole_image = Image.fromarray(pixels.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy())
    if tile.row["bucket"] is None:
        return whole_image
    box = crop_box(sample.size, Size(*tile.row["bucket"]), small)
    drawn = Image.eval(whole_image, lambda level: int(level * DIM))
    drawn.paste(whole_image.crop(box), box[:2])
    ImageDraw.Draw(drawn).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline="red" if tile.gravity else "lime")
    return drawn


def thumbnail_size(size: Size) -> Size:
    """The size at which an image just fits into a square of SIDE."""
    return Size(*(max(1, round(each * SIDE / max(size))) for each in size))


def crop_box(size: Size, bucket: Size, small: Size) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of what the bucket shows, in the small picture."""
    scaled, crop = buckets.fit(size, bucket)
    across, down = small.w / scaled.w, small.h / scaled.h
    left, top = round(crop.left * across), round(crop.top * down)
    right, bottom = round((crop.left + bucket.w) * across), round((crop.top + bucket.h) * down)
    return left, top, max(left + 1, right), max(top + 1, bottom)


def page(drawn: list[tuple[Tile, Image.Image | None]], counts: Mapping[str, int], of_all: str) -> Image.Image:
    """One page.

    Args:
        drawn: tiles with their pictures, those of a group beside each other.
        counts: images of each group, shown or not.
        of_all: said above the first group; empty: nothing.
    """
    bands = list(_bands(drawn, counts))
    width = GAP + COLUMNS * (SIDE + GAP)
    top = HEADING_LINE * bool(of_all)
    canvas = Image.new("RGB", (width, top + sum(band.height for band in bands) + GAP), "white")
    ImageDraw.Draw(canvas).text((GAP, GAP), of_all, "dimgray", HEADING)
    for band in bands:
        canvas.paste(band, (0, top))
        top += band.height
    return canvas


def _bands(drawn: list[tuple[Tile, Image.Image | None]], counts: Mapping[str, int]) -> Iterator[Image.Image]:
    """The headings and rows of a page, from top to bottom."""
    for group in dict.fromkeys(tile.group for tile, _ in drawn):
        yield _heading(group, counts[group])
        members = [pair for pair in drawn if pair[0].group == group]
        yield from (_row(members[start : start + COLUMNS]) for start in range(0, len(members), COLUMNS))


def _heading(group: str, count: int) -> Image.Image:
    band = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), HEADING_LINE), "gainsboro")
    what = group if group in (LEFT_OUT, HELD_OUT) else f"bucket {group} (height x width)"
    ImageDraw.Draw(band).text((GAP, 6), f"{what}: {count} image{'s' if count != 1 else ''}", "black", HEADING)
    return band


def _row(members: Iterable[tuple[Tile, Image.Image | None]]) -> Image.Image:
    """Up to COLUMNS pictures with their texts."""
    cells = [(image, list(_lines(tile, image))) for tile, image in members]
    tallest = max((image.height if image else SIDE // 3) for image, _ in cells)
    most = max(len(lines) for _, lines in cells)
    band = Image.new("RGB", (GAP + COLUMNS * (SIDE + GAP), GAP + tallest + most * LINE + GAP), "white")
    draw = ImageDraw.Draw(band)
    for column, (image, lines) in enumerate(cells):
        left = GAP + column * (SIDE + GAP)
        if image is not None:
            band.paste(image, (left + (SIDE - image.width) // 2, GAP + tallest - image.height))
        else:
            draw.line((left, GAP, left + SIDE, GAP + tallest), "red")
            draw.line((left, GAP + tallest, left + SIDE, GAP), "red")
        for number, (text, colour) in enumerate(lines):
            draw.text((left, GAP + tallest + 3 + number * LINE), text, colour, FONT)
    return band


def _lines(tile: Tile, image: Image.Image | None) -> Iterator[tuple[str, str]]:
    """What is written under a picture: name, size and scale, and in red what is wrong."""
    row = tile.row
    yield _shortened(Path(row["path"]).name), "black"
    if row["bucket"]:
        times = f"  {row['seen']} times" if row.get("seen", 1) > 1 else ""
        yield f"{row['size'][0]}x{row['size'][1]}  x{row['scale']:.2f}  -{row['cropped']:.0%}{times}", "dimgray"
    remarks = tile.remarks if image is not None or not row["size"] else [*tile.remarks, "cannot be decoded"]
    for line in _wrapped("; ".join(remarks)):
        yield line, "red"


def _shortened(name: str) -> str:
    """A name that fits under a picture, its middle left out."""
    keep = len(name)
    shorter = name
    while FONT.getlength(shorter) > SIDE:
        keep -= 2
        shorter = f"{name[: keep // 2]}…{name[len(name) - keep // 2 :]}"
    return shorter


def _wrapped(text: str) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and FONT.getlength(longer) > SIDE:
            lines.append(word)
        else:
            lines[-1] = longer
    return [*lines[: LINES - 1], f"{lines[LINES - 1]} …"] if len(lines) > LINES else lines if text else []
