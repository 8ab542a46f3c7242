"""Pictures side by side with what they show written under them."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont, ImageOps

SMALLEST, LARGEST = 192, 512  # pixels: sides of a picture on a sheet; small ones are enlarged by whole factors
GAP = 8  # pixels
TILE = 256  # pixels: sides of the square that a picture of a grid lies in
LINES = 3  # of a caption; the rest is cut


def sheet(rows: list[tuple[str, list[Image.Image]]], columns: list[str]) -> Image.Image:
    """A grid.

    Args:
        rows: the caption under each row, and its pictures, all of one size.
        columns: what is written above each column.
    """
    tiles = [[fitted(picture) for picture in pictures] for _, pictures in rows]
    w, h = tiles[0][0].size
    font = ImageFont.load_default(max(12, h // 20))
    line = sum(font.getmetrics()) + 2
    width = GAP + len(columns) * (w + GAP)
    captions = [wrapped(caption, font, width - 2 * GAP) for caption, _ in rows]
    height = GAP + line + sum(h + GAP + line * len(lines) + GAP for lines in captions)

    page = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(page)
    for k, title in enumerate(columns):
        draw.text((GAP + k * (w + GAP), GAP // 2), title, "dimgray", font)
    top = GAP + line
    for pictures, lines in zip(tiles, captions):
        for k, picture in enumerate(pictures):
            page.paste(picture, (GAP + k * (w + GAP), top))
        top += h + GAP
        for text in lines:
            draw.text((GAP, top - GAP // 2), text, "black", font)
            top += line
        top += GAP
    return page


def grid(tiles: list[tuple[str, Image.Image]], across: int = 5) -> Image.Image:
    """Pictures of any shape, each with a caption under it."""
    font = ImageFont.load_default(13)
    line = sum(font.getmetrics()) + 2
    across = min(across, len(tiles))
    w, h = TILE + GAP, TILE + GAP + LINES * line + GAP
    page = Image.new("RGB", (GAP + across * w, GAP + -(-len(tiles) // across) * h), "white")
    draw = ImageDraw.Draw(page)
    for number, (caption, picture) in enumerate(tiles):
        left, top = GAP + number % across * w, GAP + number // across * h
        inside = ImageOps.contain(picture.convert("RGB"), (TILE, TILE))
        page.paste(inside, (left + (TILE - inside.width) // 2, top + (TILE - inside.height) // 2))
        for row, text in enumerate(wrapped(caption, font, TILE)):
            draw.text((left, top + TILE + GAP // 2 + row * line), text, "black", font)
    return page


def fitted(picture: Image.Image) -> Image.Image:
    """The picture at a size that can be looked at beside others."""
    picture = picture.convert("RGB")
    short, long = min(picture.size), max(picture.size)
    if short < SMALLEST:
        factor = min(-(-SMALLEST // short), max(1, LARGEST // long))
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if long <= LARGEST:
        return picture
    sides = (round(picture.width * LARGEST / long), round(picture.height * LARGEST / long))
    return picture.resize(sides, Image.Resampling.LANCZOS)


def wrapped(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """The lines of `text` that fit into `width` pixels; at most LINES, the last one cut short with an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], lines[LINES - 1] + " ..."]
    return lines
