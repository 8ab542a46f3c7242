"""Captioned pictures of coloured shapes: "a small red circle on a blue background"."""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw

SIDE = 64  # pixels
FINER = 8  # drawn so many times larger, then reduced: smooth edges
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 50),
    "purple": (140, 50, 170),
    "orange": (245, 140, 30),
    "white": (245, 245, 245),
    "black": (20, 20, 20),
}
SHAPES = ("circle", "square", "triangle", "cross")
NEW_SHAPE = "star"  # drawn for the quickstart only
NEW_WORD = "gle"  # what the quickstart calls it: no caption of the base model has it, and it is one token
RADII = {"small": (12.5, 15.0), "large": (19.0, 23.0)}  # pixels
POSITIONS = {
    "": None,
    "on the left": (-1, 0),
    "on the right": (1, 0),
    "at the top": (0, -1),
    "at the bottom": (0, 1),
    "in the center": (0, 0),
}
HELD_OUT = 100  # combinations that no training picture has


class Scene(NamedTuple):
    """What a caption says."""

    size: str
    colour: str
    shape: str
    background: str
    position: str = ""

    def caption(self, word: str | None = None) -> str:
        """In words; `word` stands for the shape's own."""
        article = "an" if not self.size and self.colour == "orange" else "a"
        words = [article, self.size, self.colour, word or self.shape, "on a", self.background, "background"]
        return " ".join([word for word in [*words, self.position] if word]).replace("on a orange", "on an orange")


THING = Scene("large", "purple", "cross", "yellow")  # what quickstart_embedding finds a word for; it is held out


def combinations() -> list[Scene]:
    """Every size, colour, shape and background, in a fixed order; a shape never has its background's colour."""
    every = itertools.product(RADII, COLOURS, SHAPES, COLOURS)
    return [Scene(*parts) for parts in every if parts[1] != parts[3]]


def held_out() -> list[Scene]:
    """The combinations kept for the test, always the same."""
    return Random(0).sample(combinations(), HELD_OUT)


def corners(shape: str, radius: float) -> list[tuple[float, float]]:
    """The outline of a shape around 0, 0, as x, y."""
    if shape == "circle":
        return [on_circle(radius, 2 * math.pi * step / 90) for step in range(90)]
    if shape == "square":
        half = radius * 0.88
        return [(-half, -half), (half, -half), (half, half), (-half, half)]
    if shape == "triangle":
        return [(0, -radius), (radius, radius * 0.8), (-radius, radius * 0.8)]
    if shape == "cross":
        wide, narrow = radius, radius * 0.34
        quarter = [(-narrow, -wide), (narrow, -wide), (narrow, -narrow)]
        turned = [[(x, y), (-y, x), (-x, -y), (y, -x)] for x, y in quarter]
        return [turned[corner][turn] for turn in range(4) for corner in range(3)]
    if shape == "star":
        return [on_circle(radius * (1.1 if tip % 2 == 0 else 0.45), math.pi * (tip / 5 - 0.5)) for tip in range(10)]
    raise ValueError(f"no shape {shape!r}")


def on_circle(radius: float, angle: float) -> tuple[float, float]:
    return radius * math.cos(angle), radius * math.sin(angle)


def draw(scene: Scene, random: Random) -> Image.Image:
    """A picture of the scene; `random` chooses what the caption leaves open."""
    radius = random.uniform(*RADII[scene.size])
    room = SIDE / 2 - radius - 3
    toward = POSITIONS[scene.position]
    if toward is None:
        x, y = random.uniform(-room, room), random.uniform(-room, room)
    else:
        x, y = (side * room * 0.85 + random.uniform(-0.12, 0.12) * room for side in toward)
    picture = Image.new("RGB", (SIDE * FINER, SIDE * FINER), shade(scene.background, random))
    points = [((SIDE / 2 + x + px) * FINER, (SIDE / 2 + y + py) * FINER) for px, py in corners(scene.shape, radius)]
    ImageDraw.Draw(picture).polygon(points, fill=shade(scene.colour, random))
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX)


def shade(colour: str, random: Random) -> tuple[int, int, int]:
    """A colour, a little lighter or darker each time."""
    red, green, blue = (min(255, max(0, level + random.randint(-8, 8))) for level in COLOURS[colour])
    return red, green, blue


def training_scenes(count: int, random: Random) -> Iterator[Scene]:
    """Scenes that are not held out; a third of them says where the shape is."""
    allowed = sorted(set(combinations()) - set(held_out()))
    places = [place for place in POSITIONS if place]
    for _ in range(count):
        yield random.choice(allowed)._replace(position=random.choice(places) if random.random() < 1 / 3 else "")


def concept_scenes(count: int) -> list[Scene]:
    """Scenes of the quickstart's new shape: colours and backgrounds all different."""
    random = Random(7)
    colours, backgrounds = list(COLOURS), list(COLOURS)
    scenes: list[Scene] = []
    while len(scenes) < count:
        scene = Scene("large", random.choice(colours), NEW_SHAPE, random.choice(backgrounds))
        if scene.colour != scene.background and all(scene.colour != s.colour or len(scenes) >= 8 for s in scenes):
            scenes.append(scene)
    return scenes


def save(scene: Scene, folder: Path, number: int, random: Random, *, word: str | None = None) -> None:
    draw(scene, random).save(folder / f"{number:05d}.png")
    (folder / f"{number:05d}.txt").write_text(scene.caption(word) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder that is filled")
    parser.add_argument("--count", type=int, default=8000, help="pictures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concept", action="store_true", help=f"the quickstart's {NEW_SHAPE} as a {NEW_WORD}")
    parser.add_argument("--thing", action="store_true", help=f"{THING.caption()}, without a caption")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    random = Random(arguments.seed)
    if arguments.thing:
        for number in range(arguments.count):
            draw(THING, random).save(arguments.out / f"{number:05d}.png")
    elif arguments.concept:
        for number, scene in enumerate(concept_scenes(arguments.count)):
            save(scene, arguments.out, number, random, word=NEW_WORD)
    else:
        for number, scene in enumerate(training_scenes(arguments.count, random)):
            save(scene, arguments.out, number, random)


if __name__ == "__main__":
    main()
