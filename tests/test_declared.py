"""What a class says of itself, read from its source."""

from pathlib import Path

import pytest

from otl.declared import declared, descends
from otl.registry import families, methods
from otl.sources import Unclear
from tests.commands import write_plugin

TOY = """
from .base import SHARED, Base

OWN = {"small": ["a"], "large": ["b", "c"]}

class Toy(Base):
    parts = ("net", "text")
    presets = {"net": OWN | {"all": [""]}, "text": {name: ["x"] for name in OWN} | SHARED, **OWN}
    flag: bool = True
    computed = tuple(OWN)
    round = ROUND
    @property
    def inherited(self): ...

ROUND = ROUND | {}
"""
BASE = """
SHARED = {"only": ["y"]}

class Base:
    inherited = 3
    kept = "kept"
    hinted: int
"""


@pytest.fixture(autouse=True)
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"toy.py": TOY, "base.py": BASE}
    monkeypatch.syspath_prepend(write_plugin(tmp_path, "otl_said", files=files))


def test_constants_are_read_through_names_imports_and_bases() -> None:
    own = {"small": ["a"], "large": ["b", "c"]}
    assert declared("otl_said.toy.Toy", "parts") == ["net", "text"]
    assert declared("otl_said.toy.Toy", "presets") == {
        "net": own | {"all": [""]},
        "text": {"small": ["x"], "large": ["x"], "only": ["y"]},
        **own,
    }
    assert declared("otl_said.toy.Toy", "flag") is True
    assert declared("otl_said.toy.Toy", "kept") == "kept"


@pytest.mark.parametrize("name", ["computed", "round", "inherited", "hinted", "absent"])
def test_what_is_no_constant_is_not_guessed(name: str) -> None:
    with pytest.raises(Unclear):
        declared("otl_said.toy.Toy", name)


def test_a_class_descends_from_itself_and_its_bases() -> None:
    assert descends("otl_said.toy.Toy", "otl_said.base.Base") and descends("otl_said.toy.Toy", "otl_said.toy.Toy")
    assert not descends("otl_said.base.Base", "otl_said.toy.Toy")
    assert not descends("otl_said.toy.Nobody", "otl_said.toy.Toy")


def test_what_is_read_of_every_family_is_what_its_class_has() -> None:
    names = ("denoiser", "part_names", "lora_targets", "image_encoder", "writes_file")
    found = {entry.value.replace(":", "."): entry.load() for entry in families().values()}
    for target, family in found.items():
        for name in names:
            value = getattr(family, name)
            assert declared(target, name) == (list(value) if isinstance(value, tuple) else value), (target, name)
    assert len(found) >= 6


def test_what_is_read_of_every_method_is_what_its_class_has() -> None:
    found = {entry.value.replace(":", "."): entry.load() for entry in methods().values()}
    trained = {target: kind for target, kind in found.items() if not target.endswith(".Embedding")}
    for target, kind in trained.items():
        assert declared(target, "part_settings") == list(kind.part_settings)
    assert len(trained) >= 7
