"""What a method's settings ask for that it or the family does not have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from otl.check import check
from otl.conflicts.method import of_method
from otl.registry import families
from tests.commands import write_plugin

FAMILY = """
class Drawn:
    def __init__(self, checkpoint: str = "x"): ...
    denoiser = "net"
    part_names = ("net", "words")
    image_encoder = ""
    lora_targets = {"net": {"attention": ["attn"], "everything": [""]}, "words": {}}
class Silent:
    def __init__(self, checkpoint: str = "x"): ...
    lora_targets = dict(net={})
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "otl_drawn", files={"family.py": FAMILY}))


def messages(family: str, **method: object) -> list[str]:
    settings = {"method": {"_target_": "otl.methods.lora.Lora", **method}, "model": {"_target_": family}}
    return [f"{problem.key}: {problem.message}" for problem in of_method(settings)]


def test_the_presets_of_a_plugins_family_are_read_from_its_source(plugin: None) -> None:
    (message,) = messages("otl_drawn.family.Drawn", targets="everythin")
    assert message.startswith("method.targets=everythin: did you mean everything? Presets: attention, everything;")
    assert messages("otl_drawn.family.Drawn", targets="everything") == []


def test_the_parts_of_a_plugins_family_too(plugin: None) -> None:
    (message,) = messages("otl_drawn.family.Drawn", targets="attention", parts={"text_encoder": {}})
    assert message == "method.parts.text_encoder: Drawn has no such part; it has denoiser, words"


def test_what_a_source_does_not_say_is_left_to_the_run(plugin: None) -> None:
    assert messages("otl_drawn.family.Silent", targets="everythin", parts={"text_encoder": {}}) == []


@pytest.mark.parametrize("targets", ["attn2", ["up_blocks"], ["down_blocks"], ["down-blocks"], "attn-mlp", "mid-block"])
def test_patterns_and_presets_are_accepted(targets: str | list[str]) -> None:
    assert messages("otl.modules.stable_diffusion_xl.StableDiffusionXL", targets=targets) == []


def test_the_presets_of_every_family_are_known_and_its_own() -> None:
    for entry in families().values():
        target = entry.value.replace(":", ".")
        for presets in entry.load().lora_targets.values():
            assert all(messages(target, targets=name) == [] for name in presets)
        (message,) = messages(target, targets="attn-mpl")
        assert "did you mean attn-mlp?" in message


PRIOR = ["data.concepts.a.path=.", "data.concepts.a.type=prior"]
CAT = "method.embeddings.cat.init=cat"


@pytest.mark.parametrize(
    ("lines", "key", "text"),
    [
        ([*PRIOR, "method=finetune"], "data.concepts.a.type=prior", "Finetune has none"),
        ([*PRIOR, "method=embedding", CAT], "data.concepts.a.type=prior", "Embedding has none"),
        (
            [CAT, "method.templates=object", "data.captions.sources=[file]"],
            "method.templates",
            "data.captions.sources has no prompt",
        ),
        (["method.embeddings.cat.file=none.pt"], "method.embeddings.cat.file=none.pt", "there is no such file"),
    ],
)
def test_what_method_and_data_contradict_is_refused(
    settings: Callable[..., DictConfig], lines: list[str], key: str, text: str
) -> None:
    found = {problem.key: problem.message for problem in check(settings("data.path=.", *lines))}
    assert list(found) == [key] and text in found[key]


@pytest.mark.parametrize(
    "lines",
    [
        PRIOR,
        [*PRIOR, "data.concepts.a.enabled=false", "method=finetune"],
        [CAT, "method.templates=object"],
        ["method.parts={text_encoder: {lr: 1e-5}, denoiser: null}"],
        ["method.parts.text_encoder.stop_after='2 epochs'"],
        ["method.embeddings.cat.init=cat", "method.templates=['a photo of {}']", "method.bundle_embeddings=true"],
        ["method=embedding", "method.embeddings.cat={}", "method.templates=style"],
        ["method=finetune", "output.checkpoint_format=single_file", "method.targets=[attn1]"],
        ["method=inpaint", "model=sdxl"],
        ["method=lokr", "output.format=peft"],
        ["method=oft", "method.block_sizes={attn1: 16}"],
        ["model=stable_cascade", "method.targets=mapper"],
    ],
)
def test_what_makes_sense_is_accepted(settings: Callable[..., DictConfig], lines: list[str]) -> None:
    assert check(settings("data.path=.", *lines)) == []
