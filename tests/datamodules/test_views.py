import math
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from otl import rng
from otl.config import Augment
from otl.datamodules import images, masks, views
from otl.datamodules.layout import place
from otl.datamodules.views import View, centred, plain, varied
from otl.types import Crop, Size

PLACE = place(Size(1080, 1920), Size(768, 1344))  # scaled to 768 x 1365
TALL = place(Size(300, 100), Size(128, 64))  # scaled to 192 x 64
RANDOM = {
    "flip": 0.5,
    "rotation": 20.0,
    "brightness": 0.3,
    "contrast": 0.3,
    "saturation": 0.3,
    "hue": 30.0,
    "crop_jitter": 1.0,
    "resize_jitter": 0.4,
}
FIXED = {
    "fixed_rotation": 7.0,
    "fixed_brightness": 1.2,
    "fixed_contrast": 0.8,
    "fixed_saturation": 1.3,
    "fixed_hue": 20.0,
}


def many(count: int = 400, at=PLACE, **settings: float) -> list[View]:
    return [varied(at, Augment(**settings), views.chance(1, number)) for number in range(count)]


def middle(_: str) -> float:
    return 0.5


def test_the_plain_view_is_the_layouts_place():
    view = plain(PLACE)
    assert (view.bucket, view.scaled, view.crop) == (Size(768, 1344), Size(768, 1365), (0, 10))
    assert view == centred(Size(1080, 1920), Size(768, 1344))


def test_there_is_a_row_above_for_every_setting():
    assert {field.name for field in fields(Augment)} == {*RANDOM, *FIXED}


def test_without_augmentation_every_view_is_plain():
    assert set(many(5)) == {plain(PLACE)}
    assert not views.varies(Augment())


@pytest.mark.parametrize("name", RANDOM)
def test_each_random_setting_makes_views_differ(name):
    assert len(set(many(20, **{name: RANDOM[name]}))) > 1
    assert views.varies(Augment(**{name: RANDOM[name]}))


@pytest.mark.parametrize("name", FIXED)
def test_each_fixed_setting_gives_one_view_that_is_not_plain(name):
    assert len({*many(20, **{name: FIXED[name]}), plain(PLACE)}) == 2
    assert not views.varies(Augment(**{name: FIXED[name]}))


def test_a_view_is_a_function_of_its_key():
    augment = Augment(**RANDOM)
    one, again, other = (varied(PLACE, augment, views.chance(seed, 3, 4)) for seed in (0, 0, 1))
    assert one == again != other


def test_choices_do_not_depend_on_each_other():
    alone, together = many(10, brightness=0.3), many(10, **RANDOM)
    assert [view.colours.brightness for view in alone] == [view.colours.brightness for view in together]


def test_held_out_images_get_what_is_fixed_and_nothing_random():
    settled = views.settled(Augment(**RANDOM, **FIXED))
    assert settled == Augment(**FIXED)
    assert views.settled(Augment(flip=1.0)).flip == 1


@pytest.mark.parametrize(("share", "low", "high"), [(0.0, 0, 0), (0.25, 0.19, 0.31), (1.0, 1, 1)])
def test_a_share_is_mirrored(share, low, high):
    assert low <= np.mean([view.mirrored for view in many(flip=share)]) <= high


@pytest.mark.parametrize(("strength", "fixed"), [(0.3, 1.0), (0.2, 1.5)])
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_factors_are_uniform_around_the_fixed_one(name, strength, fixed):
    drawn = [getattr(v.colours, name) / fixed for v in many(**{name: strength, f"fixed_{name}": fixed})]
    assert min(drawn) == pytest.approx(1 - strength, abs=0.01) and max(drawn) == pytest.approx(1 + strength, abs=0.01)
    assert np.std(drawn) == pytest.approx(strength / math.sqrt(3), rel=0.1)


def test_angles_are_uniform_around_the_fixed_one():
    for drawn in (
        [view.angle for view in many(rotation=20, fixed_rotation=-5)],
        [view.colours.hue for view in many(hue=20, fixed_hue=-5)],
    ):
        assert min(drawn) == pytest.approx(-25, abs=0.5) and max(drawn) == pytest.approx(15, abs=0.5)
        assert np.std(drawn) == pytest.approx(20 / math.sqrt(3), rel=0.1)


