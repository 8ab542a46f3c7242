"""The command line as its users type it, on tiny checkpoints."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from PIL import Image

from tests.commands import fork_otl, run_otl

pytestmark = pytest.mark.slow


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        Image.new("RGB", (64, 64), (40 * number, 100, 200)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture {number}\n")
    return folder


def common(tmp_path, photos, checkpoint):
    return [
        f"model.checkpoint={checkpoint}",
        f"data.path={photos}",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.resolution=64",
        "data.workers=1",
        "trainer.max_steps=3",
    ]


def test_the_main_line_of_the_readme(tmp_path, photos, sdxl_folder):
    line = ["model=sdxl", "method=lora", "optimizer=adamw8bit", *common(tmp_path, photos, sdxl_folder)]
    done = run_otl(*line, "hydra.run.dir=OUT", "optimizer.lr=1e-2", cwd=tmp_path)
    assert done.code == 0, done.err
    out = tmp_path / "OUT"
    assert {p.name for p in out.iterdir()} >= {".hydra", "plan.json", "metrics.csv", "manifest.json", "tensorboard"}
    lines = [line for line in (done.out + done.err).splitlines() if line.strip()]
    assert len(lines) == len(set(lines)), "a line is printed twice"
    assert not re.search(r"warn|tip:|litlogger|kernels|torchvision|deprecat", done.out + done.err, re.IGNORECASE)

    stock = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    before = {name: parameter.clone() for name, parameter in stock.unet.named_parameters()}
    stock.load_lora_weights(out / "final.safetensors")
    stock.fuse_lora()
    after = dict(stock.unet.named_parameters())
    assert any(
        not torch.equal(before[name], after.get(name, after.get(name.replace(".weight", ".base_layer.weight"))))
        for name in before
        if "attn1.to_q" in name
    )


def test_planning_the_same_line_loads_no_weights_and_makes_no_file_but_the_plan(tmp_path, photos):
    line = ["task=plan", "model=sdxl", "method=lora", "optimizer=adamw8bit", f"data.path={photos}"]
    done = fork_otl(*line, "hydra.run.dir=OUT", cwd=tmp_path)
    assert done.code == 0, done.err
    plan = json.loads((tmp_path / "OUT" / "plan.json").read_text())
    assert (plan["images_used"], plan["total_steps"]) == (5, 2000)
    assert plan["weights"][0]["parameters"] == 2_567_463_684
    assert {path.name for path in (tmp_path / "OUT").iterdir()} <= {".hydra", "plan.json", "plan.png", "otl.log"}


def test_a_sweep_gives_every_job_a_folder_of_its_own(tmp_path, photos, sd15_folder):
    line = ["--multirun", "method.rank=2,4", *common(tmp_path, photos, sd15_folder)]
    done = fork_otl(*line, "hydra.sweep.dir=SWEEP", cwd=tmp_path)
    assert done.code == 0, done.err
    ranks = [json.loads((tmp_path / "SWEEP" / job / "manifest.json").read_text()) for job in ("0", "1")]
    assert [manifest["settings"]["method"]["rank"] for manifest in ranks] == [2, 4]
    assert all((tmp_path / "SWEEP" / job / "final.safetensors").is_file() for job in ("0", "1"))


def test_weights_that_are_nowhere_give_one_clear_line(tmp_path, photos):
    done = run_otl("model=sdxl", f"data.path={photos}", "trainer.max_steps=1", cwd=tmp_path, HF_HUB_OFFLINE="1")
    assert done.code == 2
    (line,) = done.err.splitlines()
    assert "model.checkpoint: stabilityai/stable-diffusion-xl-base-1.0 is not in the hub's cache" in line
    assert "give a folder or a .safetensors file" in line
    assert done.seconds < 3
