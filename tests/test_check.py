"""Settings against signatures, read from sources."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from otl.check import check, require
from otl.config import SettingsError, assets_dir
from otl.signatures import signature
from tests.commands import write_plugin

PICTURE = assets_dir() / "quickstart" / "00000.png"
TOY = """
from __future__ import annotations
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Optional, Union

import no_such_library
from .base import Base
from .stars import *

Mode = Literal["fast", "exact"]

class Plain(Base):
    def __init__(self, size: int, *, rate: float = 0.1, on: bool = True, name: str | None = None, mode: Mode = "fast",
                 shape: tuple[int, int] = (1, 1), items: list[str] = (), where: Optional[Path] = None,
                 either: Union[int, str] = 1, table: dict | None = None,
                 engine: no_such_library.Engine = None) -> None: ...

class Inherits(Base): ...
class Passes(Base):
    def __init__(self, own: int = 1, **kwargs) -> None: ...
class Open:
    def __init__(self, own: int = 1, **kwargs) -> None: ...
@dataclass
class Fields:
    size: int
    rate: float = 0.1
def untyped(size, rate=0.5, on=False, pair=(0.9, 0.99), anything=None): ...
"""
BASE = """
class Base:
    def __init__(self, depth: int, rate: float = 0.1) -> None: ...
    @classmethod
    def load(cls, path: str): ...
