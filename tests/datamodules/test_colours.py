import colorsys

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance

from otl.datamodules.colours import adjusted
from otl.datamodules.views import Colours

RED, GREEN, BLUE, YELLOW = ([255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0])


def picture() -> Image.Image:
    """Muted colours, which no change below drives out of range."""
    draw = np.random.default_rng(0)
    return Image.fromarray(draw.integers(70, 160, (24, 32, 3), dtype=np.uint8))


def levels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def one(colour: list[int], **changes: float) -> list[float]:
    return adjusted(torch.tensor(colour).float().reshape(3, 1, 1), Colours(**changes)).flatten().tolist()


@pytest.mark.parametrize(
    ("name", "pillow"),
    [
        ("brightness", ImageEnhance.Brightness),
        ("contrast", ImageEnhance.Contrast),
        ("saturation", ImageEnhance.Color),
    ],
)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.3])
def test_factors_are_those_of_pillow(name, pillow, factor):
    expected = levels(pillow(picture()).enhance(factor))
    assert (adjusted(levels(picture()), Colours(**{name: factor})) - expected).abs().max() < 1.6  # Pillow rounds twice


@pytest.mark.parametrize("degrees", [-90, -20, 35, 180])
def test_hue_turns_chroma_and_leaves_luma_and_the_strength_of_colours(degrees):
    """In Python's own YIQ, whose constants are rounded to two digits."""
    before, after = [120, 100, 90], one([120, 100, 90], hue=degrees)
    y, i, q = colorsys.rgb_to_yiq(*before)
    new_y, new_i, new_q = colorsys.rgb_to_yiq(*after)
    assert new_y == pytest.approx(y, abs=0.3)
    assert np.hypot(new_i, new_q) == pytest.approx(np.hypot(i, q), rel=0.03)
    turned = np.degrees(np.angle(complex(i, q) / complex(new_i, new_q)))
    assert (turned - degrees + 180) % 360 - 180 == pytest.approx(0, abs=2)


def test_hue_goes_from_red_towards_yellow():
    r, g, b = one([140, 90, 90], hue=30)
    assert g > 95 and b < 85 and r > g


def test_grey_has_no_hue_and_no_saturation():
    assert one([77, 77, 77], hue=50, saturation=1.7) == pytest.approx([77] * 3, abs=1e-3)


def test_all_four_together_are_one_after_the_other():
    image = levels(picture())
    together = adjusted(image, Colours(1.1, 0.9, 1.2, 15))
    steps = [Colours(brightness=1.1), Colours(contrast=0.9), Colours(saturation=1.2), Colours(hue=15)]
    for step in steps:
        image = adjusted(image, step)
    assert torch.allclose(together, image, atol=1e-2)


def test_levels_stay_in_range():
    bright = adjusted(levels(picture()), Colours(brightness=3.0, saturation=4.0))
    assert bright.min() >= 0 and bright.max() == 255


def test_without_a_change_nothing_is_computed():
    image = levels(picture())
    assert adjusted(image, Colours()) is image
