"""Whole runs of inpainting models: widened or not, with cached latents, stopped and gone on with."""

import json

import numpy
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline
from PIL import Image
from safetensors.torch import load_file

from otl.config import SettingsError
from otl.tasks import plan
from otl.tasks.run import build_data, build_skeleton
from otl.tasks.train import train
from tests import tiny
from tests.tasks.test_train import losses


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Five pictures, two of them with a mask."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(5):
        Image.new("RGB", (64, 64), (30 * number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    for number in range(2):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (8, 8, 40, 40))
        mask.save(folder / f"{number}-masklabel.png")
    return folder


@pytest.fixture(scope="module")
def nine(tmp_path_factory):
    return tiny.sd15(tmp_path_factory.mktemp("nine"), in_channels=9)


def lines(tmp_path, photos, *overrides):
    return [
        f"data.path={photos}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.resolution=64",
        "data.batch_size=2",
        "data.workers=0",
        "data.validation_share=0.3",
        "logger=none",
        "trainer.max_steps=4",
        "optimizer.lr=1e-3",
        *overrides,
    ]


@pytest.fixture
def run(settings, photos, tmp_path):
    def _run(name, *overrides):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train(settings(*lines(tmp_path, photos, *overrides)), folder)
        return folder

    return _run


@pytest.mark.slow
def test_a_widened_model_trains_on_cached_latents_and_paints(run, sd15_folder, photos):
    picture, mask = photos / "0.png", photos / "0-masklabel.png"
    sample = ["sample.prompts=[a cat]", "sample.steps=2", f"sample.image={picture}", f"sample.mask={mask}"]
    out = run("run", f"model.checkpoint={sd15_folder}", "method=inpaint", "output.dtype=fp32", *sample)
    assert (out / "samples" / "before-after.png").is_file()
    given = Image.open(out / "samples" / "step-000004" / "00-given.png")
    assert given.getpixel((20, 20)) == (128, 128, 128) and given.getpixel((60, 60)) == (0, 100, 200)
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(out / "final")
    start = pipeline.unet.conv_in.weight
    assert start.shape[1] == 9 and (start[:, 4:].abs().amax((0, 2, 3)) > 0).all()
    manifest = json.loads((out / "manifest.json").read_text())
    assert set(manifest["masks"]) <= {str(photos / f"{number}-masklabel.png") for number in range(2)}
    made = json.loads((out / "plan.json").read_text())
    assert made["inpaint"] == {"masks": "both", "files": 2, "images": 5}


@pytest.mark.slow
def test_a_lora_on_an_inpainting_checkpoint_that_was_stopped_ends_as_one_that_was_not(run, nine):
    model = [f"model.checkpoint={nine}", "method=lora", "method.targets=full", "callbacks.checkpoint.every=3"]
    whole = run("whole", *model)
    first = run("stopped", *model, "++callbacks.checkpoint.keep=10")
    for path in (first / "checkpoints").iterdir():
        if "000003" not in path.name:
            path.unlink()
    (first / "final.safetensors").unlink()
    run("stopped", *model, "resume=auto")
    one, two = load_file(whole / "final.safetensors"), load_file(first / "final.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    assert "lora_unet_conv_in.lora_down.weight" in one
    assert one["lora_unet_conv_in.lora_down.weight"].shape[1] == 9


def test_dora_on_an_inpainting_checkpoint_trains_and_is_exported(run, nine):
    words = [f"model.checkpoint={nine}", "method=dora", "method.rank=2", "method.targets=full", "output.dtype=fp32"]
    out = run("run", *words, "trainer.max_steps=1", "callbacks.sampling.every=null")
    assert len(losses(out)) == 1
    tensors = load_file(out / "final.safetensors")
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape == (2, 9, 3, 3)
    base = StableDiffusionInpaintPipeline.from_pretrained(nine, safety_checker=None).unet.conv_in.weight
    moved = tensors["lora_unet_conv_in.dora_scale"].flatten() - base.detach().flatten(1).norm(dim=1)
    assert moved.all() and moved.abs().max() < 1e-2  # AdamW's first step moves each weight by 1e-3
    ups = [tensor for name, tensor in tensors.items() if name.endswith("lora_up.weight")]
    assert len(ups) >= 48 and all(up.any() for up in ups)


@pytest.mark.slow
def test_cached_or_not_the_loss_is_the_same(run, nine):
    model = [f"model.checkpoint={nine}", "method=lora", "seed=3"]
    cached, uncached = losses(run("cached", *model)), losses(run("uncached", *model, "data.cache=false"))
    for (step, loss, _), (other_step, other, _) in zip(cached, uncached, strict=True):
        assert step == other_step and float(loss) == pytest.approx(float(other), rel=1e-4)


@pytest.mark.slow
def test_where_all_masks_are_files_the_image_encoder_is_not_needed_while_training(
    run, nine, photos, tmp_path, monkeypatch
):
    from otl.modules.stable_diffusion import StableDiffusion

    both = tmp_path / "masks"
    both.mkdir()
    for number in range(5):
        mask = Image.new("L", (64, 64))
        mask.paste(255, (0, 0, 32, 64))
        mask.save(both / f"{number}.png")
    calls = []
    encode, step = StableDiffusion.encode_image, StableDiffusion.training_step
    monkeypatch.setattr(
        StableDiffusion, "encode_image", lambda self, pixels: calls.append("image") or encode(self, pixels)
    )
    monkeypatch.setattr(StableDiffusion, "training_step", lambda *args: calls.append("step") or step(*args))
    model = [f"model.checkpoint={nine}", "method=lora"]
    run("run", *model, "inpaint.masks=files", f"data.mask_folder={both}")
    assert "image" in calls and calls.count("step") == 4
    assert "image" not in calls[calls.index("step") :]
    calls.clear()
    run("other", *model)
    assert "image" in calls[calls.index("step") :]  # generated masks need it


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["method=lora", "inpaint.whole=1"], r"inpaint\.whole=1.0: .*takes no mask"),
        (["method=inpaint", "inpaint.masks=files"], r"inpaint\.masks: 3 of 5 images have no mask"),
        (
            ["method=inpaint", "method.parts.denoiser=null", "++method.parts.text_encoder={}"],
            r"method\.parts\.denoiser",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_any_weight_is_loaded(run, sd15_folder, monkeypatch, overrides, text):
    from otl.modules import loading

    monkeypatch.setattr(loading, "load", lambda *args, **kwargs: pytest.fail("weights are loaded"))
    with pytest.raises(SettingsError, match=text):
        run("run", f"model.checkpoint={sd15_folder}", *overrides)


def test_the_plan_of_an_inpainting_model_counts_its_masks_and_keeps_the_image_encoder(settings, photos, tmp_path, nine):
    def made(*overrides):
        return plan.make(settings(*lines(tmp_path, photos, f"model.checkpoint={nine}", "method=lora", *overrides)))[0]

    drawn, ignored = made(), made("inpaint.masks=generated")
    assert (drawn["inpaint"]["files"], ignored["inpaint"]["files"]) == (2, 0)
    assert [row["mask"] is not None for row in drawn["images"]].count(True) <= 2
    vae = next(row["bytes"] for row in drawn["weights"] if row["part"] == "vae")
    files = tmp_path / "masks"
    files.mkdir()
    for number in range(5):
        Image.new("L", (64, 64)).save(files / f"{number}.png")
    cached = made("inpaint.masks=files", f"data.mask_folder={files}")
    assert drawn["memory"]["weights"] - cached["memory"]["weights"] == vae


def test_a_masked_loss_takes_its_masks_from_files_with_any_model(settings, photos, tmp_path, sd15_folder):
    overrides = lines(
        tmp_path, photos, f"model.checkpoint={sd15_folder}", "loss.masked=true", "data.validation_share=0"
    )
    cfg = settings(*overrides)
    data = build_data(cfg, build_skeleton(cfg))
    data.setup("fit")
    masks = {int(i): mask for batch in data.train_dataloader() for i, mask in zip(batch.index, batch.mask)}
    for number in range(2):
        assert torch.equal(
            masks[number][0] > 0, torch.from_numpy(numpy.asarray(Image.open(photos / f"{number}-masklabel.png")) > 0)
        )
    assert all(masks[number].all() for number in range(2, 5))
    assert not data.hides and not data.caches_masked


def test_a_masked_loss_without_a_single_mask_is_refused(settings, tmp_path, sd15_folder):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    cfg = settings(
        f"model.checkpoint={sd15_folder}", f"data.path={tmp_path}", "data.prompt=x", "logger=none", "loss.masked=true"
    )
    (problem,) = (each for each in plan.make(cfg)[1] if each.key == "loss.masked")
    assert problem.fatal and "no image has a mask" in problem.message


def test_images_that_a_masked_loss_counts_whole_are_named(settings, photos, tmp_path, sd15_folder):
    made, _ = plan.make(settings(*lines(tmp_path, photos, f"model.checkpoint={sd15_folder}", "loss.masked=true")))
    (warning,) = (each for each in made["warnings"] if each["about"] == "loss.masked")
    assert warning["message"].startswith("3 of 5 images have no mask")
    assert warning["files"] == [str(photos / f"{number}.png") for number in (2, 3, 4)]


@pytest.mark.slow
def test_a_masked_loss_trains_on_cached_latents_without_pixels(run, sd15_folder, monkeypatch):
    from otl.modules.stable_diffusion import StableDiffusion

    seen, step = [], StableDiffusion.training_step
    monkeypatch.setattr(
        StableDiffusion, "training_step", lambda self, batch, k: seen.append(batch) or step(self, batch, k)
    )
    out = run("run", "method=lora", f"model.checkpoint={sd15_folder}", "loss.masked=true")
    assert len(losses(out)) == len(seen) == 4
    assert all(batch.mask is not None and batch.pixels is None for batch in seen)
