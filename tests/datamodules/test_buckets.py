import itertools

import pytest

from otl.datamodules.buckets import cropped_fraction, fit, nearest, scale
from otl.datamodules.grid import grid, square
from otl.types import Crop, Size

# OneTrainer's own sets and assignments, measured by running it.
SETS = {
    (512, 8): "256x1024 272x960 296x888 320x808 360x728 384x680 416x624 456x576 512x512",
    (1024, 64): "512x2048 576x1920 576x1792 640x1600 704x1472 768x1344 832x1280 896x1152 1024x1024",
    (512, 16): "256x1024 272x960 288x880 320x816 368x720 384x672 416x624 464x576 512x512",
    (512, 128): "256x1024 256x896 384x768 384x640 512x512",
}
MODELS = [(512, 8), (768, 8), (1024, 64), (1024, 16), (1024, 128)]
ASSIGNED = {
    Size(1080, 1920): [
        (384, 680, 384, 683, 0, 1),
        (584, 1016, 584, 1038, 0, 11),
        (768, 1344, 768, 1365, 0, 10),
        (768, 1360, 768, 1365, 0, 2),
        (768, 1408, 792, 1408, 12, 0),
    ],
    Size(768, 1024): [
        (456, 576, 456, 608, 0, 16),
        (688, 856, 688, 917, 0, 30),
        (896, 1152, 896, 1195, 0, 21),
        (912, 1152, 912, 1216, 0, 32),
        (896, 1152, 896, 1195, 0, 21),
    ],
    Size(1216, 832): [
        (624, 416, 624, 427, 0, 5),
        (944, 624, 944, 646, 0, 11),
        (1280, 832, 1280, 876, 0, 22),
        (1248, 832, 1248, 854, 0, 11),
        (1280, 896, 1310, 896, 15, 0),
    ],
}
IMAGES = [Size(h, w) for h, w in itertools.product((37, 64, 100, 333, 512, 1000, 4000), repeat=2)]


@pytest.mark.parametrize(("resolution", "step"), SETS)
def test_the_grid_is_the_published_set_and_its_transposes(resolution, step):
    wide = [tuple(map(int, size.split("x"))) for size in SETS[resolution, step].split()]
    assert set(grid(resolution, step)) == set(wide) | {(w, h) for h, w in wide}


@pytest.mark.parametrize(("resolution", "step"), MODELS)
def test_buckets_have_the_area_and_the_step(resolution, step):
    for bucket in grid(resolution, step):
        assert bucket.h % step == bucket.w % step == 0
        assert abs(bucket.area / resolution**2 - 1) < 0.2


def test_no_side_is_rounded_to_nothing():
    assert min(min(bucket) for bucket in grid(64, 64)) == 64


def test_the_square_is_a_multiple_of_the_step():
    assert square(1000, 64) == [Size(1024, 1024)]


@pytest.mark.parametrize("image", ASSIGNED)
def test_images_are_assigned_scaled_and_cropped_as_measured(image):
    for (resolution, step), expected in zip(MODELS, ASSIGNED[image], strict=True):
        bucket = nearest(image, grid(resolution, step))
        scaled, crop = fit(image, bucket)
        assert (*bucket, *scaled, *crop) == expected


@pytest.mark.parametrize(("resolution", "step"), MODELS)
def test_a_transposed_image_is_in_the_transposed_bucket(resolution, step):
    for image in IMAGES:
        h, w = nearest(image, grid(resolution, step))
        assert nearest(Size(image.w, image.h), grid(resolution, step)) == Size(w, h)


def test_the_order_of_the_buckets_does_not_matter():
    for image in IMAGES:
        assert nearest(image, grid(512, 8)) == nearest(image, grid(512, 8)[::-1])


def test_nearest_is_by_ratio_in_log_space():
    """Between 1:1 and 1:2 lies 1:1.41, not 1:1.5."""
    sizes = [Size(100, 100), Size(100, 200)]
    assert nearest(Size(100, 140), sizes) == sizes[0]
    assert nearest(Size(100, 143), sizes) == sizes[1]


def test_the_scaled_image_covers_the_bucket_exactly_on_one_side():
    for image in IMAGES:
        bucket = nearest(image, grid(512, 8))
        scaled, crop = fit(image, bucket)
        assert scaled.h >= bucket.h and scaled.w >= bucket.w
        assert scaled.h == bucket.h or scaled.w == bucket.w
        assert crop == Crop((scaled.h - bucket.h) // 2, (scaled.w - bucket.w) // 2)


def test_a_panorama_loses_a_third():
    assert cropped_fraction(Size(500, 3000), Size(256, 1024)) == pytest.approx(1 / 3)


def test_a_fitting_image_loses_nothing():
    assert cropped_fraction(Size(1024, 512), Size(512, 256)) == 0


def test_scale_says_how_much_an_image_is_enlarged():
    assert scale(Size(256, 256), Size(512, 512)) == 2
    assert scale(Size(2048, 1024), Size(512, 512)) == 0.5
