"""Whole runs on tiny checkpoints: what is left in the folder, and that a stopped run goes on as if it had not been."""

import csv
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import StableDiffusionPipeline
from lightning.pytorch.callbacks import Callback, timer
from PIL import Image
from safetensors.torch import load_file

from otl.callbacks.stops import Stopped
from otl.config import SettingsError
from otl.datamodules.files import content_hash
from otl.datamodules.shards import Shard
from otl.formats.files import DiskError, tensors_hash
from otl.tasks.folder import LOCK
from otl.tasks.train import build_trainer, train
from tests.faults.ends import end


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Seven pictures in two buckets."""
    folder = tmp_path_factory.mktemp("photos")
    for number in range(7):
        Image.new("RGB", (64, 64) if number < 4 else (96, 64), (30 * number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    return folder


@pytest.fixture
def run(settings, photos, tmp_path, sd15_folder):
    """(folder name, overrides) -> the folder of a finished run."""

    def _run(name, *overrides):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        train(
            settings(
                f"model.checkpoint={sd15_folder}",
                f"data.path={photos}",
                f"data.cache_dir={tmp_path / 'cache'}",
                "data.resolution=64",
                "data.batch_size=2",
                "data.workers=0",
                "logger=none",
                "trainer.max_steps=6",
                "callbacks.checkpoint.every=3",
                "++callbacks.checkpoint.keep=10",
                *overrides,
            ),
            folder,
        )
        return folder

    return _run


def losses(folder):
    with (folder / "metrics.csv").open() as file:
        return [(row["step"], row["loss"], row["lr_unet"]) for row in csv.DictReader(file)]


def test_a_run_leaves_what_the_readme_lists_and_the_plan_says(run, photos, tmp_path):
    folder = run("run", "sample.prompts=[a cat]", "sample.steps=2", "output.trigger=sks")
    there = {path.name for path in folder.iterdir()}
    assert there >= {"plan.json", "metrics.csv", "manifest.json", "samples", "checkpoints", "final.safetensors"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["outcome"], manifest["step"], len(manifest["images"])) == ("finished", 6, 7)
    assert len(losses(folder)) == 6
    assert (folder / "samples" / "before-after.png").is_file()
    planned, shards = (
        json.loads((folder / "plan.json").read_text())["disk"],
        map(Shard.open, (tmp_path / "cache").glob("*.safetensors")),
    )
    assert planned["cache"] == sum(shard.nbytes * shard.count for shard in shards)
    assert planned["drawing"] * planned["drawings"] >= sum(
        path.stat().st_size for path in folder.glob("samples/**/*.png")
    )


def test_the_manifest_knows_the_commit_of_a_model_that_came_from_the_hub_meanwhile(
    run, sd15_folder, tmp_path, monkeypatch
):
    """The hub's client, which puts what it fetches into its cache, is asked when the run has begun."""
    kept, load = tmp_path / "hub" / "models--me--model", StableDiffusionPipeline.from_pretrained.__func__

    def fetch(pipeline_class, name, **options):
        (kept / "snapshots").mkdir(parents=True)
        (kept / "snapshots" / "0123abc").symlink_to(sd15_folder)
        (kept / "refs").mkdir()
        (kept / "refs" / "main").write_text("0123abc")
        return load(pipeline_class, sd15_folder, **options)

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", classmethod(fetch))
    done = run("run", "model.checkpoint=me/model", "trainer.max_steps=1")
    assert json.loads((done / "manifest.json").read_text())["weights"] == {"commit": "0123abc"}


RESUMED = [
    ("method=lora", "method.dropout=0.1"),
    ("method=lora", "trainer.accumulate_grad_batches=2"),
    ("method=lora", "method.parts={denoiser: {}, text_encoder: {lr: 1e-3}}", "method.dropout=0.1", "data.workers=2"),
    ("method=lora", "optimizer=prodigy", "data.resolution=[64,96]"),
    ("method=lora", "optimizer=adamw8bit", "callbacks.ema.decay=0.9"),
    ("method=lora", "optimizer=lion", "data.caption_dropout=0.5", "scheduler=cosine"),
    ("method=finetune", "optimizer=adafactor", "data.partial_batches=drop"),
]


