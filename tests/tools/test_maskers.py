"""What a text names, what stands in front, what has a colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, CLIPSegForImageSegmentation

from otl.config import SettingsError
from otl.tools.maskers import ColourMasker, SubjectMasker, TextMasker, near, stretched
from tests.tools import tiny

CPU = torch.device("cpu")


def load(masker: TextMasker | SubjectMasker | ColourMasker) -> TextMasker | SubjectMasker | ColourMasker:
    masker.load(CPU, torch.float32)
    return masker


def documented(folder: Path, picture: Image.Image, prompt: str) -> np.ndarray:
    """Probabilities [side, side] as transformers' documentation gets them, one image and text at a time."""
    network, processor = CLIPSegForImageSegmentation.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.no_grad():
        logits = network(**processor(text=[prompt], images=[picture], return_tensors="pt")).logits
    return logits.sigmoid().view(tiny.SIDE, tiny.SIDE).numpy()


def test_a_text_mask_is_where_clipseg_says(clipseg: Path) -> None:
    pictures = [tiny.noise(seed, (tiny.SIDE, tiny.SIDE)) for seed in range(3)]
    masks = load(TextMasker(["red"], str(clipseg), threshold=0.4)).masks(pictures)
    for picture, mask in zip(pictures, masks, strict=True):
        np.testing.assert_array_equal(mask, documented(clipseg, picture, "red") >= 0.4)
        assert 0 < mask.mean() < 1


def test_several_texts_are_white_where_any_is(clipseg: Path) -> None:
    pictures = [tiny.noise(seed, (tiny.SIDE, tiny.SIDE)) for seed in range(2)]
    masks = load(TextMasker(["red", "the blue square"], str(clipseg), threshold=0.5)).masks(pictures)
    for picture, mask in zip(pictures, masks, strict=True):
        each = [documented(clipseg, picture, prompt) >= 0.5 for prompt in ("red", "the blue square")]
        np.testing.assert_array_equal(mask, each[0] | each[1])
        assert (each[0] != each[1]).any()


def test_a_text_mask_has_the_size_of_its_image(clipseg: Path) -> None:
    masks = load(TextMasker(["red"], str(clipseg))).masks([tiny.noise(0, (50, 20)), tiny.noise(1, (33, 90))])
    assert [mask.shape for mask in masks] == [(20, 50), (90, 33)]


def test_a_text_that_is_too_long_is_refused(clipseg: Path) -> None:
    with pytest.raises(SettingsError, match="longer than 8 tokens"):
        load(TextMasker(["the red square on the blue ground"], str(clipseg)))


def test_no_text_is_refused(clipseg: Path) -> None:
    with pytest.raises(SettingsError, match=r"masker.prompts: there are none"):
        load(TextMasker([], str(clipseg)))


def test_a_captioner_is_no_masker(blip: Path) -> None:
    with pytest.raises(SettingsError, match="it is a blip; accepted is clipseg"):
        load(TextMasker(["red"], str(blip)))


def half_red() -> Image.Image:
    """Red on the left, green on the right."""
    picture = Image.new("RGB", (64, 32), (0, 255, 0))
    picture.paste((255, 0, 0), (0, 0, 32, 32))
    return picture


@pytest.mark.parametrize("side", [16, "S"])
def test_a_subject_mask_is_where_the_network_is_sure(tmp_path: Path, side: int | str) -> None:
    masker = load(SubjectMasker(str(tiny.subject(tmp_path, side=side)), side=24))
    (mask,) = masker.masks([half_red()])
    assert masker.side == (16 if side == 16 else 24)
    assert mask.shape == (32, 64)
    assert mask[:, :31].all()
    assert not mask[:, 33:].any()


def test_the_network_sees_the_brightest_level_as_1_then_normalised(tmp_path: Path) -> None:
    masker = SubjectMasker("", mean=(0.5, 0.25, 0), std=(0.5, 1, 2), side=2)
    levels = masker.levels(Image.new("RGB", (4, 4), (100, 50, 25)))
    np.testing.assert_allclose(levels[:, 0, 0], [(1 - 0.5) / 0.5, 0.5 - 0.25, 0.25 / 2], rtol=1e-6)
    assert levels.shape == (3, 2, 2)


def test_a_sigmoid_is_taken_where_the_network_gives_logits(tmp_path: Path) -> None:
    """Of -4, 1 and 4 the middle one is at 5 / 8 of the way, its sigmoid at 0.74."""
    picture = Image.fromarray(np.uint8([[[0, 0, 255]] * 8 + [[160, 0, 0]] * 8 + [[255, 0, 0]] * 8] * 8))
    mean, std = (0.5, 0, 0), (0.125, 1, 1)  # red 0, 160 and 255 become -4, 1.02 and 4
    folder = str(tiny.subject(tmp_path, side="S"))
    kinds = [SubjectMasker(folder, threshold=0.7, mean=mean, std=std, side=24, logits=logits) for logits in (0, 1)]
    plain, sure = (load(masker).masks([picture])[0][4] for masker in kinds)
    assert not plain[12]
    assert sure[12]


def test_without_contrast_there_is_no_subject() -> None:
    assert not stretched(torch.full((4, 4), 3.0)).any()


def test_a_network_of_another_shape_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"it should make \[N, 1, H, W\] of \[N, 3, H, W\]"):
        load(SubjectMasker(str(tiny.tagger(tmp_path))))


def test_a_spread_of_0_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"masker\.std"):
        load(SubjectMasker(str(tiny.subject(tmp_path)), std=(0.2, 0, 0.2)))


def test_a_colour_mask_is_exact() -> None:
    picture = Image.fromarray(np.uint8([[[0, 255, 0], [3, 252, 3], [4, 255, 0], [255, 0, 255], [0, 250, 5]]]))
    masker = load(ColourMasker(["lime", "#ff00ff"], tolerance=3))
    np.testing.assert_array_equal(masker.masks([picture])[0], [[True, True, False, True, False]])


def test_levels_do_not_wrap_around() -> None:
    assert not near(np.uint8([[[0, 0, 0]]]), np.int16([[255, 255, 255]]), 1).any()


@pytest.mark.parametrize(("colours", "message"), [([], "there are none"), (["lyme"], "lyme is no colour")])
def test_what_is_no_colour_is_refused(colours: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        load(ColourMasker(colours))
