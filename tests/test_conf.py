"""Every YAML that ships composes and passes the check."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from otl import places
from otl.check import OF_TASK, check
from otl.config import conf_dir

OPTIONS = sorted(path.relative_to(conf_dir()).with_suffix("").as_posix() for path in conf_dir().glob("*/*.yaml"))
NEEDED = {  # what has no default, and has to be given
    "task/mask": ["masker.prompts=[a dog]"],
    "masker/text": ["masker.prompts=[a dog]"],
    "masker/colour": ["masker.colours=[lime]"],
    "masker/subject": ["masker.checkpoint=owner/u2net"],
    "method/embedding": ["method.embeddings.cat.init=cat"],
}
MOST_CHANGED = [
    *(f"data.{name}" for name in ("path", "prompt", "concepts", "resolution", "batch_size")),
    *(f"method.{name}" for name in ("rank", "alpha", "dropout", "targets")),
    *(f"trainer.{name}" for name in ("max_steps", "max_epochs", "accumulate_grad_batches", "precision")),
    *("model.checkpoint", "optimizer.lr", "scheduler.warmup", "sample.prompts"),
    *("output.format", "output.dtype", "output.overwrite", "seed", "resume"),
]


def test_the_glob_finds_the_options() -> None:
    assert len(OPTIONS) >= 18
    assert {option.partition("/")[0] for option in OPTIONS} >= set(
        ["task", "model", "method", "optimizer", "scheduler", "data", "trainer", "logger"]
    )


@pytest.mark.parametrize("option", OPTIONS)
def test_an_option_composes_and_passes(option: str, settings: Callable[..., DictConfig], tmp_path: Path) -> None:
    group, name = option.split("/")
    task = [f"task={OF_TASK[group]}"] if group in OF_TASK else []
    cfg = settings(*task, f"{group}={name}", *NEEDED.get(option, []))
    if not cfg.data.path and not cfg.data.concepts:
        cfg.data.path = str(tmp_path)
    if option == "task/repeat":
        cfg.manifest = str(tmp_path / "manifest.json")
        (tmp_path / "manifest.json").write_text(json.dumps({name: kind() for name, kind in places.NEEDED.items()}))
    assert check(cfg) == []


@pytest.mark.parametrize("name", MOST_CHANGED)
def test_the_names_that_scripts_rely_on_exist(name: str, settings: Callable[..., DictConfig]) -> None:
    parent, _, leaf = name.rpartition(".")
    assert leaf in (OmegaConf.select(settings(), parent) if parent else settings())


def test_help_lists_only_settings_that_exist(settings: Callable[..., DictConfig]) -> None:
    text = (conf_dir() / "config.yaml").read_text(encoding="utf-8").partition("template: |")[2]
    listed = text.partition("are changed most")[2].partition("Flags:")[0].splitlines()[1:]
    names = [name for line in listed if line.strip() for name in re.split(r"\s{2,}", line.strip())[0].split(", ")]
    assert len(names) >= 18
    for name in set(names) - {"hydra.run.dir"}:
        parent, _, leaf = name.rpartition(".")
        assert leaf in (OmegaConf.select(settings(), parent) if parent else settings()), name


def test_yaml_stays_short() -> None:
    groups = [conf_dir() / f"{option}.yaml" for option in OPTIONS if not option.startswith("experiment/")]
    assert max(len(path.read_text(encoding="utf-8").splitlines()) for path in groups) <= 16
