from collections import Counter

import pytest
import torch
from PIL import Image

from otl import rng
from otl.config import Inpaint, MaskSource, SettingsError
from otl.datamodules import images, masks
from otl.types import Sample, Size
from tests.datamodules.fakes import picture

BUCKET = Size(48, 80)
FORMS = ("boxes", "brushes", "ellipses")


def only(form: str, **settings: float) -> Inpaint:
    return Inpaint(**({"boxes": 0, "brushes": 0, "ellipses": 0, "whole": 0} | {form: 1.0} | settings))


def generated(options: Inpaint, count: int, size: Size = BUCKET) -> list[torch.Tensor]:
    return [masks.generated(rng.key("test", number), size, options) for number in range(count)]


@pytest.mark.parametrize("form", FORMS)
def test_a_generated_mask_covers_a_share_within_the_range(form):
    drawn = generated(only(form, min_area=0.2, max_area=0.4), 60)
    assert all(mask.shape == (1, *BUCKET) and set(mask.unique().tolist()) == {0.0, 1.0} for mask in drawn)
    areas = torch.stack(drawn).mean((1, 2, 3))
    row = max(BUCKET) / BUCKET.area  # pixels at the edge of a box are equally far from its middle
    assert 0.2 - 1e-3 <= areas.min() < 0.23 and 0.37 < areas.max() <= 0.4 + 2 * row


@pytest.mark.parametrize("form", FORMS)
def test_one_share_is_met_exactly_by_every_form(form):
    row = 2 * max(BUCKET) / BUCKET.area
    for mask in generated(only(form, min_area=0.3, max_area=0.3), 20):
        assert 0.3 - 1e-3 <= mask.mean() <= 0.3 + row


def test_boxes_are_filled_rectangles():
    for mask in generated(only("boxes"), 20):
        rows, columns = mask[0].any(1), mask[0].any(0)
        assert torch.equal(mask[0] > 0, rows[:, None] & columns[None, :])


def test_ellipses_inside_the_picture_fill_what_a_circle_does_of_its_box():
    shares = []
    for mask in generated(only("ellipses", min_area=0.1, max_area=0.1), 60):
        rows, columns = torch.where(mask[0].any(1))[0], torch.where(mask[0].any(0))[0]
        inside = rows[0] > 0 and columns[0] > 0 and rows[-1] < BUCKET.h - 1 and columns[-1] < BUCKET.w - 1
        if inside:
            shares.append(mask.sum() / (len(rows) * len(columns)))
    assert len(shares) > 10
    assert sum(shares) / len(shares) == pytest.approx(torch.pi / 4, abs=0.03)


def test_the_whole_picture_is_masked_whole():
    assert all(mask.min() == 1 for mask in generated(only("whole", max_area=0.2), 3))


def test_forms_come_as_often_as_their_shares_say():
    shares = Inpaint(boxes=2, brushes=1, ellipses=4, whole=3)
    count = 4000
    seen = Counter(masks.choose(rng.uniform("forms", number), shares) for number in range(count))
    expected = {"boxes": 0.2, "brushes": 0.1, "ellipses": 0.4, "whole": 0.3}
    assert {form: seen[form] / count for form in expected} == pytest.approx(expected, abs=0.025)


def test_a_form_without_a_share_never_comes():
    assert {masks.choose(u, only("ellipses")) for u in (0.0, 0.5, 1 - 1e-16)} == {"ellipses"}


def test_a_mask_is_a_function_of_its_key():
    one, again, other = (masks.generated(key, BUCKET, Inpaint(whole=0)) for key in (5, 5, 6))
    assert torch.equal(one, again) and not torch.equal(one, other)


def test_an_empty_area_masks_nothing():
    assert not masks.generated(1, BUCKET, only("boxes", min_area=0, max_area=0)).any()


# Files


@pytest.fixture
def photo(tmp_path):
    """A black picture with a white box, which is its own mask."""
    image = Image.new("RGB", (211, 130))
    image.paste("white", (30, 20, 150, 99))
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.mark.parametrize("bucket", [Size(64, 64), Size(48, 112), Size(256, 256), Size(128, 48)])
def test_a_mask_file_is_cut_as_its_image_is(photo, bucket):
    shown = images.pixels(photo, bucket, "white")[0].mean(0, keepdim=True)
    read = masks.read(photo, Size(130, 211), bucket)
    clear = shown.abs() > 0.7  # between black and white the two ways of scaling may differ
    assert clear.float().mean() > 0.85
    assert torch.equal(read[clear], (shown[clear] > 0).float())
    assert 0 < read.mean() < 1


