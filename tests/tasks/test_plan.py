"""What a plan says, against published numbers and counts by hand."""

import json
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
from PIL import Image

from otl.config import SettingsError
from otl.tasks import memory, plan
from otl.types import Size


@pytest.fixture
def photos(tmp_path):
    """Five wide, three square and one tall picture, and a file that is none."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for kind, size, count in (("wide", (96, 64), 5), ("square", (64, 64), 3), ("tall", (64, 96), 1)):
        for number in range(count):
            Image.new("RGB", size, (number * 20, 0, 0)).save(folder / f"{kind}{number}.png")
            (folder / f"{kind}{number}.txt").write_text("a picture")
    (folder / "broken.png").write_bytes(b"not a picture")
    return folder


def made(settings, sd15_folder, photos, *overrides):
    return plan.make(
        settings(
            f"model.checkpoint={sd15_folder}",
            f"data.path={photos}",
            "data.resolution=64",
            "data.broken_images=skip",
            "data.batch_size=2",
            "logger=none",
            *overrides,
        )
    )[0]


def test_nothing_is_dropped_by_default_and_the_broken_file_is_named(settings, sd15_folder, photos):
    got = made(settings, sd15_folder, photos)
    assert (got["images_total"], got["images_used"], got["images_dropped"]) == (10, 9, 1)
    assert [row["path"] for row in got["images"] if row["dropped"]] == [str(photos / "broken.png")]
    assert sorted((b["images"], b["batches"]) for b in got["buckets"]) == [(1, 1), (3, 2), (5, 3)]
    assert got["steps_per_epoch"] == 6


@pytest.mark.parametrize(
    ("line", "of_trained"),
    [
        ([], 1),
        (["data.augment.flip=0.5", "data.image_variations=4"], 4),
        (["data.augment.fixed_hue=9"], 1),
        (["data.augment.flip=0.5", "data.cache=false"], 0),
    ],
)
def test_variations_are_counted_of_what_varies(settings, sd15_folder, photos, line, of_trained):
    got = made(settings, sd15_folder, photos, "data.validation_share=0.5", *line)
    held_out = got["images_validation"]
    assert 0 < held_out < 9
    assert got["images_cached"] == (9 - held_out) * of_trained + (held_out if of_trained else 0)


def test_dropping_is_counted_and_a_bucket_below_a_batch_names_its_images(settings, sd15_folder, photos):
    """{5, 3, 1} in batches of 2 keeps 6 of 9 in 3 steps."""
    got = made(settings, sd15_folder, photos, "data.partial_batches=drop")
    assert (got["images_used"], got["images_dropped"], got["steps_per_epoch"]) == (6, 4, 3)
    never = {row["path"] for row in got["images"] if row["dropped"]}
    assert never == {str(photos / "broken.png"), str(photos / "tall0.png")}


@pytest.mark.parametrize(("devices", "steps"), [("2", 3), ("[0,1,2,3]", 2)])
def test_ranks_share_the_batches_of_an_epoch(settings, sd15_folder, photos, devices, steps):
    """6 batches."""
    got = made(settings, sd15_folder, photos, f"trainer.devices={devices}", "trainer.accelerator=cpu")
    assert (got["steps_per_epoch"], got["images_used"]) == (steps, 9)


def test_padding_says_which_images_are_seen_again(settings, sd15_folder, photos):
    got = made(settings, sd15_folder, photos, "data.partial_batches=pad")
    assert (got["images_used"], got["steps_per_epoch"]) == (9, 6)
    reasons = {row["reason"] for row in got["images"] if not row["dropped"]}
    assert reasons == {"1 of the bucket's images are seen once more each epoch"}


def concept(photos, *fields):
    return [f"data.concepts.more.{field}" for field in (f"path={photos}", *fields)]


def test_concepts_say_how_many_images_an_epoch_shows(settings, sd15_folder, photos):
    """Nine images once and nine images two and a half times."""
    got = made(settings, sd15_folder, photos, *concept(photos, "repeats=2.5", "loss_weight=0.5"))
    assert [tuple(row.values()) for row in got["concepts"]] == [
        ("data", "train", 9, 9, round(9 / 31.5, 4), 1.0),
        ("more", "train", 9, 22.5, round(22.5 / 31.5, 4), 0.5),
    ]
    assert sorted(Counter(row["repeats"] for row in got["images"] if not row["dropped"]).items()) == [(1, 9), (2.5, 9)]


def test_images_that_have_their_turn_in_later_epochs_are_not_dropped(settings, sd15_folder, photos):
    """A third of nine images, one at a time."""
    got = made(settings, sd15_folder, photos, "data.path=null", "data.batch_size=1", *concept(photos, "samples=3"))
    counts = ("images_total", "images_used", "images_waiting", "images_dropped", "steps_per_epoch")
    assert [got[key] for key in counts] == [10, 3, 6, 1, 3]


def test_images_are_counted_once_at_several_resolutions_and_those_left_out_are_named(settings, sd15_folder, photos):
    """Three squares of nine are left, and each is shown at 64 and 128 pixels in batches of two."""
    got = made(settings, sd15_folder, photos, "data.resolution=[64,128]", "data.max_aspect=1.25")
    assert (got["resolutions"], got["resolution"]) == ([64, 128], 128)
    assert [(row["height"], row["images"], row["batches"]) for row in got["buckets"]] == [(64, 3, 2), (128, 3, 2)]
    assert (got["images_total"], got["images_used"], got["images_dropped"]) == (10, 3, 7)
    reasons = Counter(row["reason"] for row in got["images"] if row["dropped"])
    assert reasons["its longer side is 1.50 times the other"] == 6
    assert [row["images"] for row in got["concepts"]] == [3] and [row["seen"] for row in got["concepts"]] == [6]


def test_a_dataset_of_which_nothing_is_left_is_refused(settings, sd15_folder, photos):
    lines = [f"model.checkpoint={sd15_folder}", f"data.path={photos}", "data.broken_images=skip", "logger=none"]
    got, problems = plan.make(settings(*lines, "data.min_side=1000"))
    (fatal,) = [problem for problem in problems if problem.fatal]
    assert fatal.message == "no image is left to train on: change data.min_side, or add larger images"
    assert (got["images_used"], got["images_dropped"], got["total_steps"]) == (0, 10, 0)


def files(got, about):
    """Of a warning: name of each file and what is said of it."""
    found = [warning["files"] for warning in got["warnings"] if warning["about"] == about]
    return [tuple(file.split("/")[-1].split(": ", 1)) for file in found[0]] if found else []


@pytest.fixture
def awkward(tmp_path):
    """A panorama, a tower, two small ones and a good one."""
    folder = tmp_path / "awkward"
    folder.mkdir()
    for name, size in {
        "pan": (640, 80),
        "tower": (80, 360),
        "tiny": (16, 16),
        "small": (32, 32),
        "good": (64, 64),
    }.items():
        Image.new("RGB", size, (len(name) * 20, 0, 0)).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text("a picture")
    return folder


def test_warnings_name_the_worst_images_first(settings, sd15_folder, awkward):
    """The longest bucket is 4:1: half of 8:1 is cut off, and a ninth of 4.5:1."""
    got = made(settings, sd15_folder, awkward, "data.warn_crop=0.1")
    assert files(got, "hard crops") == [
        ("pan.png", "50% cut off, for bucket 32x128"),
        ("tower.png", "11% cut off, for bucket 128x32"),
    ]
    enlarged = [("tiny.png", "x4.00, for bucket 64x64"), ("small.png", "x2.00, for bucket 64x64")]
    assert files(got, "upscales") == enlarged
    abouts = [warning["about"] for warning in got["warnings"]]
    assert abouts.index("hard crops") < abouts.index("upscales") < abouts.index("small buckets")
    got = made(settings, sd15_folder, awkward, "data.warn_upscale=3")
    assert [name for name, _ in files(got, "hard crops")] == ["pan.png"]
    assert [name for name, _ in files(got, "upscales")] == ["tiny.png"]


def test_held_out_images_have_rows_and_warnings_of_their_own(settings, sd15_folder, photos, awkward):
    held = [f"data.concepts.held.path={awkward}", "data.concepts.held.type=validation"]
    got = made(settings, sd15_folder, photos, *held)
    assert [row["path"].split("/")[-1] for row in got["validation"]] == [
        "good.png",
        "pan.png",
        "small.png",
        "tiny.png",
        "tower.png",
    ]
    assert got["images_validation"] == 5 and len(got["images"]) == 10
    assert [name for name, _ in files(got, "hard crops")] == ["pan.png"]


def test_what_is_seen_again_is_named_by_how_often(settings, sd15_folder, photos, awkward):
    more = [f"data.concepts.more.path={awkward}", "data.concepts.more.repeats=3"]
    again = files(made(settings, sd15_folder, photos, *more), "repeated")
    assert again == [(f"{name}.png", "3 times") for name in ("good", "pan", "small", "tiny", "tower")]
    padded = files(made(settings, sd15_folder, photos, "data.partial_batches=pad"), "repeated")
    assert len(padded) == 3 and {often for _, often in padded} == {"2 times"}  # buckets of five, three and one by two


def test_epochs_become_steps_with_accumulation(settings, sd15_folder, photos):
    got = made(settings, sd15_folder, photos, "trainer.max_epochs=10", "trainer.accumulate_grad_batches=4")
    assert (got["steps_per_epoch"], got["total_steps"]) == (2, 20)


def test_a_missing_caption_is_fatal_and_the_plan_is_still_made(settings, sd15_folder, photos):
    (photos / "wide0.txt").unlink()
    got, problems = plan.make(
        settings(f"model.checkpoint={sd15_folder}", f"data.path={photos}", "data.broken_images=skip", "logger=none")
    )
    assert [problem.key for problem in problems if problem.fatal] == ["data.missing_captions"]
    assert any(row["caption_missing"] and row["path"].endswith("wide0.png") for row in got["images"])


def test_the_plan_is_written_whole(settings, sd15_folder, photos, tmp_path):
    got = made(settings, sd15_folder, photos)
    assert json.loads(plan.write(got, tmp_path).read_text()) == json.loads(json.dumps(got))


@pytest.mark.parametrize(
    ("model", "published"),
    [
        ("sd15", {"unet": 3.44, "text_encoder": 0.49, "vae": 0.33}),
        ("sdxl", {"unet": 10.3, "text_encoder": 0.49, "text_encoder_2": 2.78, "vae": 0.33}),
    ],
)
def test_the_weights_are_as_large_as_published(settings, photos, model, published):
    """GB in fp32, as the models' users are told."""
    got = plan.make(
        settings(
            f"model={model}", f"data.path={photos}", "data.broken_images=skip", "data.resolution=64", "logger=none"
        )
    )[0]
    for row in got["weights"]:
        told = pytest.approx(published[row["part"]], abs=0.05 if row["part"] == "unet" else 0.006)
        assert row["bytes"] / 1e9 == told


