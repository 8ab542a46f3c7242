"""Pictures with holes, and the preset that makes the shipped checkpoint an inpainting model."""

import zipfile
from random import Random

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image

from examples.shapes.classify import classify
from examples.shapes.draw import Scene, draw, held_out
from examples.shapes.fill import Hole, around, difference, filled, holes, painted, pasted, untrained
from otl.config import assets_dir
from tests.commands import run_to_learn

CASES = holes(20)


@pytest.mark.parametrize("hole", CASES, ids=lambda hole: hole.scene.caption().replace(" ", "-"))
def test_a_hole_hides_the_shape_whole_and_nothing_in_it_is_right_already(hole):
    rest = np.asarray(hole.picture)[np.asarray(hole.mask) == 0]
    assert len(np.unique(rest, axis=0)) == 1
    assert 0.1 < np.asarray(hole.mask).mean() / 255 < 0.75
    assert not filled(hole, hole.picture)


def test_a_hole_is_filled_by_the_prompted_shape_in_it_on_the_pictures_background():
    scene = Scene("small", "red", "circle", "blue", "on the left")
    picture = draw(scene._replace(shape="square", colour="white"), Random(5))
    hole = Hole(picture, around(picture, scene.size), scene)
    assert hole.prompt == "a small red circle"
    assert filled(hole, draw(scene, Random(5)))
    for part, wrong in [("shape", "cross"), ("colour", "white"), ("background", "green"), ("position", "on the right")]:
        assert not filled(hole, draw(scene._replace(**{part: wrong}), Random(5)))


def test_only_the_hole_is_pasted():
    hole, black = CASES[0], Image.new("RGB", (64, 64))
    outside = np.asarray(hole.mask) == 0
    assert (np.asarray(pasted(hole, black))[outside] == np.asarray(hole.picture)[outside]).all()
    assert not np.asarray(pasted(hole, black))[~outside].any()
    assert difference(hole, pasted(hole, black)) == 0 < difference(hole, black)


def test_the_archive_of_the_preset_shows_nothing_that_is_held_out():
    with zipfile.ZipFile(assets_dir() / "quickstart_holes.zip") as archive:
        names = archive.namelist()
        numbers = sorted({name[:3] for name in names})
        scenes = [
            (archive.read(f"{number}.txt").decode(), classify(Image.open(archive.open(f"{number}.png"))))
            for number in numbers
        ]
    assert len(names) == 3 * len(numbers) == 900
    assert all(caption.split()[2:] == [view.colour, view.shape] for caption, view in scenes)
    kept = {(Hole(None, None, scene).prompt, scene.background) for scene in held_out()}
    assert not kept & {(caption, view.background) for caption, view in scenes}


@pytest.mark.slow
@pytest.mark.long
def test_holes_are_filled_with_what_the_prompt_says_on_the_background_that_the_picture_has(tmp_path):
    run_to_learn("quickstart_inpaint", "callbacks.sampling=null", folder=tmp_path)
    trained = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "RUN" / "final", dtype=torch.float32)
    assert sum(map(filled, CASES, painted(untrained(), CASES))) <= 2
    assert sum(map(filled, CASES, painted(trained, CASES))) >= 16