@pytest.mark.parametrize("overrides", RESUMED, ids=lambda each: " ".join(each))
def test_a_resumed_run_is_bit_equal_to_the_unbroken_one(run, overrides, tmp_path):
    """Step 3 of 4 batches an epoch (3 where the rest is dropped, 8 at two resolutions): within, and at its end.

    It goes on without workers, also where it had some.
    """
    whole = run("whole", *overrides)
    shutil.copytree(whole, tmp_path / "part")
    for later in [tmp_path / "part/checkpoints/step-00000006.ckpt", *tmp_path.glob("part/final*.safetensors")]:
        later.unlink()
    again = run("part", *overrides, "data.workers=0", "resume=auto")
    one, other = end(whole, 6), end(again, 6)
    assert [name for name in one if other.get(name) != one[name]] == []
    assert one.keys() == other.keys()


def test_what_has_changed_since_is_listed_and_holds_once_it_is_allowed(run, photos, tmp_path):
    """Checkpoints keep the optimizer's settings too; those of the resumed run's line hold."""
    shutil.copytree(photos, tmp_path / "photos")
    data = f"data.path={tmp_path / 'photos'}"
    whole = run("whole", data, "optimizer.lr=1e-4")
    line = [data, f"resume={whole / 'checkpoints' / 'step-00000003.ckpt'}", "data.workers=1"]
    assert losses(run("moved", *line, "optimizer.lr=1e-4")) == losses(whole)[3:]

    (tmp_path / "photos" / "2.txt").write_text("another caption")
    line += ["optimizer.lr=3e-4", "optimizer.weight_decay=0.5"]
    with pytest.raises(SettingsError) as refused:
        run("refused", *line)
    listed = ["optimizer.lr: 0.0001 -> 0.0003", "optimizer.weight_decay: 0.01 -> 0.5", "1 images are changed"]
    assert [text for text in listed if text not in str(refused.value)] == []
    assert not (tmp_path / "refused" / "manifest.json").exists()

    changed = run("changed", *line, "allow_changes=true")
    assert [rate for _, _, rate in losses(changed)] == ["0.0003"] * 3
    end = torch.load(changed / "checkpoints" / "step-00000006.ckpt", weights_only=True)["optimizer_states"][0]
    assert end["param_groups"][0]["weight_decay"] == 0.5


