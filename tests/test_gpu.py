"""On a GPU what other tests show on a CPU. Where there is none, a run is made on the device of `tests/pretend.py`."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch
from hydra.core.plugins import Plugins

from otl.callbacks import randomness
from otl.callbacks.snapshot import snapshot
from otl.cli import PluginConf, spelled_out
from otl.config import register
from otl.mistakes import compose_settings
from otl.tasks.train import train
from tests import pretend, tiny
from tests.faults.ends import content, end
from tests.faults.world import make_photo

HAS_GPU = torch.cuda.is_available()
HAS_BF16 = HAS_GPU and torch.cuda.is_bf16_supported(including_emulation=False)
needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="there is no GPU")
needs_bf16 = pytest.mark.skipif(not HAS_BF16, reason="there is no GPU with units for bf16")
STEPS, STOP = 3, 1  # an epoch has three batches, and so two optimizer steps


@pytest.fixture
def deterministic():
    """What `trainer.deterministic=true` sets for the process is put back."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def run(folder: Path, checkpoint: Path, *overrides: str) -> Path:
    """With a text encoder, dropout, augmentation, an average, accumulation, workers, pictures and validation."""
    folder.mkdir(exist_ok=True)
    line = [
        f"model.checkpoint={checkpoint}",
        f"data.path={folder.parent / 'photos'}",
        f"data.cache_dir={folder.parent / 'cache'}",
        "data.resolution=64",
        "data.batch_size=2",
        "data.validation_share=0.2",
        "data.image_variations=2",
        "data.augment.flip=0.5",
        "data.captions.shuffle=true",
        "data.workers=1",
        "method=lora",
        "method.dropout=0.2",
        "method.parts={denoiser: {}, text_encoder: {lr: 1e-3}}",
        "output.dtype=fp32",
        "trainer.deterministic=true",
        "trainer.accumulate_grad_batches=2",
        f"trainer.max_steps={STEPS}",
        "trainer.val_check_interval=2",
        "callbacks.ema.decay=0.6",
        "callbacks.checkpoint.every=1",
        "callbacks.checkpoint.keep=9",
        "callbacks.sampling.every=2",
        "callbacks.sampling.first=false",
        "sample.prompts=[a cat]",
        "sample.steps=2",
        "logger=none",
    ]
    train(compose_settings(spelled_out([*line, *overrides]), name="config"), folder)
    return folder


def a_resumed_run_is_bit_equal(folder: Path, checkpoint: Path, *overrides: str) -> dict[str, object]:
    """Returns the last checkpoint."""
    (folder / "photos").mkdir()
    for number in range(6):
        make_photo(folder / "photos" / f"{number}.png", number)
    whole = run(folder / "whole", checkpoint, *overrides)
    part = shutil.copytree(whole, folder / "part")
    for path in [*part.glob("checkpoints/*.ckpt"), *part.glob("samples/*/*.png"), part / "final.safetensors"]:
        if path.suffix != ".ckpt" or path.stem > f"step-{STOP:08d}":
            path.unlink()
    again = end(run(part, checkpoint, *overrides, "resume=auto"), STEPS)
    assert len(again) > 100
    assert again == end(whole, STEPS)
    return torch.load(whole / "checkpoints" / f"step-{STEPS:08d}.ckpt", weights_only=True)


@needs_gpu
@pytest.mark.parametrize("precision", ["32-true", pytest.param("bf16-mixed", marks=needs_bf16), "16-mixed"])
def test_a_resumed_run_is_bit_equal_with_deterministic_algorithms(sd15_folder, tmp_path, deterministic, precision):
    line = ["trainer.accelerator=gpu", f"trainer.precision={precision}"]
    last = a_resumed_run_is_bit_equal(tmp_path, sd15_folder, *line)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"], "cuBLAS is asked for it"
    assert "cuda" in last["randomness"][0]
    assert ("MixedPrecision" in last) == (precision == "16-mixed")  # the scale of fp16


def on_the_device(folder: Path) -> None:
    """In a process of its own, where the settings are not known yet."""
    register()
    Plugins.instance().register(PluginConf)
    checkpoint = tiny.sd15(folder / "checkpoint")
    with pretend.pretended():
        line = [f"trainer.accelerator={pretend.NAME}", f"+trainer.strategy={pretend.NAME}", "trainer.precision=32-true"]
        a_resumed_run_is_bit_equal(folder, checkpoint, *line)


@pytest.mark.slow
def test_a_resumed_run_is_bit_equal_on_a_device_that_is_not_the_cpu(apart, tmp_path):
    """Caching, training, validating, drawing, saving and going on, and no tensor lies on the wrong device."""
    apart(on_the_device, tmp_path)


@needs_gpu
def test_a_snapshot_is_complete_before_training_goes_on():
    """The copy waits for what is queued before it, and is not changed by what is queued after it."""
    weight = torch.zeros(2**24, device="cuda")
    torch.cuda._sleep(10**9)  # about half a second of the device
    weight += 1
    held = snapshot({"weight": [weight]})
    weight.fill_(7)
    assert held["weight"][0].device.type == "cpu"
    assert content(held["weight"][0]) == content(torch.ones(2**24))


@needs_gpu
def test_the_gpus_generator_comes_back_as_it_was():
    torch.rand(3, device="cuda")
    saved = randomness.states()
    drawn = torch.rand(3, device="cuda").tolist()
    randomness.restore(saved)
    assert torch.rand(3, device="cuda").tolist() == drawn