def test_a_jittered_crop_goes_from_edge_to_edge_each_place_as_often():
    tops = Counter(view.crop.top for view in many(6500, at=TALL, crop_jitter=1.0))
    assert set(tops) == set(range(192 - 128 + 1))
    assert min(tops.values()) > 55 and max(tops.values()) < 150
    assert {view.crop.left for view in many(20, at=TALL, crop_jitter=1.0)} == {0}


def test_half_a_jitter_goes_half_the_way():
    tops = [view.crop.top for view in many(at=TALL, crop_jitter=0.5)]
    assert (min(tops), max(tops)) == (16, 48)


def test_a_jittered_size_makes_room_for_the_crop_in_its_middle():
    drawn = many(resize_jitter=0.5)
    sizes = [view.scaled.h / PLACE.scaled.h for view in drawn]
    assert 1 <= min(sizes) < 1.02 and 1.48 < max(sizes) <= 1.5
    for view in drawn:
        assert abs(view.crop.top - (view.scaled.h - view.bucket.h) / 2) <= 1
        assert abs(view.crop.left - (view.scaled.w - view.bucket.w) / 2) <= 1


def corners(view: View) -> list[tuple[float, float]]:
    """Where the corners of what is shown lie in the scaled image, y and x."""
    sin, cos = math.sin(math.radians(view.angle)), math.cos(math.radians(view.angle))
    found = []
    for y in (-view.bucket.h / 2, view.bucket.h / 2):
        for x in (-view.bucket.w / 2, view.bucket.w / 2):
            center_y, center_x = view.crop.top + view.bucket.h / 2, view.crop.left + view.bucket.w / 2
            found.append((center_y + x * sin + y * cos, center_x + x * cos - y * sin))
    return found


@pytest.mark.parametrize("at", [PLACE, TALL])
@pytest.mark.parametrize("settings", [{"rotation": 180.0}, {"rotation": 15.0, "crop_jitter": 1.0, "flip": 0.5}, RANDOM])
def test_no_corner_is_empty(at, settings):
    for view in many(at=at, **settings):
        assert all(-0.01 <= y <= view.scaled.h + 0.01 and -0.01 <= x <= view.scaled.w + 0.01 for y, x in corners(view))


def test_an_image_is_enlarged_no_more_than_its_turn_asks_for():
    """A square turned by an eighth needs the root of two."""
    square = place(Size(400, 400), Size(200, 200))
    view = varied(square, Augment(fixed_rotation=45), middle)
    assert view.scaled.h == pytest.approx(200 * math.sqrt(2), abs=2)


def test_variations_are_evenly_spread_and_differ_between_images():
    augment = Augment(flip=0.5, brightness=0.4)
    for image in range(30):
        four = [varied(PLACE, augment, views.spread(number, 4, image)) for number in range(4)]
        assert sum(view.mirrored for view in four) == 2
        factors = sorted(view.colours.brightness for view in four)
        assert np.diff(factors) == pytest.approx([0.2, 0.2, 0.2])  # 0.8 wide, four of them
    firsts = {varied(PLACE, augment, views.spread(0, 4, image)) for image in range(30)}
    assert len(firsts) == 30


def test_all_variations_are_seen_before_any_comes_again():
    shown = [views.turn(number, 3, "seed", "image") for number in range(30)]
    assert all(set(shown[start : start + 3]) == {0, 1, 2} for start in range(0, 30, 3))
    assert len({tuple(shown[start : start + 3]) for start in range(0, 30, 3)}) > 1  # every other epoch sees all too
    assert shown != [views.turn(number, 3, "seed", "other") for number in range(30)]


# Pixels


@pytest.fixture
def photo(tmp_path):
    """Smooth, different in every corner."""
    draw = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(draw[None], size=(90, 128), mode="bicubic").clamp(0, 1)[0]
    image = Image.fromarray((smooth.permute(1, 2, 0) * 255).byte().numpy())
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def show(photo: Path, view: View) -> torch.Tensor:
    return images.pixels(photo, view, "white")


