"""What is shown of images, from the settings to the batches."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from PIL import Image

from otl import loss
from otl.config import Augment, Concept, ConceptType, Inpaint, MaskSource, OwnAugment
from otl.datamodules import images, masks
from otl.datamodules.bucketed import BucketedDataModule
from tests.datamodules.fakes import CountingEncoder, data, same

EVERYTHING = Augment(0.5, 15.0, 0.2, 0.2, 0.2, 20.0, 1.0, 0.3, 3.0, 1.1, 0.9, 1.2, 5.0)
LUMA = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
GEOMETRY = Augment(flip=0.5, rotation=15.0, crop_jitter=1.0, resize_jitter=0.3)


@pytest.fixture
def photos(tmp_path):
    """Five pictures in two buckets, different everywhere, with a mask each."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        generator = torch.Generator().manual_seed(number)
        h = 140 if number % 3 == 2 else 70
        smooth = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4, generator=generator), (h, 72), mode="bicubic")
        image = Image.fromarray((smooth[0].clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())
        image.save(folder / f"{number}.png")
        image.convert("L").point(lambda level: 255 * (level > 128)).save(folder / f"{number}-masklabel.png")
        (folder / f"{number}.txt").write_text("x")
    return folder


def made(photos, augment=EVERYTHING, *, cached=False, seed=7, inpaint=None, hides=True, **settings):
    settings = {"batch_size": 2, "augment": augment, "cache": cached} | settings
    found = BucketedDataModule(
        replace(data(photos), **settings), resolution=64, step=8, seed=seed, inpaint=inpaint, hides=hides
    )
    found.setup("fit")
    if cached:
        found.fill_cache(CountingEncoder(), images=True, prompts=True)
    return found


def epoch(module, number=0):
    train = module.train_dataloader()
    train.load_state_dict({"epoch": number, "delivered": 0})
    return list(train)


def by_sample(batches, name="pixels"):
    return {int(i): row for batch in batches for i, row in zip(batch.index, getattr(batch, name))}


def pixels(batch):
    return torch.nn.functional.avg_pool2d(batch.pixels, 4) if batch.latents is None else batch.latents


# Without a cache


def test_without_a_cache_an_image_looks_different_each_epoch_and_for_each_seed(photos):
    of = made(photos)
    first, again, second = (by_sample(epoch(of, number)) for number in (0, 0, 1))
    other = by_sample(epoch(made(photos, seed=8)))
    assert len(first) == 5
    for index, shown in first.items():
        assert torch.equal(shown, again[index])
        assert not torch.equal(shown, second[index]) and not torch.equal(shown, other[index])


@pytest.mark.parametrize("cached", [False, True])
def test_the_number_of_workers_changes_nothing(photos, cached):
    alone, helped = (made(photos, cached=cached, workers=n, image_variations=2) for n in (0, 2))
    assert all(same(a, b) for a, b in zip(epoch(alone, 3), epoch(helped, 3), strict=True))


@pytest.mark.parametrize("cached", [False, True])
def test_a_loader_stopped_within_an_epoch_goes_on_with_the_same_views(photos, cached):
    of = made(photos, cached=cached, image_variations=3)
    whole, resumed = epoch(of, 2), of.train_dataloader()
    resumed.load_state_dict({"epoch": 2, "delivered": 2})
    assert all(map(same, list(resumed), whole[2:]))


@pytest.mark.parametrize("name", [field for field in Augment.__dataclass_fields__])
def test_each_setting_reaches_the_pixels(photos, name):
    alone = replace(Augment(), **{name: getattr(EVERYTHING, name)})
    plain, changed = (by_sample(epoch(made(photos, augment))) for augment in (Augment(), alone))
    assert any(not torch.equal(plain[index], changed[index]) for index in plain)


def test_a_concept_sets_what_it_wants_to_differ(photos):
    def crops(own):
        concepts = {"own": Concept(path=str(photos), augment=own), "other": Concept(path=str(photos), prompt="y")}
        common = Augment(crop_jitter=1.0, fixed_brightness=1.5)
        found = made(photos, common, path=None, concepts=concepts)
        by_name = {"own": [], "other": []}
        for number in range(3):
            for batch in epoch(found, number):
                for index, crop, shown in zip(batch.index, batch.crop, batch.pixels):
                    by_name[found.samples[index].concept].append((tuple(crop.tolist()), shown.mean()))
        return by_name

    still, moving = crops(OwnAugment(crop_jitter=0.0)), crops(OwnAugment())
    assert len({crop for crop, _ in still["own"]}) == 2  # one for each bucket
    assert len({crop for crop, _ in still["other"]}) > 3 < len({crop for crop, _ in moving["own"]})
    dark = crops(OwnAugment(fixed_brightness=0.5))
    assert max(mean for _, mean in dark["own"]) < min(mean for _, mean in dark["other"])


def test_crop_conditioning_is_that_of_the_mirrored_image(photos):
    """The crop of 70 x 72 in 64 x 64 leaves 66 - 64 = 2 columns."""
    off, on = (by_sample(epoch(made(photos, Augment(flip=flip, crop_jitter=1.0))), "crop") for flip in (0.0, 1.0))
    columns = {index: (int(off[index][1]), int(on[index][1])) for index in (0, 1, 3, 4)}
    assert all(left + mirrored == 2 for left, mirrored in columns.values())
    assert {left for left, _ in columns.values()} != {1}
    assert all(off[index][0] == on[index][0] for index in off)


def test_a_crop_that_is_turned_beyond_the_image_begins_at_its_edge(photos):
    of = made(photos, Augment(fixed_rotation=90.0, crop_jitter=1.0))
    assert min(of.variations.fresh(2, key).crop.top for key in range(20)) < 0
    turned = [batch.crop for number in range(8) for batch in epoch(of, number)]
    assert torch.cat(turned).min() == 0


# With a cache


def test_every_variation_is_cached_and_they_come_by_turns(photos):
    of = made(photos, cached=True, image_variations=3)
    shown = [by_sample(epoch(of, number), "latents") for number in range(6)]
    for index in range(5):
        seen = [shown[number][index] for number in range(6)]
        for first in (0, 3):
            three = seen[first : first + 3]
            assert not any(torch.equal(three[one], three[one - 1]) for one in range(3))
        assert all(any(torch.equal(later, early) for early in seen[:3]) for later in seen[3:])


def test_repeats_within_an_epoch_are_different_variations(photos):
    concepts = {"own": Concept(path=str(photos), repeats=2)}
    of = made(photos, cached=True, image_variations=2, path=None, concepts=concepts)
    rows = [(int(i), row) for batch in epoch(of, 1) for i, row in zip(batch.index, batch.latents)]
    assert len(rows) == 10
    for index in range(5):
        one, two = (row for i, row in rows if i == index)
        assert not torch.equal(one, two)


def test_what_is_cached_is_what_the_batch_says_of_it(photos):
    of = made(photos, GEOMETRY, cached=True, image_variations=2)
    for batch in epoch(of, 4):
        for row, index in enumerate(batch.index):
            mark = int(of.train_cached.marks[int(index)])
            views = of.variations.kept(int(index), mark)
            shown = [images.pixels(of.samples[index].path, view, "white") for view in views]
            latents = [torch.nn.functional.avg_pool2d(each, 4) for each in shown]
            (number,) = (n for n, each in enumerate(latents) if torch.equal(each, batch.latents[row]))
            assert list(views[number].crop) == batch.crop[row].tolist()


def test_variations_depend_on_the_seed_and_on_content_and_not_on_what_else_there_is(photos):
    def encoded(**settings):
        encoder, found = CountingEncoder(), made(photos, **({"image_variations": 2} | settings))
        found.fill_cache(encoder, images=True, prompts=False)
        return encoder.images

    assert (encoded(), encoded()) == (10, 0)
    Image.new("RGB", (72, 70), "red").save(photos / "0a.png")
    (photos / "0a.txt").write_text("x")
    (photos / "4.png").rename(photos / "9.png")
    (photos / "4.txt").rename(photos / "9.txt")
    (photos / "4-masklabel.png").unlink()
    assert encoded() == 2
    assert encoded(seed=8) == 12
    assert encoded(augment=Augment(fixed_brightness=1.2), image_variations=1) == 6


def test_images_that_do_not_vary_are_cached_once(photos):
    concepts = {
        "still": Concept(path=str(photos), augment=OwnAugment(flip=0.0)),
        "moving": Concept(path=str(photos), prompt="y"),
    }
    encoder = CountingEncoder()
    found = made(photos, Augment(flip=0.5), path=None, concepts=concepts, image_variations=2)
    found.fill_cache(encoder, images=True, prompts=False)
    assert encoder.images == 10  # of each image the mirrored one and the other, one of which is that of `still`


@pytest.mark.parametrize("cached", [False, True])
def test_held_out_images_are_shown_as_they_are_but_for_what_is_fixed(photos, cached):
    def validation(augment):
        concepts = {"held": Concept(path=str(photos), type=ConceptType.validation), "more": Concept(path=str(photos))}
        found = made(photos, augment, cached=cached, path=None, concepts=concepts, image_variations=2)
        return [pixels(batch) for batch in found.val_dataloader()]

    plain, random, fixed = map(validation, (Augment(), replace(Augment(), flip=0.5, hue=30), Augment(fixed_hue=30)))
    assert all(torch.equal(a, b) for a, b in zip(plain, random, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(plain, fixed, strict=True))


def test_cached_masks_follow_the_variation_of_their_image(photos):
    """The mask is where the picture is bright; its colours stay as they are."""
    options = Inpaint(masks=MaskSource.files, fill=1.0)
    of = made(photos, GEOMETRY, cached=True, image_variations=2, inpaint=options)
    assert of.caches_masked
    for batch in epoch(of, 1) + epoch(of, 2):
        masked = torch.nn.functional.avg_pool2d(batch.mask, 4) == 1
        free = torch.nn.functional.avg_pool2d(batch.mask, 4) == 0
        assert 0.05 < masked.float().mean() < 0.95
        assert torch.equal(batch.masked[masked.expand_as(batch.masked)], torch.ones(int(masked.sum()) * 3))
        assert torch.equal(batch.masked[free.expand_as(batch.masked)], batch.latents[free.expand_as(batch.masked)])


WHOLE = Inpaint(boxes=0.0, brushes=0.0, ellipses=0.0, whole=1.0)  # where masks weigh the loss and there is none


def weights(batch):
    return loss.position_weights(batch.mask, tuple(batch.latents.shape[-2:]), unmasked=0.0, normalize=False)


def test_cached_masks_of_a_loss_weigh_as_those_from_files_do(photos):
    (photos / "3-masklabel.png").unlink()
    of = made(photos, GEOMETRY, cached=True, image_variations=2, inpaint=WHOLE, hides=False, validation_share=0.3)
    for loader, variations, cached in (
        (epoch(of, 1) + epoch(of, 2), of.variations, of.train_cached),
        (list(of.val_dataloader()), of.validation_variations, of.validation_cached),
    ):
        assert loader and all(batch.mask.shape[-2:] == batch.latents.shape[-2:] for batch in loader)
        for batch in loader:
            for row, index in enumerate(batch.index.tolist()):
                sample, mark = variations.samples[index], int(cached.marks[index])
                views = [v for v in variations.kept(index, mark) if tuple(v.crop) == tuple(batch.crop[row].tolist())]
                own = [masks.mask(sample, view, 0, WHOLE, soft=True)[None] for view in views]
                at = tuple(batch.latents.shape[-2:])
                own = [loss.position_weights(each, at, unmasked=0.0, normalize=False)[0] for each in own]
                assert any(torch.equal(each, weights(batch)[row]) for each in own)
    greys = torch.cat([weights(batch).flatten() for batch in epoch(of, 1)])
    assert 0 < greys.mean() < 1


def test_only_the_masks_that_change_are_made_anew(photos):
    def encoded():
        encoder, found = CountingEncoder(), made(photos, GEOMETRY, inpaint=WHOLE, hides=False, image_variations=2)
        found.fill_cache(encoder, images=True, prompts=False)
        entries = found.train_cached.weights
        return encoder.images, [entries.read([number])["mask"] for number in range(len(entries))]

    made_first, before = encoded()
    Image.new("L", (72, 70), 255).save(photos / "1-masklabel.png")
    made_again, after = encoded()
    assert (made_first, made_again) == (10, 0)
    changed = [number for number in range(10) if not torch.equal(before[number], after[number])]
    assert changed == [2, 3] and all(after[number].min() == 1 for number in changed)


def test_a_mask_beside_pixels_lies_over_them(photos):
    of = made(photos, GEOMETRY, inpaint=Inpaint(masks=MaskSource.files))
    for batch in epoch(of):
        bright = (batch.pixels * LUMA).sum(1, keepdim=True)
        clear = bright.abs() > 0.1
        assert (batch.mask[clear] == (bright[clear] > 0)).float().mean() > 0.98
