import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from otl.config import Broken, CaptionOptions, Concept, ConceptType, SettingsError
from otl.datamodules import files
from otl.datamodules.bucketed import BucketedDataModule
from tests.datamodules.fakes import CountingEncoder, data, folder, module, picture


def fill(path: Path, encoder: CountingEncoder | None = None, resolution: int = 64, **settings: Any) -> CountingEncoder:
    """Fill the cache and return the encoder that counted."""
    encoder = encoder or CountingEncoder()
    module(data(path, **settings), resolution=resolution).fill_cache(encoder, images=True, prompts=True)
    return encoder


@pytest.fixture
def photos(tmp_path) -> Path:
    """Seven images and captions, all in the cache."""
    encoder = fill(folder(tmp_path / "photos", 7))
    assert encoder.images == 7 and len(encoder.prompts) == 7
    return tmp_path / "photos"


# The scan


def test_every_reason_and_file_is_in_the_error(tmp_path):
    picture(tmp_path / "a.png", caption=None)
    for number in range(12):
        picture(tmp_path / f"b{number:02d}.png").write_bytes(b"")
    with pytest.raises(SettingsError) as caught:
        module(data(tmp_path))
    message = str(caught.value)
    assert "data.missing_captions" in message and "data.broken_images" in message and "a.png" in message
    assert "b09.png" in message and "b10.png" not in message and "2 more: task=plan lists all in plan.json" in message


def test_a_second_setup_does_not_scan_again(photos):
    made = module(data(photos))
    samples = made.samples
    made.setup("fit")
    made.setup("validate")
    assert made.samples is samples


def test_held_out_images_are_not_trained_on(tmp_path):
    made = module(data(folder(tmp_path / "photos", 30), validation_share=0.3))
    assert len(made.samples) + len(made.validation_samples) == 30
    assert len(made.layout.places) == len(made.samples)
    assert len(made.validation_layout.places) == len(made.validation_samples) > 0