def at(bucket: Size):
    return place(Size(90, 128), bucket)


@pytest.mark.parametrize("name", [*RANDOM, *FIXED])
def test_each_setting_changes_the_pixels(photo, name):
    placed = at(Size(64, 64))
    view = varied(placed, Augment(**{name: (RANDOM | FIXED | {"flip": 1.0})[name]}), lambda _: 0.9)
    assert (show(photo, view) - show(photo, plain(placed))).abs().mean() > 0.01


@pytest.mark.parametrize("bucket", [Size(64, 64), Size(45, 64), Size(64, 48)])
@pytest.mark.parametrize("u", [0.1, 0.5, 0.93])
def test_a_mirrored_view_is_the_mirror_of_the_other(photo, bucket, u):
    settings = {"crop_jitter": 1.0, "resize_jitter": 0.3}
    one, other = (varied(at(bucket), Augment(flip=flip, **settings), lambda _: u) for flip in (0.0, 1.0))
    assert torch.equal(show(photo, other), show(photo, one).flip(-1))
    assert other.crop.left == one.scaled.w - bucket.w - one.crop.left and other.crop.top == one.crop.top


def test_a_crop_lies_where_the_view_says(photo):
    view = View(Size(40, 50), Size(90, 128), Crop(13, 61))
    with Image.open(photo) as image:
        expected = torch.from_numpy(np.array(image.crop((61, 13, 111, 53)))).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(show(photo, view), expected)


@pytest.mark.parametrize("angle", [-30.0, 12.0, 90.0])
def test_a_turn_is_that_of_pillow(photo, angle):
    bucket = Size(41, 31)
    view = varied(at(bucket), Augment(fixed_rotation=angle), middle)
    with Image.open(photo) as image:
        scaled = image.resize((view.scaled.w, view.scaled.h), Image.Resampling.BICUBIC)
    centre = (view.crop.left + bucket.w / 2, view.crop.top + bucket.h / 2)
    turned = scaled.rotate(angle, Image.Resampling.BICUBIC, center=centre)
    box = (view.crop.left, view.crop.top, view.crop.left + bucket.w, view.crop.top + bucket.h)
    expected = torch.from_numpy(np.array(turned.crop(box))).permute(2, 0, 1) / 127.5 - 1
    assert (show(photo, view) - expected).abs().max() < 0.04


def test_a_mirrored_image_is_mirrored_before_it_is_turned(photo):
    one, other = (varied(at(Size(40, 40)), Augment(flip=1.0, fixed_rotation=a), middle) for a in (20.0, 0.0))
    back = varied(at(Size(40, 40)), Augment(fixed_rotation=-20.0), middle)
    assert torch.allclose(show(photo, one), show(photo, back).flip(-1), atol=1e-4)
    assert not torch.allclose(show(photo, one), show(photo, other), atol=0.1)


def test_a_mask_follows_its_image_and_keeps_its_colours(tmp_path):
    """The image is its own mask."""
    image = Image.new("RGB", (211, 130))
    image.paste("white", (30, 20, 150, 99))
    image.save(tmp_path / "photo.png")
    of_image = place(Size(130, 211), Size(96, 112))
    geometry = {name: value for name, value in RANDOM.items() if name not in {"brightness", "contrast"}}
    seen = set()
    for number in range(12):
        view = varied(of_image, Augment(**geometry, fixed_brightness=0.9), views.chance(number))
        shown = images.pixels(tmp_path / "photo.png", view, "white").mean(0, keepdim=True)
        mask = masks.read(tmp_path / "photo.png", view)
        clear = (shown < -0.8) | (shown > 0.6)  # between black and white the two ways of scaling may differ
        assert clear.float().mean() > 0.9
        assert torch.equal(mask[clear], (shown[clear] > 0).float())
        seen.add(rng.key(*mask.flatten().int().tolist()))
    assert len(seen) == 12