@pytest.mark.parametrize(
    ("model", "side", "checkpointing", "gigabytes"),
    [("sd15", 512, False, 0.97), ("sdxl", 1024, False, 7.2), ("sdxl", 1024, True, 0.6)],
)
def test_activations_agree_with_an_independent_count(settings, model, side, checkpointing, gigabytes):
    """GB of one sample in bf16 with fused attention, rank 16: from a per-operator count made without OTL."""
    from otl.tasks.run import build_module

    module = build_module(settings(f"model={model}", f"++model.gradient_checkpointing={checkpointing}", "logger=none"))
    module.build_skeleton()
    got, _ = memory.of_step(module, Size(side, side), 1, dtype=memory.torch.bfloat16)
    assert got / 1e9 == pytest.approx(gigabytes, rel=0.06)


def test_what_keeps_the_run_from_starting_is_said_once(settings, sd15_folder, photos, tmp_path, monkeypatch, capsys):
    """As the error, and not among the warnings as well."""
    (photos / "wide0.txt").unlink()
    monkeypatch.setattr("otl.tasks.plan.run_dir", lambda: tmp_path)
    with pytest.raises(SettingsError, match=r"1 of \d+ images? without a caption"):
        line = [f"model.checkpoint={sd15_folder}", f"data.path={photos}", "data.broken_images=skip", "logger=none"]
        plan.plan(settings(*line), sheet_pages=0)
    assert "without a caption" not in capsys.readouterr().out
    made = json.loads((tmp_path / "plan.json").read_text())
    assert any("without a caption" in warning["message"] for warning in made["warnings"])


def test_a_plan_says_that_the_disk_has_no_room(settings, sd15_folder, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("otl.tasks.plan.run_dir", lambda: tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    line = [f"model.checkpoint={sd15_folder}", f"data.path={photos}", "data.broken_images=skip", "logger=none"]
    with pytest.raises(SettingsError, match=r"^hydra\.run\.dir: .* make room"):
        plan.plan(settings(*line), sheet_pages=0)


def test_a_plan_says_what_the_optimizers_library_refuses(settings, sd15_folder, photos):
    line = [f"model.checkpoint={sd15_folder}", f"data.path={photos}", "logger=none"]
    with pytest.raises(SettingsError, match=r"optimizer: torch\.optim\.AdamW says: .*fused.*foreach"):
        plan.plan(settings(*line, "+optimizer.fused=true", "+optimizer.foreach=true"))
