"""What does not go with the model is told from sources and configs, as the model itself would tell it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from otl.check import check
from otl.config import conf_dir
from otl.conflicts.model import SCHEDULER, Model
from otl.modules import samplers
from tests.commands import write_plugin

MODELS = sorted(path.stem for path in (conf_dir() / "model").glob("*.yaml"))
Settings = Callable[..., DictConfig]
FAMILY = """
from otl.modules.base import DiffusionModule
class Flowing(DiffusionModule):
    def __init__(self, checkpoint: str = "x"): ...
    denoiser, config_name = "net", "sd15"
    def make_noise(self): ...
"""


def told(settings: Settings, *lines: str) -> dict[str, str]:
    return {problem.key: problem.message for problem in check(settings("data.path=.", *lines))}


@pytest.mark.parametrize(
    ("lines", "key", "text"),
    [
        (["model.zero_terminal_snr=true"], "model.zero_terminal_snr", "add model.prediction=v_prediction"),
        (["model=sd21", "model.prediction=epsilon", "model.zero_terminal_snr=true"], "model.zero_terminal_snr", "true"),
        (
            ["model=pixart_alpha", "model.prediction=v_prediction"],
            "model.prediction",
            "PixArtAlpha learns with epsilon",
        ),
        (["loss.weight=sigma"], "loss.weight", "predict a flow"),
        (["model=wuerstchen", "loss.weight=sigma"], "loss.weight", "predict a flow"),
        (
            ["model=sdxl_vpred", "noise.offset=0.1", "noise.offset_generalized=true"],
            "noise.offset_generalized",
            "ends in pure noise",
        ),
        (["model=stable_cascade", "sample.sampler=ddim"], "sample.sampler", "noise schedule of its own"),
        (
            ["sample.sampler=dpmpp_2m_karras", "sample.timestep_spacing=trailing"],
            "sample.timestep_spacing",
            "would have no effect",
        ),
        (["model=sdxl_vpred", "sample.timestep_spacing=leading"], "sample.timestep_spacing", "take trailing"),
        (["model=pixart_alpha", "sample.steps=1", "sample.prompts=[a]"], "sample.steps", "in a single step with ddim"),
        (["sample.steps=1001", "sample.prompts=[a]"], "sample.steps", "has 1000 timesteps"),
        (["model=wuerstchen", "model.decoder=null", "sample.prompts=[a]"], "model.decoder", "hub name or a folder"),
        (["model=wuerstchen", "sample.height=1000", "sample.prompts=[a]"], "sample.height", "a multiple of that"),
        (["model=stable_cascade", "trainer.precision=16-mixed"], "trainer.precision", "overflows in fp16"),
        (["method.embeddings.cat.vectors=76"], "method.embeddings.cat.vectors", "76: a prompt has room for 75 tokens"),
        (
            ["model=pixart_alpha", "method.embeddings.cat.vectors=120"],
            "method.embeddings.cat.vectors",
            "room for 119 tokens",
        ),
        (["inpaint.boxes=0.5"], "inpaint.boxes", "takes no mask"),
        (["model=pixart_alpha", "inpaint.fill=0.5"], "inpaint.fill", "no inpainting form"),
        (["data.bucket_sizes=[500x500]"], "data.bucket_sizes", "multiples of 8 pixels"),
        (["model=sdxl", "data.bucket_sizes=[1000x1024]"], "data.bucket_sizes", "multiples of 64 pixels"),
        (["model=stable_cascade", "data.resolution=[1024,1032]"], "data.resolution", "the same buckets"),
        (["data.min_bucket_side=520"], "data.resolution", "has no bucket with sides of 520"),
        (["model=sd21", "data.max_bucket_side=760"], "data.resolution", "768 has no bucket with sides of 0 to 760"),
    ],
)
def test_what_does_not_go_with_the_model_is_refused(settings: Settings, lines: list[str], key: str, text: str) -> None:
    found = told(settings, *lines)
    assert list(found) == [key] and text in found[key]


@pytest.mark.parametrize(
    "lines",
    [
        ["method.embeddings.cat.vectors=75"],
        ["model=pixart_alpha", "method.embeddings.cat.vectors=119"],
        ["model=sd21", "model.zero_terminal_snr=true"],
        ["model=sd21", "sample.timestep_spacing=leading"],
        ["noise.offset=0.1", "noise.offset_generalized=true"],
        ["model=stable_cascade", "model.decoder=null"],
        ["model=stable_cascade", "data.bucket_sizes=[768x1408]"],
        ["model=pixart_alpha", "sample.steps=1"],
        ["model=pixart_alpha", "sample.steps=1", "sample.prompts=[a]", "sample.sampler=euler"],
        ["model=stable_cascade", "sample.steps=1", "sample.prompts=[a]"],
        ["model=sd15_inpaint", "inpaint.boxes=0.5"],
        ["method=inpaint", "inpaint.boxes=0.5"],
        ["data.min_bucket_side=512", "data.max_bucket_side=512"],
        ["data.no_upscale=true", "data.resolution=[512,768]"],
    ],
)
def test_what_goes_with_it_is_accepted(settings: Settings, lines: list[str]) -> None:
    assert told(settings, *lines) == {}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_read_of_a_schedule_is_what_the_family_makes(settings: Settings, name: str) -> None:
    cfg = settings(f"model={name}").model
    known = Model(OmegaConf.to_container(cfg))
    module = instantiate(cfg)
    network = SimpleNamespace(config=SimpleNamespace(in_channels=4, out_channels=8))
    scheduler = SimpleNamespace(config=known.config("scheduler", SCHEDULER))
    module.pipeline = SimpleNamespace(scheduler=scheduler, **{module.denoiser: network})
    module.noise_schedule = module.make_noise()
    assert known.schedule == samplers.schedule(module)


def test_the_checkpoints_own_configs_count(settings: Settings, tmp_path: Path) -> None:
    for name, config in {
        "model_index.json": {},
        "scheduler/scheduler_config.json": {"beta_schedule": "linear", "prediction_type": "v_prediction"},
        "unet/config.json": {"in_channels": 9},
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(config))
    lines = ["model.zero_terminal_snr=true", "inpaint.boxes=0.5"]
    assert set(told(settings, *lines)) == {"model.zero_terminal_snr", "inpaint.boxes"}
    assert told(settings, *lines, f"model.checkpoint={tmp_path}") == {}


@pytest.mark.parametrize("sizes", [{"layers_per_block": 10**9}, {"block_out_channels": [320, 10**9]}])
def test_a_network_of_a_size_that_nobody_has_is_not_built(settings: Settings, tmp_path: Path, sizes: dict) -> None:
    for name, config in {"model_index.json": {}, "unet/config.json": {"in_channels": 4} | sizes}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(json.dumps(config))
    (name,) = sizes
    message = told(settings, f"model.checkpoint={tmp_path}")["model.checkpoint"]
    assert f"{tmp_path / 'unet' / 'config.json'}: asks for {name}=1000000000" in message


@pytest.mark.parametrize(
    ("name", "config"),
    [("unet/config.json", []), ("scheduler/scheduler_config.json", "x"), ("tokenizer/tokenizer_config.json", {})],
)
def test_configs_that_cannot_be_read_are_told_when_the_model_is_built(
    settings: Settings, tmp_path: Path, name: str, config: Any
) -> None:
    for file, content in {"model_index.json": {}, name: config}.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(content))
    lines = ["method.embeddings.cat.vectors=76", "sample.prompts=[a]", "loss.weight=min_snr"]
    assert told(settings, *lines, f"model.checkpoint={tmp_path}") == {}


def test_the_schedule_of_a_plugin_is_its_own_matter(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, files = "flowing = otl_flowing.family:Flowing", {"family.py": FAMILY}
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "otl_flowing", models=models, files=files))
    cfg = settings("data.path=.", "loss.weight=sigma")
    cfg.model = {"_target_": "otl_flowing.family.Flowing"}
    assert [problem.key for problem in check(cfg)] == []


def test_a_value_that_is_wrong_by_itself_is_told_once(settings: Settings) -> None:
    assert set(told(settings, "data.resolution=[500,1]", "loss.weight=sigma")) == {
        "data.resolution[0]",
        "data.resolution[1]",
        "loss.weight",
    }