def test_images_at_several_resolutions_are_served_and_cached_at_each(photos):
    made = module(data(photos, resolution=[64, 128], validation_share=0.0))
    encoder = CountingEncoder()
    made.fill_cache(encoder, images=True, prompts=True)
    assert (len(made.samples), encoder.images) == (14, 7)  # those of 64 pixels were there
    sides = {tuple(batch.target_size[0].tolist()) for batch in made.train_dataloader()}
    assert len(sides) == 4
    assert all(tuple(b.latents.shape[2:]) == tuple((b.target_size[0] // 4).tolist()) for b in made.train_dataloader())


def test_a_dataset_of_which_nothing_is_left_is_refused(photos):
    with pytest.raises(SettingsError, match=r"no image is left to train on: change data\.min_side"):
        module(data(photos, min_side=65))


def test_batches_are_counted_for_each_rank(photos):
    made = module(data(photos, batch_size=2))
    assert made.batches_per_epoch() == 4  # five square images and two tall ones
    assert made.batches_per_epoch(world_size=3) == 2


@pytest.mark.parametrize("validating", [False, True])
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_each_batch_counts_once_on_however_many_ranks(tmp_path, validating, ranks):
    """Seven images in batches of two and one, trained on or held out; a rank has as many batches as every other."""
    held = {"held": Concept(path=str(folder(tmp_path / "held", 7)), type=ConceptType.validation)}
    made = module(data(folder(tmp_path / "photos", 7), batch_size=2, concepts=held))
    counted, lengths = [], set()
    for rank in range(ranks):
        there = SimpleNamespace(root_device=torch.device("cpu"))
        made.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, validating=validating, strategy=there)
        batches = list(made.val_dataloader() if validating else made.train_dataloader())
        counted += [index for k, batch in enumerate(batches) if not made.fills(k) for index in batch.index.tolist()]
        lengths.add(len(batches))
    assert sorted(counted) == list(range(7))
    assert len(lengths) == 1


def test_a_concept_holds_out_its_own_share(tmp_path):
    folder(tmp_path / "photos", 30)
    for number in range(30):
        picture(tmp_path / "dogs" / f"{number}.png", shade=number * 7)
    concepts = {"dogs": Concept(path=str(tmp_path / "dogs"), validation_share=0.5)}
    made = module(data(tmp_path / "photos", concepts=concepts))
    assert {sample.concept for sample in made.validation_samples} == {"dogs"}
    assert 5 < len(made.validation_samples) < 25


def noisy(path: Path) -> Path:
    noise = torch.randint(256, (64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture(path)
    Image.fromarray(noise.numpy()).save(path)
    return path


def damaged_inside(path: Path) -> Path:
    """Noise, whose header and end are whole."""
    content = noisy(path).read_bytes()
    path.write_bytes(content[:6000] + bytes(40) + content[6040:])
    return path


def test_every_image_is_decoded_before_the_run_where_that_is_set(tmp_path):
    damaged_inside(folder(tmp_path / "photos", 3) / "inside.png")
    module(data(tmp_path / "photos"))
    with pytest.raises(SettingsError, match=r"(?s)data\.broken_images.*inside\.png"):
        module(data(tmp_path / "photos", verify_images=True))


@pytest.mark.parametrize("cached", [True, False])
def test_an_image_that_is_damaged_inside_is_named_and_left_out_where_broken_ones_are(tmp_path, cached):
    damaged_inside(folder(tmp_path / "photos", 3) / "inside.png")
    made = module(data(tmp_path / "photos", broken_images=Broken.skip))
    if cached:
        made.fill_cache(CountingEncoder(), images=True, prompts=True)
    assert sum(len(batch.index) for batch in made.train_dataloader()) == len(made.samples) == 3
    assert "inside.png" in str(made.problems)


def test_images_that_were_decoded_are_decoded_again_when_they_have_changed(tmp_path, monkeypatch):
    """Even where length and time of modification are as they were; and not otherwise."""
    monkeypatch.setattr(files, "tick", lambda _: -1)  # whatever is there is old enough to be known
    path = noisy(folder(tmp_path / "photos", 2) / "0.png")
    skipped = data(tmp_path / "photos", broken_images=Broken.skip)
    assert len(module(skipped).samples) == 2
    with monkeypatch.context() as patched:
        patched.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded again"))
        assert len(module(skipped).samples) == 2
    before = path.stat()
    damaged_inside(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    made = module(skipped)
    assert [sample.name for sample in made.samples] == ["1.png"] and "0.png" in str(made.problems)


def test_damage_that_will_not_be_found_is_said(tmp_path):
    folder(tmp_path / "photos", 1)
    made = module(data(tmp_path / "photos", broken_images=Broken.skip, verify_images=False))
    assert [problem.key for problem in made.problems] == ["data.verify_images"]


# The cache


@pytest.mark.parametrize("room", [True, False])
def test_room_for_all_that_is_still_to_be_encoded_is_asked_for_after_the_first_batch(tmp_path, monkeypatch, room):
    """Of 16 pixels the encoder makes 3 fp32 numbers; two of seven images are there already."""
    for number in range(7):
        picture(tmp_path / f"photos/{number}.png", shade=number)
        if number == 1:
            fill(tmp_path / "photos")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=5 * 64 * 64 * 3 * 4 // 16 - (not room)))
    encoder = CountingEncoder()
    with nullcontext() if room else pytest.raises(SettingsError, match=r"cache: 5 images .* need 15 kB, and 15 kB are"):
        fill(tmp_path / "photos", encoder, encode_batch_size=1)
    assert encoder.images == (5 if room else 1)


def test_so_is_room_for_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=7 * 12 - 1))  # 3 fp32 numbers of each
    made, encoder = module(data(folder(tmp_path / "photos", 7))), CountingEncoder()
    with pytest.raises(SettingsError, match=r"cache: 7 captions that it has not yet need 0 kB"):
        made.fill_cache(encoder, images=False, prompts=True)


def test_a_full_cache_needs_no_encoding(photos):
    encoder = fill(photos)
    assert encoder.images == 0 and encoder.prompts == []


def test_a_changed_image_is_encoded_again_alone(photos):
    picture(photos / "3.png", shade=200, caption=None)
    encoder = fill(photos)
    assert encoder.images == 1 and encoder.prompts == []


def test_a_renamed_image_is_not_encoded_again(photos):
    (photos / "3.png").rename(photos / "z.png")
    (photos / "3.txt").rename(photos / "z.txt")
    assert fill(photos).images == 0


def test_a_changed_caption_is_encoded_again_alone(photos):
    (photos / "3.txt").write_text("something else")
    encoder = fill(photos)
    assert encoder.images == 0 and encoder.prompts == ["something else"]


def test_another_image_encoder_makes_all_latents_again_and_no_captions(photos):
    encoder = fill(photos, CountingEncoder(image="other weights"))
    assert encoder.images == 7 and encoder.prompts == []


def test_another_dtype_of_the_text_encoder_makes_all_captions_again_and_no_latents(photos):
    encoder = fill(photos, CountingEncoder(prompt="clip in bf16"))
    assert encoder.images == 0 and len(encoder.prompts) == 7


def test_another_resolution_makes_all_latents_again_and_no_captions(photos):
    encoder = fill(photos, resolution=128)
    assert encoder.images == 7 and encoder.prompts == []
    assert fill(photos).images == 0  # those of the first are still there


def test_without_buckets_only_images_that_are_cut_otherwise_are_made_again(photos):
    """Five of the seven are square already."""
    assert fill(photos, buckets=False).images == 2


def test_dropout_adds_the_empty_caption_alone(photos):
    assert fill(photos, caption_dropout=0.1).prompts == [""]


def test_each_caption_is_encoded_as_often_as_there_are_variants(tmp_path):
    picture(tmp_path / "photos" / "a.png", caption="a, b, c, d, e")
    picture(tmp_path / "photos" / "b.png", shade=9, caption="f")
    options = {"captions": CaptionOptions(shuffle=True), "caption_variants": 5}
    prompts = fill(tmp_path / "photos", **options).prompts
    assert len(prompts) == 5 + 1
    assert {"".join(sorted(prompt)).strip(", ") for prompt in prompts} == {"abcde", "f"}
    assert fill(tmp_path / "photos", **options).prompts == []


def test_equal_images_and_captions_are_encoded_once(tmp_path):
    for number in range(5):
        picture(tmp_path / "photos" / f"{number}.png")
    encoder = fill(tmp_path / "photos")
    assert encoder.images == 1 and encoder.prompts == ["a picture"]


def test_what_a_truncated_shard_held_is_made_again_and_nothing_else(photos):
    """Two tall pictures, five square ones, and seven captions."""
    shards = sorted((photos.parent / "cache").glob("*.safetensors"), key=lambda path: path.stat().st_size)
    assert len(shards) == 3
    made = []
    for path in shards:
        path.write_bytes(path.read_bytes()[:-7])
        encoder = fill(photos)
        made.append((encoder.images, len(encoder.prompts)))
    assert sorted(made) == [(0, 7), (2, 0), (5, 0)]


def test_images_are_encoded_in_batches_of_one_bucket(tmp_path):
    encoder = fill(folder(tmp_path / "photos", 7), encode_batch_size=3)
    assert sorted(encoder.batches) == [2, 2, 3]


def test_progress_counts_images_and_captions(tmp_path):
    shown: dict[str, int] = {}

    def progress(items: Iterable[Any], what: str, count: int) -> Iterator[Any]:
        for item in items:
            shown[what] = shown.get(what, 0) + 1
            yield item
        assert shown[what] == count

    made = module(data(folder(tmp_path / "photos", 7)))
    made.fill_cache(CountingEncoder(), images=True, prompts=True, progress=progress)
    assert shown["images into the cache"] == shown["captions into the cache"] == 7


class Interrupted(CountingEncoder):
    """Ctrl-C in the third batch."""

    def encode_image(self, pixels: Tensor) -> Tensor:
        if len(self.batches) == 2:
            raise KeyboardInterrupt
        return super().encode_image(pixels)


def test_what_was_encoded_before_an_interruption_is_kept(tmp_path):
    path = folder(tmp_path / "photos", 7)
    with pytest.raises(KeyboardInterrupt):
        fill(path, Interrupted(), encode_batch_size=2)
    assert fill(path).images == 3


def test_an_image_broken_inside_is_named(tmp_path):
    path = picture(tmp_path / "photos" / "a.png")
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 6] ^= 255
    path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"a\.png: cannot be decoded"):
        fill(tmp_path / "photos")


def fill_and_leave(path: Path) -> None:
    """In a process of its own: leaves with success if the whole cache can be read afterwards."""
    torch.set_num_threads(1)  # as DataLoader's workers do: OpenMP does not survive a fork
    made = module(data(path, batch_size=2, encode_batch_size=1))
    made.fill_cache(CountingEncoder(), images=True, prompts=True)
    os._exit(0 if len(list(made.train_dataloader())) == 4 else 1)


def test_two_runs_fill_one_folder(tmp_path):
    path = folder(tmp_path / "photos", 7)
    runs = [multiprocessing.get_context("fork").Process(target=fill_and_leave, args=(path,)) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(30)
        run.kill()
    assert [run.exitcode for run in runs] == [0, 0]
    files = [each.name for each in (tmp_path / "cache").iterdir() if each.is_file()]  # two buckets and the captions
    assert 3 <= len(files) <= 6 and all(name.endswith(".safetensors") for name in files)


@pytest.mark.parametrize(("shared", "made"), [(True, [(4, 3), (3, 4)]), (False, [(7, 7), (7, 7)])])
def test_ranks_share_the_work(tmp_path, shared, made):
    """Each of two makes its half of what is missing, whichever is faster, and the rest where it has a folder alone."""
    path, together = folder(tmp_path / "photos", 7), threading.Barrier(2)
    encoders = [CountingEncoder(), CountingEncoder()]

    def run(rank: int) -> None:
        each = module(data(path, cache_dir=str(tmp_path / f"cache{0 if shared else rank}")))
        strategy = SimpleNamespace(barrier=lambda name: together.wait(60))
        each.trainer = SimpleNamespace(global_rank=rank, world_size=2, strategy=strategy)
        each.fill_cache(encoders[rank], images=True, prompts=True)

    with ThreadPoolExecutor() as pool:
        list(pool.map(run, range(2)))
    assert [(encoder.images, len(encoder.prompts)) for encoder in encoders] == made


def test_a_thousand_headers_take_a_moment(tmp_path):
    """Headers only: a thousand pictures of 1.4 megapixels would take half a minute to decode on one core."""
    first = picture(tmp_path / "0.jpg", h=1000, w=1400)
    for number in range(1, 1000):
        os.link(first, tmp_path / f"{number}.jpg")
    begun = time.perf_counter()
    made = BucketedDataModule(data(tmp_path, prompt="x"), resolution=64, step=8, seed=7)
    made.setup("fit")
    assert len(made.samples) == 1000
    assert time.perf_counter() - begun < 5
