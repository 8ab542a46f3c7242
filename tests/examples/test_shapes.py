"""The picture generator and its classifier."""

from random import Random

import numpy as np
import pytest
from PIL import Image, ImageFilter

from examples.shapes.classify import Seen, classify, contact_sheet, right
from examples.shapes.draw import (
    COLOURS,
    HELD_OUT,
    NEW_SHAPE,
    NEW_WORD,
    SHAPES,
    Scene,
    combinations,
    concept_scenes,
    draw,
    held_out,
    training_scenes,
)


@pytest.mark.parametrize("shape", [*SHAPES, NEW_SHAPE])
@pytest.mark.parametrize("size", ["small", "large"])
def test_the_classifier_is_right_on_blurred_pictures_of_every_colour(shape, size):
    random = Random(3)
    for colour in COLOURS:
        for background in COLOURS:
            if colour != background:
                scene = Scene(size, colour, shape, background)
                seen = classify(draw(scene, random).filter(ImageFilter.GaussianBlur(0.8)))
                assert (seen.shape, seen.colour, seen.background) == (shape, colour, background)


def test_an_empty_picture_has_no_shape():
    assert classify(Image.new("RGB", (64, 64), "blue")).shape is None


def test_a_scribble_is_no_shape():
    picture = Image.new("RGB", (64, 64), "white")
    for i in range(10, 54):
        for k in range(4):
            picture.putpixel((i, (i * 7 + 13 * k) % 40 + 10), (0, 0, 0))
    assert classify(picture).shape is None


def test_no_training_scene_is_held_out():
    kept = set(held_out())
    assert len(kept) == HELD_OUT
    assert not any(scene._replace(position="") in kept for scene in training_scenes(5000, Random(0)))


def test_the_new_shape_is_in_no_training_scene():
    assert all(scene.shape != NEW_SHAPE for scene in combinations())
    assert {scene.shape for scene in concept_scenes(10)} == {NEW_SHAPE}


def test_pictures_are_a_function_of_scene_and_seed():
    scene = combinations()[0]
    assert draw(scene, Random(1)).tobytes() == draw(scene, Random(1)).tobytes()
    assert draw(scene, Random(1)).tobytes() != draw(scene, Random(2)).tobytes()


def test_captions_read_as_sentences():
    assert Scene("small", "red", "circle", "blue").caption() == "a small red circle on a blue background"
    assert Scene("large", "red", "star", "orange").caption(NEW_WORD) == "a large red gle on an orange background"


def test_right_means_shape_and_colour():
    scene = Scene("small", "red", "circle", "blue")
    assert right(Seen("circle", "red", "green", 1.0), scene)
    assert not right(Seen("circle", "blue", "blue", 1.0), scene)
    assert not right(Seen("square", "red", "blue", 1.0), scene)
    assert not right(Seen(None, None, "blue", 0.0), scene)


@pytest.mark.parametrize("shape", [*SHAPES, NEW_SHAPE])
def test_the_classifier_is_right_on_noisy_pictures(shape):
    levels = np.random.default_rng(0)
    random = Random(5)
    for colour, background in [("red", "blue"), ("white", "black"), ("green", "yellow"), ("orange", "purple")]:
        picture = draw(Scene("small", colour, shape, background), random).filter(ImageFilter.GaussianBlur(0.6))
        noisy = np.asarray(picture) + levels.normal(0, 8, (64, 64, 3))
        seen = classify(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)))
        assert (seen.shape, seen.colour, seen.background) == (shape, colour, background)


def test_a_contact_sheet_holds_every_picture():
    sheet = contact_sheet([Image.new("RGB", (64, 64), "red")] * 11)
    assert sheet.size == (660, 132)
    assert sheet.getpixel((32, 98)) == (255, 0, 0)
    assert sheet.getpixel((98, 98)) == (255, 255, 255)
