from collections import Counter

import pytest
import torch
from PIL import Image

from otl import rng
from otl.config import Inpaint, MaskSource, SettingsError
from otl.datamodules import images, masks
from otl.datamodules.views import centred
from otl.types import Sample, Size
from tests.datamodules.fakes import CountingEncoder, data, folder, module, same

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
    view = centred(Size(130, 211), bucket)
    shown = images.pixels(photo, view, "white").mean(0, keepdim=True)
    read = masks.read(photo, view)
    clear = shown.abs() > 0.7  # between black and white the two ways of scaling may differ
    assert clear.float().mean() > 0.85
    assert torch.equal(read[clear], (shown[clear] > 0).float())
    assert 0 < read.mean() < 1


def test_a_smaller_mask_file_is_scaled_with_its_image(photo):
    small = photo.with_name("small.png")
    Image.open(photo).resize((422, 260), Image.Resampling.NEAREST).save(small)
    view = centred(Size(130, 211), Size(64, 96))
    assert torch.equal(masks.read(small, view), masks.read(photo, view))


def test_the_mask_of_an_image_that_lies_on_its_side_is_drawn_as_it_is_seen(tmp_path):
    upright = Image.new("RGB", (80, 120))
    upright.paste("white", (0, 0, 80, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter, clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png", exif=exif)
    upright.save(tmp_path / "lying-masklabel.png")
    view = centred(Size(120, 80), Size(96, 64))
    shown = images.pixels(tmp_path / "lying.png", view, "white").mean(0, keepdim=True)
    assert torch.equal(masks.read(tmp_path / "lying-masklabel.png", view), (shown > 0).float())
    assert shown[0, 0].min() > 0.9 and shown[0, -1].max() < -0.9


def test_what_is_transparent_in_a_mask_is_not_painted(tmp_path):
    image = Image.new("RGBA", (32, 32), (255, 255, 255, 0))
    image.paste((255, 255, 255, 255), (0, 0, 16, 32))
    image.save(tmp_path / "m.png")
    mask = masks.read(tmp_path / "m.png", centred(Size(32, 32), Size(32, 32)))
    assert mask[0, :, :16].all() and not mask[0, :, 16:].any()


def test_a_file_comes_before_a_generated_mask(photo):
    sample = Sample(photo.with_name("other.png"), Size(130, 211), [""], mask=photo)
    view = centred(sample.size, Size(64, 64))
    assert torch.equal(masks.mask(sample, view, 3, Inpaint()), masks.read(photo, view))
    bare = Sample(photo, Size(130, 211), [""])
    assert torch.equal(masks.mask(bare, view, 3, Inpaint()), masks.generated(3, view.bucket, Inpaint()))


def test_greys_stay_where_masks_weigh_and_not_where_they_hide(tmp_path):
    ramp = Image.fromarray(torch.arange(0, 256, 8, dtype=torch.uint8).expand(4, 32).contiguous().numpy())
    ramp.save(tmp_path / "m.png")
    view = centred(Size(4, 32), Size(4, 32))
    levels = torch.arange(0, 256, 8) / 255
    assert torch.allclose(masks.read(tmp_path / "m.png", view, soft=True)[0, 0], levels)
    assert torch.equal(masks.read(tmp_path / "m.png", view)[0, 0], (levels > 0.5).float())


@pytest.mark.parametrize("orientation", [1, 6])
def test_an_alpha_channel_is_a_mask_where_the_image_names_itself(tmp_path, orientation):
    image = Image.new("RGBA", (24, 16), (255, 255, 255, 0))
    image.paste((0, 0, 0, 255), (0, 0, 24, 8))
    image.paste((0, 0, 0, 102), (0, 0, 12, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    lying = image if orientation == 1 else image.transpose(Image.Transpose.ROTATE_90)
    lying.save(tmp_path / "a.png", exif=exif)
    sample = Sample(tmp_path / "a.png", Size(16, 24), [""], mask=tmp_path / "a.png")
    view = centred(sample.size, sample.size)
    soft = masks.mask(sample, view, 0, Inpaint(), soft=True)[0]
    assert (soft[:8, :12] == 0.4).all() and (soft[:8, 12:] == 1).all() and not soft[8:].any()
    assert torch.equal(masks.mask(sample, view, 0, Inpaint())[0], (soft > 0.5).float())


def test_an_image_without_alpha_is_opaque_throughout(photo):
    sample = Sample(photo, Size(130, 211), [""], mask=photo)
    assert masks.mask(sample, centred(sample.size, Size(64, 64)), 0, Inpaint()).all()


def test_a_mask_that_is_no_image_is_named(tmp_path):
    (tmp_path / "m.png").write_text("no")
    with pytest.raises(SettingsError, match=r"m\.png: cannot be decoded"):
        masks.read(tmp_path / "m.png", centred(Size(8, 8), Size(8, 8)))


def test_masked_pixels_are_filled_and_the_others_stay():
    pixels = torch.linspace(-1, 1, 2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    mask = torch.zeros(2, 1, 4, 4)
    mask[0, :, :2] = 1
    cut = masks.masked(pixels, mask, 0.25)
    assert (cut[0, :, :2] == 0.25).all()
    assert torch.equal(cut[0, :, 2:], pixels[0, :, 2:]) and torch.equal(cut[1], pixels[1])


# In batches


def loader(path, options, *, cached=True, seed=7, **settings):
    """Batches of pictures in two buckets; cached or not."""
    if not path.exists():
        folder(path, 7)
    made = module(data(path, **({"batch_size": 2} | settings)), seed=seed, inpaint=options)
    if cached:
        made.fill_cache(CountingEncoder(), images=True, prompts=True)
    return made


def epoch(made, number):
    train = made.train_dataloader()
    train.load_state_dict({"epoch": number, "delivered": 0})
    return list(train)


def by_sample(batches):
    return {int(i): row for batch in batches for i, row in zip(batch.index, batch.mask)}


@pytest.mark.parametrize("workers", [0, 2])
def test_masks_differ_from_epoch_to_epoch_and_from_seed_to_seed_but_not_otherwise(tmp_path, workers):
    options = Inpaint(whole=0)
    made = loader(tmp_path / "photos", options, workers=workers)
    first, again, second = epoch(made, 0), epoch(made, 0), epoch(made, 1)
    assert all(map(same, first, again))
    other_seed = epoch(loader(tmp_path / "photos", options, seed=8), 0)
    for others in (second, other_seed):
        one, two = by_sample(first), by_sample(others)
        assert len(one) == 7 and all(not torch.equal(one[index], two[index]) for index in one)
    uncached = epoch(loader(tmp_path / "photos", options, cached=False), 0)
    assert all(torch.equal(a.mask, b.mask) for a, b in zip(first, uncached, strict=True))


def test_generated_masks_come_with_the_pixels_they_hide_beside_cached_latents(tmp_path):
    for batch in epoch(loader(tmp_path / "photos", Inpaint()), 0):
        h, w = batch.target_size[0].tolist()
        assert batch.mask.shape == (len(batch.index), 1, h, w) and batch.mask.dtype == torch.float32
        assert batch.pixels.shape[1:] == (3, h, w) and batch.masked is None
        assert torch.equal(batch.latents, torch.nn.functional.avg_pool2d(batch.pixels, 4))


def test_a_loader_stopped_within_an_epoch_goes_on_with_the_same_masks(tmp_path):
    made = loader(tmp_path / "photos", Inpaint())
    whole = epoch(made, 2)
    resumed = made.train_dataloader()
    resumed.load_state_dict({"epoch": 2, "delivered": 3})
    assert all(map(same, list(resumed), whole[3:]))


def test_the_masks_of_held_out_images_never_change(tmp_path):
    made = loader(tmp_path / "photos", Inpaint(whole=0), validation_share=0.5)
    first, second = list(made.val_dataloader()), list(made.val_dataloader())
    assert first and all(map(same, first, second))
    assert all(0 < batch.mask.mean() < 1 for batch in first)


def test_without_inpainting_there_are_no_masks_and_no_pixels_beside_latents(tmp_path):
    for batch in epoch(loader(tmp_path / "photos", None), 0):
        assert batch.mask is None and batch.masked is None and batch.pixels is None


def with_files(path):
    """Pictures with masks: the upper third of each."""
    folder(path, 4)
    for number in range(4):
        with Image.open(path / f"{number}.png") as image:
            mask = Image.new("L", image.size)
        mask.paste(255, (0, 0, mask.width, mask.height // 3))
        mask.save(path / f"{number}-masklabel.png")


def test_masks_that_never_change_are_cached_with_their_images(tmp_path):
    path = tmp_path / "photos"
    with_files(path)
    made = loader(path, Inpaint(masks=MaskSource.files, fill=0.5))
    assert made.caches_masked
    for batch in epoch(made, 0):
        assert batch.pixels is None
        whole = torch.stack(
            [images.pixels(path / f"{int(i)}.png", view(batch, row), "white") for row, i in enumerate(batch.index)]
        )
        hidden = masks.masked(whole, batch.mask, 0.5)
        assert torch.equal(batch.masked, torch.nn.functional.avg_pool2d(hidden, 4))
        assert 0.3 < batch.mask.mean() < 0.36


def view(batch, row):
    return centred(Size(*batch.original_size[row].tolist()), Size(*batch.target_size[row].tolist()))


def test_what_of_the_masked_images_is_made_anew_when_something_changes(tmp_path):
    path = tmp_path / "photos"
    with_files(path)

    def made(fill=0.0):
        encoder = CountingEncoder()
        module(data(path), inpaint=Inpaint(masks=MaskSource.files, fill=fill)).fill_cache(
            encoder, images=True, prompts=False
        )
        return encoder.images

    assert made() == 8  # every image, and every image with its hole
    assert made() == 0
    Image.new("L", (64, 64), 255).save(path / "1-masklabel.png")
    assert made() == 1
    assert made(fill=-1.0) == 4


def test_a_file_s_mask_beside_generated_ones_is_encoded_at_train_time(tmp_path):
    path = tmp_path / "photos"
    with_files(path)
    (path / "3-masklabel.png").unlink()
    made = loader(path, Inpaint(whole=0))
    assert not made.caches_masked
    one, two = by_sample(epoch(made, 0)), by_sample(epoch(made, 1))
    assert [torch.equal(one[index], two[index]) for index in range(4)] == [True, True, True, False]
    assert all(batch.pixels is not None and batch.masked is None for batch in epoch(made, 0))
