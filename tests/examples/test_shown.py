"""What the pictures of a run show, before and after."""

import json
from random import Random

from examples.shapes.classify import Seen
from examples.shapes.draw import Scene, draw
from examples.shapes.shown import counted, shown

RED, GREEN = Scene("large", "red", "circle", "blue"), Scene("large", "green", "star", "white")


def test_the_first_and_the_last_pictures_of_each_prompt_are_seen(tmp_path):
    for step, scenes in {0: [RED, RED], 5: [GREEN, RED], 10: [GREEN, GREEN]}.items():
        folder = tmp_path / "samples" / f"step-{step:06d}"
        folder.mkdir(parents=True)
        pictures = []
        for number, scene in enumerate(scenes):
            draw(scene, Random(0)).save(folder / f"{number}.png")
            pictures.append({"prompt": "a gle", "file": f"{folder.name}/{number}.png"})
        folder.with_suffix(".json").write_text(json.dumps({"pictures": pictures}))
    before, after = shown(tmp_path)
    assert counted(before["a gle"]) == "2 red circle on blue"
    assert counted(after["a gle"]) == "2 green star on white"


def test_what_there_is_most_of_comes_first():
    red, none = Seen("star", "red", "blue", 1.0), Seen(None, None, "blue", 0.0)
    assert counted([none, red, red]) == "2 red star on blue, 1 None None on blue"
