"""WD taggers, with a network whose probabilities are the means of blue, green and red of what it is shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from otl.config import SettingsError
from otl.tools.taggers import Tagger, is_face, levels
from tests.tools import tiny


def load(folder: Path, **options: object) -> Tagger:
    tagger = Tagger(str(folder), **options)
    tagger.load(torch.device("cpu"), torch.float32)
    return tagger


def colour(red: int, green: int, blue: int) -> Image.Image:
    return Image.new("RGB", (16, 16), (red, green, blue))


def test_tags_come_by_probability_and_from_the_threshold_on(tmp_path: Path) -> None:
    pictures = [colour(102, 0, 128), colour(204, 102, 0), colour(0, 0, 0)]  # 0.4, 0, 0.502; 0.8, 0.4, 0
    tagger = load(tiny.tagger(tmp_path), general_threshold=0.4)
    assert tagger.captions(pictures) == ["blue sky, red", "red, o_o", ""]


def test_characters_have_a_threshold_of_their_own_and_come_first(tmp_path: Path) -> None:
    tagger = load(tiny.tagger(tmp_path), general_threshold=0.9, character_threshold=0.6)
    assert tagger.captions([colour(255, 0, 153), colour(255, 0, 152)]) == ["gle (otl), red", "red"]  # 0.6 and below


def test_underscores_stay_where_they_are_wanted(tmp_path: Path) -> None:
    assert load(tiny.tagger(tmp_path), underscores=True).captions([colour(0, 255, 128)]) == ["o_o, blue_sky"]


def test_the_likeliest_rating_comes_first_where_it_is_wanted(tmp_path: Path) -> None:
    assert load(tiny.tagger(tmp_path), rating=True).captions([colour(255, 0, 0)]) == ["general, red"]


def test_an_excluded_tag_is_not_taken_however_it_is_spelled(tmp_path: Path) -> None:
    tagger = load(tiny.tagger(tmp_path), exclude=["blue sky", "gle_(otl)"])
    assert tagger.captions([colour(255, 0, 255)]) == ["red"]


def test_an_excluded_tag_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"there is no tag blue_skie; did you mean blue sky\?"):
        load(tiny.tagger(tmp_path), exclude=["blue_skie"])


def test_the_image_lies_in_the_middle_of_a_white_square_blue_first() -> None:
    wide = levels(Image.new("RGB", (8, 4), (200, 100, 50)), 8)
    assert wide.shape == (8, 8, 3)
    np.testing.assert_array_equal(wide[2:6], np.broadcast_to(np.float32([50, 100, 200]), (4, 8, 3)))
    np.testing.assert_array_equal(wide[[0, 1, 6, 7]], 255)


def test_a_network_that_takes_one_image_gets_one_at_a_time(tmp_path: Path) -> None:
    pictures = [colour(255, 0, 0), colour(0, 0, 255)]
    alone = load(tiny.tagger(tmp_path / "one", count=1)).captions(pictures)
    assert alone == load(tiny.tagger(tmp_path / "any")).captions(pictures) == ["red", "gle (otl), blue sky"]


def test_a_list_of_other_tags_is_refused(tmp_path: Path) -> None:
    folder = tiny.tagger(tmp_path, tags="tag_id,name,category,count\n1,red,0,5\n")
    with pytest.raises(SettingsError, match=r"it should make \[N, 1\]"):
        load(folder)


def test_a_list_without_categories_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="not a list of tags with the columns name and category"):
        load(tiny.tagger(tmp_path, tags="name\nred\n"))


@pytest.mark.parametrize("tag", ["^_^", "0_0", "(o)_(o)", "||_||", "<|>_<|>", ">_o", "3_3", "+_-", "u_u"])
def test_a_face_keeps_its_underscore(tag: str) -> None:
    assert is_face(tag)


@pytest.mark.parametrize("tag", ["blue_sky", "d.va_(overwatch)", "1girl", "2_girls", "x-ray_vision", "k-on!"])
def test_words_are_no_face(tag: str) -> None:
    assert not is_face(tag)