def test_a_smaller_mask_file_is_scaled_with_its_image(photo):
    small = photo.with_name("small.png")
    Image.open(photo).resize((422, 260), Image.Resampling.NEAREST).save(small)
    bucket = Size(64, 96)
    assert torch.equal(masks.read(small, Size(130, 211), bucket), masks.read(photo, Size(130, 211), bucket))


def test_the_mask_of_an_image_that_lies_on_its_side_is_drawn_as_it_is_seen(tmp_path):
    upright = Image.new("RGB", (80, 120))
    upright.paste("white", (0, 0, 80, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    upright.save(tmp_path / "lying-masklabel.png")
    bucket = Size(96, 64)
    shown = images.pixels(tmp_path / "lying.png", bucket, "white")[0].mean(0, keepdim=True)
    assert torch.equal(masks.read(tmp_path / "lying-masklabel.png", Size(120, 80), bucket), (shown > 0).float())
    assert shown[0, 0].min() > 0.9 and shown[0, -1].max() < -0.9


def test_what_is_transparent_in_a_mask_is_not_painted(tmp_path):
    image = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 16, 32))
    image.save(tmp_path / "m.png")
    mask = masks.read(tmp_path / "m.png", Size(32, 32), Size(32, 32))
    assert mask[0, :, :16].all() and not mask[0, :, 16:].any()


def test_masks_are_found_beside_the_images_and_in_a_folder_of_their_own(tmp_path):
    one = picture(tmp_path / "photos" / "sub" / "one.jpg")
    beside = picture(tmp_path / "photos" / "sub" / "one-masklabel.png", caption=None)
    apart = picture(tmp_path / "masks" / "sub" / "one.webp", caption=None)
    root = tmp_path / "photos"
    assert masks.find(one, root, None) == beside
    assert masks.find(one, root, tmp_path / "masks") == apart
    assert masks.find(picture(root / "two.png"), root, None) is None


@pytest.mark.parametrize(
    ("mask", "image", "right"),
    [
        (Size(100, 150), Size(100, 150), True),
        (Size(50, 75), Size(100, 150), True),
        (Size(33, 50), Size(100, 150), True),  # rounded
        (Size(150, 100), Size(100, 150), False),
        (Size(100, 140), Size(100, 150), False),
    ],
)
def test_a_mask_has_its_image_s_aspect_ratio(mask, image, right):
    assert masks.fits(mask, image) == right


def test_a_file_comes_before_a_generated_mask(photo):
    sample = Sample(photo, Size(130, 211), [""], mask=photo)
    bucket = Size(64, 64)
    assert torch.equal(masks.mask(sample, bucket, 3, Inpaint()), masks.read(photo, sample.size, bucket))
    bare = Sample(photo, Size(130, 211), [""])
    assert torch.equal(masks.mask(bare, bucket, 3, Inpaint()), masks.generated(3, bucket, Inpaint()))


def test_masks_by_file_alone_need_one_for_every_image(photo):
    has, lacks = Sample(photo, Size(130, 211), [""], mask=photo), Sample(photo, Size(130, 211), [""])
    assert masks.lacking(Inpaint(masks=MaskSource.files), [has, lacks]) == [lacks]
    assert masks.lacking(Inpaint(), [has, lacks]) == []


def test_a_mask_that_is_no_image_is_named(tmp_path):
    (tmp_path / "m.png").write_text("no")
    with pytest.raises(SettingsError, match=r"m\.png: cannot be decoded"):
        masks.read(tmp_path / "m.png", Size(8, 8), Size(8, 8))


def test_masked_pixels_are_filled_and_the_others_stay():
    pixels = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2] = 1
    cut = masks.masked(pixels, mask, 0.25)
    assert (cut[0, :, :2] == 0.25).all()
    assert torch.equal(cut[0, :, 2:], pixels[0, :, 2:]) and torch.equal(cut[1], pixels[1])
