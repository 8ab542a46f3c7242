"""plugins/otl-example as a third party would have it: installed elsewhere, listed, planned, trained."""

from __future__ import annotations

import csv
import json
import shutil
import sys
from pathlib import Path
from statistics import mean

import pytest
from PIL import Image
from safetensors import safe_open

from tests.commands import ROOT, Result, fork_otl, listed, run_otl, run_process

PLUGIN = ROOT / "plugins" / "otl-example"
PIP = "-m pip install --no-deps --no-index --no-build-isolation --disable-pip-version-check --quiet".split()
STEPS = 40
COLOURS = {"red": "#ff0000", "green": "#00ff00", "blue": "#0000ff", "yellow": "#ffff00"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the plugin is installed in."""
    built, folder = (tmp_path_factory.mktemp(name) for name in ("source", "site"))
    shutil.copytree(PLUGIN, built / "otl-example", ignore=shutil.ignore_patterns("__pycache__"))
    done = run_process([sys.executable, *PIP, "--target", folder, built / "otl-example"], folder)
    assert done.code == 0, done.err
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A frame of each colour, upright and lying, with its caption."""
    folder = tmp_path_factory.mktemp("pictures")
    for name, colour in COLOURS.items():
        for h, w in ((48, 64), (64, 48)):
            picture = Image.new("RGB", (w, h), colour)
            picture.paste("black", (16, 16, w - 16, h - 16))
            picture.save(folder / f"{name}-{h}x{w}.png")
            (folder / f"{name}-{h}x{w}.txt").write_text(f"a {name} frame")
    return folder


@pytest.fixture(scope="module")
def run(site: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run with pictures drawn before and after."""
    folder = tmp_path_factory.mktemp("run")
    done = fork_otl(
        *line(pictures, folder),
        f"trainer.max_steps={STEPS}",
        "sample.prompts=[a red frame]",
        cwd=folder,
        path=(site, ROOT),
    )
    assert done.code == 0, done.out + done.err
    assert "Error" not in done.err
    return folder / "run"


def line(pictures: Path, folder: Path) -> list[str]:
    """The words of a run's command line."""
    return [
        *("model=example", "method.targets=full", "method.rank=8", "optimizer.lr=3e-3"),
        *(f"data.path={pictures}", "data.resolution=64", "data.batch_size=4", "data.workers=0"),
        *(
            "sample.steps=4",
            "output.dtype=fp32",
            f"data.cache_dir={folder / 'cache'}",
            f"hydra.run.dir={folder / 'run'}",
        ),
    ]


def otl(site: Path, folder: Path, *arguments: str) -> Result:
    return run_otl(*arguments, cwd=folder, path=(site, ROOT), OMP_NUM_THREADS="1")


def test_what_is_installed_is_the_package_with_its_yaml(site: Path) -> None:
    files = {path.relative_to(site / "otl_example").as_posix() for path in (site / "otl_example").rglob("*.*")}
    assert {"family.py", "networks.py", "pipeline.py", "conf/model/example.yaml"} <= files


def test_help_lists_it_among_the_families(site: Path, tmp_path: Path) -> None:
    assert listed("model", "example") in otl(site, tmp_path, "--help").out


def test_a_setting_it_does_not_have_is_refused(site: Path, tmp_path: Path) -> None:
    refused = otl(site, tmp_path, "model=example", "model.chekpoint=seed:1", f"data.path={tmp_path}")
    assert refused.code == 2
    assert "did you mean model.checkpoint?" in refused.err


def test_it_is_planned_without_weights(site: Path, pictures: Path, tmp_path: Path) -> None:
    done = fork_otl("task=plan", *line(pictures, tmp_path), "trainer.max_steps=3", cwd=tmp_path, path=(site, ROOT))
    assert done.code == 0, done.out + done.err
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())
    assert (plan["family"], plan["images_used"], plan["total_steps"]) == ("Example", 8, 3)
    assert [row["part"] for row in plan["weights"]] == ["transformer", "text_encoder"]
    assert plan["memory"]["activations"] > 0


@pytest.mark.slow
def test_training_by_the_command_line_lowers_the_loss(run: Path) -> None:
    with (run / "metrics.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(losses) == STEPS
    assert mean(losses[-10:]) < 0.75 * mean(losses[:10])


@pytest.mark.slow
def test_the_run_draws_before_and_after(run: Path) -> None:
    drawn = [Image.open(run / "samples" / f"step-{step:06d}" / "00-a-red-frame-seed0.png") for step in (0, STEPS)]
    assert drawn[0].size == drawn[1].size == (64, 64)
    assert drawn[0].tobytes() != drawn[1].tobytes()
    assert (run / "samples" / "before-after.png").is_file()


@pytest.mark.slow
def test_the_lora_has_every_layer_of_the_denoiser(run: Path) -> None:
    layers_in_a_block, layers_outside = 7, 4
    with safe_open(run / "final.safetensors", "pt") as file:
        names = [key for key in file.keys() if key.endswith(".alpha")]  # noqa: SIM118
        header = file.metadata()
    assert len(names) == 3 * layers_in_a_block + layers_outside
    assert all(name.startswith("lora_transformer_") for name in names)
    assert header["modelspec.architecture"] == "otl-example/lora"


@pytest.mark.slow
def test_its_own_tests_pass(site: Path, tmp_path: Path) -> None:
    shutil.copytree(PLUGIN / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = run_process(command, tmp_path, site, ROOT, OMP_NUM_THREADS="1")
    assert done.code == 0, done.out[-3000:]
    assert " passed" in done.out and "skipped" not in done.out


def test_a_plugin_keeps_the_configs_of_its_published_weights_in_its_own_folder(sd15_folder: Path) -> None:
    from otl.modules.stable_diffusion import StableDiffusion

    class Tiny(StableDiffusion):
        config_name = str(sd15_folder)

    module = Tiny("owner/name")
    module.build_skeleton()
    assert module.part("unet").config.block_out_channels == [32, 64]