def test_a_run_whose_time_is_up_has_its_result_and_goes_on_with_more_of_it(run, monkeypatch, caplog):
    """A clock that goes by a second at each look; an epoch's three steps are of two batches, and the last of one."""
    line = ["trainer.accumulate_grad_batches=2", "data.batch_size=1"]
    clock = itertools.count()
    monkeypatch.setattr(timer, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    whole, limit = run("whole", *line), "++trainer.max_time=00:00:00:03"
    for count in (1, 2):
        part = run("part", *line, limit, "resume=auto")
        assert 0 < json.loads((part / "manifest.json").read_text())["step"] < 6
        assert (part / "final.safetensors").is_file()
        assert caplog.text.count("ended early, by trainer.max_time=00:00:00:03") == count
    run("part", *line, "resume=auto")
    assert end(part, 6) == end(whole, 6)


def test_a_run_that_was_killed_after_its_last_step_does_the_rest(run):
    """Its pictures and its result: there was a checkpoint of the last step already."""
    line = ["sample.prompts=[a cat]", "sample.steps=1"]
    folder = run("run", *line)
    names = ["final.safetensors", "samples/before-after.png", "samples/step-000006.json", "samples/step-000006.png"]
    hashes = [tensors_hash(folder / names[0]), *(content_hash(folder / name) for name in names[1:])]
    for gone in (names, names[:2]):
        for name in gone:
            (folder / name).unlink()
        run("run", *line, "resume=auto")
        assert [tensors_hash(folder / names[0]), *(content_hash(folder / name) for name in names[1:])] == hashes


def test_a_picture_that_the_disk_does_not_take_costs_nothing_of_the_run(run, monkeypatch):
    """The run ends with the state of the step, its row stands in the table, and it is drawn when the run goes on."""
    line = ["sample.prompts=[a cat]", "sample.steps=1", "callbacks.sampling.every=4", "callbacks.sampling.first=false"]
    whole = run("whole", *line)

    def failing(*args, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as disk, pytest.raises(DiskError, match=r"\.png cannot be written: Input/output error"):
        disk.setattr(Image.Image, "save", failing)
        run("part", *line)
    assert (whole.parent / "part" / "checkpoints" / "step-00000004.ckpt").is_file()
    part = run("part", *line, "resume=auto")
    assert losses(part) == losses(whole)
    for name in ("samples/step-000004.png", "samples/step-000004.json", "samples/step-000006.png"):
        assert (part / name).read_bytes() == (whole / name).read_bytes()


def test_a_result_on_the_way_that_the_disk_does_not_take_is_written_when_the_run_goes_on(run, monkeypatch):
    line = ["callbacks.export.every=2", "trainer.max_steps=3", "callbacks.ema.decay=0.5"]
    name = "final-step-000002.safetensors"
    whole = run("whole", *line)

    def failing(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk, pytest.raises(DiskError, match=rf"{name} cannot be written: No space left"):
        disk.setattr("otl.formats.files.save_file", failing)
        run("part", *line)
    part = run("part", *line, "resume=auto")
    assert tensors_hash(part / name) == tensors_hash(whole / name)


def test_another_seed_gives_another_result(run):
    one, two = run("one"), run("two", "seed=1")
    a, b = load_file(one / "final.safetensors"), load_file(two / "final.safetensors")
    assert a.keys() == b.keys()
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_the_same_seed_gives_the_same_result_whether_cached_or_not(run):
    one, two = run("one"), run("two", "data.cache=false")
    a, b = load_file(one / "final.safetensors"), load_file(two / "final.safetensors")
    assert all(torch.allclose(a[key].float(), b[key].float(), atol=1e-3) for key in a)


def test_a_fine_tune_writes_a_folder_that_the_stock_pipeline_loads(run, sd15_folder):
    folder = run("run", "method=finetune", "optimizer.lr=1e-3", "output.dtype=fp32")
    trained = StableDiffusionPipeline.from_pretrained(folder / "final", safety_checker=None)
    start = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    assert not torch.equal(trained.unet.conv_in.weight, start.unet.conv_in.weight)
    planned = json.loads((folder / "plan.json").read_text())["disk"]
    size = (folder / "checkpoints" / "step-00000006.ckpt").stat().st_size
    assert planned["checkpoint"] == pytest.approx(size, rel=0.1)
    assert planned["result"] == pytest.approx(
        sum(f.stat().st_size for f in folder.glob("final/*/*.safetensors")), rel=0.1
    )
    name = next(iter(start.vae.state_dict()))
    assert torch.equal(trained.vae.state_dict()[name], start.vae.state_dict()[name])


def test_a_fine_tune_says_in_its_folder_how_it_predicts(run):
    folder = run("run", "method=finetune", "model.prediction=v_prediction", "model.zero_terminal_snr=true")
    config = json.loads((folder / "final" / "scheduler" / "scheduler_config.json").read_text())
    assert (config["prediction_type"], config["rescale_betas_zero_snr"]) == ("v_prediction", True)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert any(name.endswith("unet/diffusion_pytorch_model.safetensors") for name in manifest["files"])


def test_a_finished_run_that_lost_its_file_writes_it_again_from_the_average(run):
    folder = run("run", "callbacks.ema.decay=0.5")
    first = load_file(folder / "final.safetensors")
    (folder / "final.safetensors").unlink()
    run("run", "callbacks.ema.decay=0.5", "resume=auto")
    again = load_file(folder / "final.safetensors")
    assert all(torch.equal(first[key], again[key]) for key in first)


class Gradients(Callback):
    """Keeps, for the start of every batch, whether there are gradients."""

    seen: list[bool] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.seen.append(any(parameter.grad is not None for parameter in pl_module.parameters()))


def test_gradients_are_let_go_after_each_optimizer_step(run):
    """Kept through the next forward pass they would add to its peak of memory."""
    Gradients.seen.clear()
    probe = f"callbacks.probe._target_={__name__}.Gradients"
    run("run", probe, "trainer.accumulate_grad_batches=2", "trainer.max_steps=2")
    assert Gradients.seen == [False, True, False, True]


@pytest.mark.parametrize("clip", ["1e-3", "1e3", "null"])
def test_gradients_are_clipped_as_lightning_does_it(run, clip):
    """Lightning clips alone where the guard, which measures the norm, is off."""
    overrides = [f"trainer.gradient_clip_val={clip}", "optimizer=lion"]
    guarded, alone = run("guarded", *overrides), run("alone", *overrides, "callbacks.guard=null")
    a, b = load_file(guarded / "final.safetensors"), load_file(alone / "final.safetensors")
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_zero_terminal_snr_is_refused_with_epsilon(run):
    with pytest.raises(SettingsError, match=r"zero_terminal_snr=true.*model\.prediction=v_prediction"):
        run("run", "model.zero_terminal_snr=true")


@pytest.mark.parametrize("accumulate", [1, 3])
def test_validation_counts_optimizer_steps_across_epochs(run, photos, accumulate):
    """An epoch has four batches, and so with accumulation two optimizer steps: of three batches, and of one."""
    held = [f"data.concepts.held.path={photos}", "data.concepts.held.type=validation"]
    options = ["trainer.val_check_interval=5", "trainer.max_steps=10", "callbacks.checkpoint.every=100"]
    folder = run("run", *held, *options, f"trainer.accumulate_grad_batches={accumulate}")
    with (folder / "metrics.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file) if row["val_loss"]] == ["5", "10"]


def test_results_are_never_written_over(run):
    run("run")
    with pytest.raises(SettingsError, match=r"final\.safetensors is an earlier run's result.*resume=auto"):
        run("run")


def test_nor_are_the_table_and_the_record_by_a_run_of_another_name(run, tmp_path):
    """Where there are no checkpoints and the results would lie beside each other."""
    one = ["callbacks.checkpoint=null", "trainer.max_steps=2", "sample.prompts=[a cat]", "sample.steps=2"]
    other = [*one, "output.name=other", "seed=3"]
    folder = run("run", *one)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SettingsError, match=r"final|metrics\.csv is an earlier run's result"):
        run("run", *other)
    assert {path: path.read_bytes() for path in before} == before
    for lacking in ("metrics.csv", "samples"):
        os.rename(folder / lacking, tmp_path / lacking)
        with pytest.raises(SettingsError, match="is an earlier run's result"):
            run("run", *other, "resume=auto")
    run("run", *other, "output.overwrite=true")
    assert (folder / "other.safetensors").is_file()


def test_held_out_images_give_a_validation_loss(run, settings, photos):
    held = [f"data.concepts.held.path={photos}", "data.concepts.held.type=validation"]
    folder = run("run", *held, "trainer.max_steps=8")
    with (folder / "metrics.csv").open() as file:
        measured = [row["val_loss"] for row in csv.DictReader(file) if row["val_loss"]]
    assert len(measured) >= 1
    assert all(float(value) > 0 for value in measured)


def test_a_run_without_a_full_batch_is_refused_before_weights_are_loaded(run):
    with pytest.raises(SettingsError, match="would take no step"):
        run("run", "data.partial_batches=drop", "data.batch_size=64")


def test_a_device_that_the_machine_lacks_is_told_with_its_settings(settings):
    line = settings("data.path=x", "logger=none", "trainer.accelerator=cuda", "trainer.devices=[99]")
    with pytest.raises(SettingsError, match=r"^trainer.accelerator=cuda, trainer.devices=\[99\]: Lightning says: "):
        build_trainer(line, "32-true")


class Asked(Callback):
    """The run is asked to stop while it is still being set up."""

    def setup(self, trainer, pl_module, stage):
        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_signal_before_the_first_step_ends_the_run_at_once(run, tmp_path):
    before = signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    try:
        with pytest.raises(Stopped, match="stopped by SIGUSR1 at once; the same line with resume=auto"):
            run("run", f"callbacks.asked._target_={__name__}.Asked")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert not (tmp_path / "run" / "metrics.csv").exists()


AT_WORK = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.lockf(file, fcntl.LOCK_EX)
print(flush=True)
sys.stdin.read()
"""


def test_a_run_in_the_folder_of_another_that_is_at_work_is_refused(run, tmp_path):
    (tmp_path / "run").mkdir()
    line = [sys.executable, "-S", "-c", AT_WORK, str(tmp_path / "run" / LOCK)]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(SettingsError, match="in use by process"):
            run("run")


def test_a_run_without_room_on_the_disk_is_refused_before_its_first_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    with pytest.raises(SettingsError, match=r"^hydra\.run\.dir: .* make room"):
        run("run", "callbacks.checkpoint.wait=0")
    assert not (tmp_path / "run" / "plan.json").exists()