"""


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"toy.py": TOY, "base.py": BASE, "stars.py": "class Starred:\n    def __init__(self, ray: int): ...\n"}
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "otl_toy", models="toy = otl_toy.toy:Plain", files=files))
    signature.cache_clear()


def problems(target: str, **arguments: object) -> list[str]:
    """What is said about a model made of a target and arguments."""
    found = check(OmegaConf.create({"model": {"_target_": target, **arguments}}))
    return [f"{problem.key}: {problem.message}" for problem in found]


def test_a_call_that_fits_has_no_problem() -> None:
    arguments = {"rate": 1, "name": None, "mode": "exact", "shape": [1, 2], "items": ["a"], "either": "x", "engine": 3}
    assert problems("otl_toy.toy.Plain", size=2, **arguments) == []


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [
        ("size", "big", "a whole number"),
        ("size", 1.5, "a whole number"),
        ("size", True, "a whole number"),
        ("size", None, "a whole number"),
        ("rate", "fast", "a number"),
        ("rate", False, "a number"),
        ("on", 1, "true or false"),
        ("name", 3, "text or null"),
        ("mode", "exat", "fast or exact; did you mean exact?"),
        ("shape", [1], "a list of 2"),
        ("shape", [1, "x"], "a list of 2"),
        ("items", [1], "a list"),
        ("where", 3, "text or null"),
        ("either", 1.5, "a whole number or text"),
        ("table", [], "a mapping or null"),
    ],
)
def test_a_wrong_type_names_what_is_accepted(name: str, value: object, accepted: str) -> None:
    (problem,) = problems("otl_toy.toy.Plain", **{"size": 1, name: value})
    assert problem.startswith(f"model.{name}: ")
    assert problem.endswith(f"is not accepted: must be {accepted}")


def test_a_number_that_yaml_reads_as_text_says_how_to_write_it() -> None:
    assert problems("otl_toy.toy.Plain", size=1, rate="1e-4") == ["model.rate: '1e-4' is text in YAML: write 1.0e-4"]


def test_an_unknown_name_gets_the_nearest() -> None:
    (problem,) = problems("otl_toy.toy.Plain", size=1, raet=2)
    assert problem == "model.raet: there is no such setting (given: 2); did you mean model.rate?"


def test_a_missing_argument_must_be_given() -> None:
    assert problems("otl_toy.toy.Plain") == ["model.size: must be given: otl_toy.toy.Plain needs it"]
    assert problems("otl_toy.toy.Plain", size="???") == ["model.size: must be given: model.size=..."]


@pytest.mark.parametrize(
    ("target", "names"),
    [
        ("otl_toy.toy.Inherits", ["depth", "rate"]),
        ("otl_toy.toy.Passes", ["depth", "rate", "own"]),
        ("otl_toy.toy.Fields", ["size", "rate"]),
        ("otl_toy.toy.Starred", ["ray"]),
        ("otl_toy.toy.Base", ["depth", "rate"]),
        ("otl_toy.toy.Inherits.load", ["path"]),
        ("otl_toy.toy.untyped", ["size", "rate", "on", "pair", "anything"]),
    ],
)
def test_names_are_followed_through_bases_and_reexports(target: str, names: list[str]) -> None:
    assert list(signature(target).parameters) == names


def test_a_default_tells_the_type_where_no_annotation_does() -> None:
    found = problems("otl_toy.toy.untyped", size=1, rate="x", on=3, pair=[1], anything="y")
    assert [problem.partition(":")[0] for problem in found] == ["model.rate", "model.on", "model.pair"]


def test_open_arguments_do_not_hide_a_typing_mistake() -> None:
    assert problems("otl_toy.toy.Open", own=1, owm=2)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("otl_toy.toy.Plian", "did you mean Plain?"),
        ("otl_toy.tyo.Plain", "did you mean toy?"),
        ("os.system", "is refused"),
        ("builtins.eval", "is refused"),
        ("otl_toy", "is a module"),
    ],
)
def test_a_target_that_cannot_be_called_is_refused(target: str, said: str) -> None:
    assert said in " ".join(problems(target))


@pytest.mark.parametrize(
    ("target", "some"),
    [
        ("torch.optim.AdamW", {"params", "lr", "betas", "eps", "weight_decay"}),
        ("torch.optim.Adafactor", {"params", "lr", "weight_decay"}),
        ("bitsandbytes.optim.AdamW8bit", {"params", "lr", "betas"}),
        ("pytorch_optimizer.Prodigy", {"params", "lr", "d0", "safeguard_warmup"}),
        ("pytorch_optimizer.Lion", {"params", "lr", "betas"}),
        ("lightning.pytorch.Trainer", {"max_steps", "precision", "accumulate_grad_batches"}),
        ("lightning.pytorch.loggers.TensorBoardLogger", {"save_dir", "name", "version"}),
        ("diffusers.StableDiffusionPipeline", {"vae", "unet"}),
    ],
)
def test_the_libraries_signatures_are_read_from_their_sources(target: str, some: set[str]) -> None:
    assert some <= set(signature(target).parameters)


def test_static_signatures_are_those_that_python_sees() -> None:
    import inspect

    import torch

    for name in ("AdamW", "Adafactor", "SGD", "RMSprop", "NAdam"):
        seen = inspect.signature(getattr(torch.optim, name)).parameters
        read = signature(f"torch.optim.{name}").parameters
        assert list(read) == list(seen)
        assert [p.required for p in read.values()] == [p.default is p.empty for p in seen.values()]


def test_what_otl_gives_itself_cannot_be_given(settings: Callable[..., DictConfig], tmp_path: Path) -> None:
    (problem,) = check(settings(f"data.path={tmp_path}", "++trainer.logger=true"))
    assert problem.key == "trainer.logger"
    assert "OTL sets it itself" in problem.message


def test_all_problems_are_reported_at_once(settings: Callable[..., DictConfig]) -> None:
    cfg = settings("data.batch_size=0", "++optimizer.lrr=1", "++trainer.precision=bf61", "noise.min_timestep=1")
    assert {"data.batch_size", "optimizer.lrr", "trainer.precision", "noise.min_timestep", "data.path"} == {
        problem.key for problem in check(cfg)
    }
    with pytest.raises(SettingsError, match=r"(?s)optimizer\.lrr.*data\.batch_size"):
        require(cfg)


@pytest.mark.parametrize(
    ("lines", "key", "text"),
    [
        (["optimizer=prodigy", "optimizer.d0=-1"], "optimizer.d0", "above 0"),
        (["method=lokr", "method.factor=0"], "method.factor", "at least 2, or -1"),
        (["method=lokr", "method.factor=-2"], "method.factor", "at least 2, or -1"),
        (["model=wuerstchen", "model.p2_gamma=-1"], "model.p2_gamma", "at least 0"),
        (
            ["model=sd21", "model.native_resolution=0"],
            "model.native_resolution",
            "at least 64 and at most 16384, a multiple of 8",
        ),
        (["trainer.devices='0,x'"], "trainer.devices", "a list: numbers of GPUs from 0"),
        (["optimizer=prodigy", "optimizer.d_coef=-1"], "optimizer.d_coef", "above 0"),
        (["optimizer=adafactor", "optimizer.beta2_decay=1"], "optimizer.beta2_decay", "at least -1 and at most 0"),
        (["optimizer=adafactor", "optimizer.d=0.5"], "optimizer.d", "at least 1"),
        (["optimizer.lr=null"], "optimizer.lr", "null is not a number"),
        (["optimizer.lr=[1]"], "optimizer.lr", "[1] is not a number"),
        (["optimizer.lr={a: 1}"], "optimizer.lr", "{'a': 1} is not a number"),
        (["scheduler.warmup=2.5"], "scheduler.warmup", "a share below 1 or a whole number"),
        (["method.parts.denoiser.stop_after=2.5"], "method.parts.denoiser.stop_after", "a share below 1"),
        (
            ["data.resolution=512.0"],
            "data.resolution",
            "at most 16384, a multiple of 8; did you mean 512?",
        ),
        (["data.resolution={a: 1}"], "data.resolution", "is not a number"),
        (["trainer.max_steps=1.5"], "trainer.max_steps", "a whole number, at least 1"),
        (["trainer.max_time=3"], "trainer.max_time", "3 is not accepted"),
        (["trainer.num_nodes=0"], "trainer.num_nodes", "at least 1"),
        (["sample.prompts=[[a]]"], "sample.prompts", "a list of texts"),
        (["seed=4294967296"], "seed", "at most 4294967295"),
        (["sample.seeds=[18446744073709551616]"], "sample.seeds[0]", "at most 18446744073709551615"),
        (["sample.seeds=[0,-1]"], "sample.seeds[1]", "at least 0"),
    ],
)
def test_numbers_out_of_range_are_refused(settings, lines, key, text):
    found = {problem.key: problem.message for problem in check(settings("data.path=.", *lines))}
    assert list(found) == [key]
    assert text in found[key]


@pytest.mark.parametrize(
    "line",
    [
        *(f"trainer.devices={value}" for value in ("2", "-1", "auto", "[1]", "[0,2]", "'0,1'", "'1,'", "'2'")),
        *(f"trainer.accelerator={value}" for value in ("auto", "cpu", "gpu", "cuda", "mps")),
        "trainer.val_check_interval=4",
        "trainer.val_check_interval=null",
    ],
)
def test_what_the_trainer_takes_is_accepted(settings, line):
    assert check(settings("data.path=.", "data.validation_share=0.1", line)) == []


@pytest.mark.parametrize("line", ["method.factor=-1", "method.factor=2"])
def test_a_number_with_a_meaning_of_its_own_is_accepted_beside_the_range(settings, line):
    assert check(settings("data.path=.", "method=lokr", line)) == []


@pytest.mark.parametrize(
    ("lines", "key", "text"),
    [
        (["inpaint.boxes=-1"], "inpaint.boxes", "at least 0"),
        (["inpaint.max_area=1.5"], "inpaint.max_area", "at most 1"),
        (["inpaint.fill=2"], "inpaint.fill", "at most 1"),
        (["inpaint.min_area=0.6"], "inpaint.min_area", "0.6 is above inpaint.max_area=0.5"),
        ([f"inpaint.{form}=0" for form in ("boxes", "brushes", "ellipses", "whole")], "inpaint.whole", "all 0"),
        (["data.mask_folder=no/where"], "data.mask_folder", "does not exist"),
        (["inpaint.masks=files", "inpaint.boxes=1"], "inpaint.boxes", "needs inpaint.masks=generated or both"),
        (["sample.image=no.png", f"sample.mask={PICTURE}"], "sample.image", "no.png: there is no such file"),
        (["sample.mask=[3]", f"sample.image={PICTURE}"], "sample.mask", "3 is not accepted"),
    ],
)
def test_masks_that_cannot_be_made_are_refused(settings, lines, key, text):
    found = {problem.key: problem.message for problem in check(settings("data.path=.", *lines))}
    assert set(found) == {key} and text in found[key]


def test_settings_of_masks_that_make_sense_are_accepted(settings, tmp_path):
    masks = [
        "model=sd15_inpaint",
        "inpaint.masks=both",
        f"data.mask_folder={tmp_path}",
        "inpaint.whole=1",
        "inpaint.resize=area",
    ]
    assert (
        check(
            settings(
                "data.path=.",
                "model=sd15_inpaint",
                *masks,
                f"sample.image=[{PICTURE}]",
                f"sample.mask={PICTURE}",
            )
        )
        == []
    )


def test_the_folder_of_class_images_need_not_be_there_where_they_are_drawn(settings, tmp_path):
    concept = [f"data.concepts.class.path={tmp_path / 'new'}", "data.concepts.class.prompt=a dog"]
    assert check(settings("data.path=.", *concept, "data.concepts.class.generate=2")) == []


def test_a_folder_that_nothing_makes_must_be_there(settings, tmp_path):
    (problem,) = check(settings("data.path=.", f"data.concepts.class.path={tmp_path / 'new'}"))
    assert problem.key == "data.concepts.class.path" and "does not exist" in problem.message


def test_class_images_are_not_drawn_into_a_file(settings, tmp_path):
    (tmp_path / "new").write_bytes(b"")
    concept = [f"data.concepts.class.path={tmp_path / 'new'}", "data.concepts.class.prompt=a dog"]
    (problem,) = check(settings("data.path=.", *concept, "data.concepts.class.generate=2"))
    assert problem.key == "data.concepts.class.path" and "is a file" in problem.message
