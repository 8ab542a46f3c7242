"""Textual inversion finds what the shipped checkpoint can draw: a word for a thing of three properties."""

import pytest

from examples.shapes.classify import Seen
from examples.shapes.draw import THING, held_out
from examples.shapes.shown import shown
from tests.commands import run_to_learn


def same(seen: Seen) -> bool:
    return (seen.shape, seen.colour, seen.background) == (THING.shape, THING.colour, THING.background)


def test_no_picture_of_the_checkpoints_training_shows_the_thing():
    assert THING in held_out()


@pytest.mark.slow
@pytest.mark.long
def test_a_word_comes_to_mean_what_its_pictures_show(tmp_path):
    pictures = ("sample.prompts=['a <blorp>']", f"sample.seeds={list(range(10))}")
    run_to_learn("quickstart_embedding", *pictures, folder=tmp_path)
    before, after = (seen["a <blorp>"] for seen in shown(tmp_path / "RUN"))
    assert sum(map(same, before)) == 0
    assert sum(map(same, after)) >= 8
