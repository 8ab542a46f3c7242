"""On a GPU what other tests show on a CPU. Where there is none, runs are made on the CPU and the rest is skipped."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from otl.callbacks import randomness
from otl.callbacks.snapshot import snapshot
from otl.tasks.train import train
from tests.faults.ends import content, end
from tests.faults.world import make_photo

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
STEPS, STOP = 5, 2  # an epoch has three batches, and so two optimizer steps


@pytest.fixture
def deterministic(monkeypatch):
    """What `trainer.deterministic=true` sets for the process is put back."""
    before = torch.are_deterministic_algorithms_enabled()
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize(
    ("accelerator", "precision"),
    [
        ("cpu", "32-true"),
        *(pytest.param("gpu", name, marks=needs_gpu) for name in ("32-true", "bf16-mixed", "16-mixed")),
    ],
)
def test_a_resumed_run_is_bit_equal_with_deterministic_algorithms(
    settings, sd15_folder, tmp_path, deterministic, accelerator, precision
):
    """With a text encoder, dropout, augmentation, an average, accumulation, workers, pictures and validation."""
    (tmp_path / "photos").mkdir()
    for number in range(6):
        make_photo(tmp_path / "photos" / f"{number}.png", number)

    def run(name: str, *overrides: str) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        line = [
            f"model.checkpoint={sd15_folder}",
            f"data.path={tmp_path / 'photos'}",
            f"data.cache_dir={tmp_path / 'cache'}",
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
            f"trainer.accelerator={accelerator}",
            f"trainer.precision={precision}",
            "trainer.accumulate_grad_batches=2",
            f"trainer.max_steps={STEPS}",
            "trainer.val_check_interval=2",
            "callbacks.ema.decay=0.6",
            "callbacks.checkpoint.every=1",
            "callbacks.checkpoint.keep=9",
            "callbacks.sampling.every=3",
            "callbacks.sampling.first=false",
            "sample.prompts=[a cat]",
            "sample.steps=2",
            "logger=none",
        ]
        train(settings(*line, *overrides), folder)
        return folder

    whole = run("whole")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"], "cuBLAS is asked for it"
    part = shutil.copytree(whole, tmp_path / "part")
    for path in [*part.glob("checkpoints/*.ckpt"), *part.glob("samples/*/*.png"), part / "final.safetensors"]:
        if path.suffix != ".ckpt" or path.stem > f"step-{STOP:08d}":
            path.unlink()
    again = end(run("part", "resume=auto"), STEPS)
    assert len(again) > 100
    assert again == end(whole, STEPS)
    last = torch.load(whole / "checkpoints" / f"step-{STEPS:08d}.ckpt", weights_only=True)
    assert ("cuda" in last["randomness"]) == (accelerator == "gpu")
    assert ("MixedPrecision" in last) == (precision == "16-mixed")  # the scale of fp16


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
