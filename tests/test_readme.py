"""What README and docs say is true: their lines compose and pass the check, and what they name exists."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from otl.cli import check_line, spelled_out
from otl.config import Data, SettingsError, conf_dir
from otl.places import NEEDED
from otl.signatures import signature
from tests.commands import ROOT

# The family of docs/adding-a-family.md is its reader's own; the test of the plugin composes it.
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples" / "shapes" / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "adding-a-family.md"),
]
TEXTS = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PAGES}
README = TEXTS["README.md"]

COMMAND = re.compile(r"(?m)(?:^[ \t]*|`)python -m otl ([^`\n]+)")
LINES = sorted({line.strip() for text in TEXTS.values() for line in COMMAND.findall(text.replace("\\\n", " "))})
LINKS = [(page, link) for page, text in TEXTS.items() for link in re.findall(r"\]\((?!https?:)([^)#]+)", text)]
FOLDER = re.compile(r"(?:data\.path|data\.concepts\.\w+\.path|--config-dir)[= ](\S+)")

FILE = re.compile(r"(?:sample\.(?:image|mask)|manifest|method\.from_file)=(\S+)")
WEIGHTS = re.compile(r"\b(?:model|masker)\.checkpoint=(\S+\.(?:safetensors|onnx)|base|otl/assets/shapes)(?= |$)")


def section(title: str) -> str:
    """The text of README under a heading."""
    return README.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0]


def test_there_is_something_to_check() -> None:
    assert len(PAGES) >= 13
    assert len(LINES) >= 13
    assert len(LINKS) >= 20


@pytest.mark.parametrize("line", LINES)
def test_a_line_composes_and_passes_the_check(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in FOLDER.findall(line):
        if not {"*", ":"} & set(folder):  # patterns and URLs are looked up later
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / "metadata.csv").touch()
    for file in FILE.findall(line):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
        if file.endswith(".png"):
            Image.new("RGB", (8, 8)).save(tmp_path / file)
        if file.endswith("manifest.json"):
            (tmp_path / file).write_text(json.dumps({name: kind() for name, kind in NEEDED.items()}))
    for weights in WEIGHTS.findall(line):
        (tmp_path / weights).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / weights).touch()
    if "--config-dir" in line:
        preset = tmp_path / "my" / "experiment" / "portrait.yaml"
        assert preset.relative_to(tmp_path).as_posix() in README
        (preset.parent / "night").mkdir(parents=True)
        for path in (preset, preset.parent / "night" / "first.yaml"):
            path.write_text(README.split("```yaml\n", 1)[1].split("```", 1)[0])
    check_line(spelled_out(shlex.split(line)))


def test_a_wrong_line_does_not_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError):
        check_line(spelled_out(["task=plan", "data.path=photos/"]))


def test_the_refusal_is_as_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    shown = re.search(r"\$ python -m otl (.+)\n((?:  .+\n)+?)  ```", README)
    assert shown is not None
    with pytest.raises(SettingsError) as refused:
        check_line(spelled_out(shlex.split(shown[1])))
    assert str(refused.value) == "\n".join(line.removeprefix("  ") for line in shown[2].splitlines())


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_a_link_leads_somewhere(page: str, link: str) -> None:
    assert ((ROOT / page).parent / link).exists(), f"{page} links to {link}"


def test_the_file_tree_exists() -> None:
    block = section("The files").split("```")[1]
    paths = re.findall(r"(?m)^\S+/\S*", block)
    assert len(paths) >= 14
    paths += re.findall(r"otl/\w+\.py", block)
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_the_makefile_has_the_targets_that_are_named() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = {target for text in TEXTS.values() for target in re.findall(r"(?:^|`)make ([a-z]+)", text, re.MULTILINE)}
    assert named >= {"quickstart", "test"}
    assert [target for target in named if not re.search(rf"(?m)^{target}:", makefile)] == []


def test_the_recipes_that_are_named_exist() -> None:
    recipes = (ROOT / "justfile").read_text(encoding="utf-8")
    named = set(re.findall(r"`just ([a-z]+)", TEXTS["CONTRIBUTING.md"]))
    assert len(named) >= 4
    assert [recipe for recipe in named if not re.search(rf"(?m)^{recipe}\b.*:", recipes)] == []


def test_the_options_of_every_group_are_listed() -> None:
    rows = dict(re.findall(r"(?m)^\| `(\w+)` \| (.+) \|$", section("What there is")))
    groups = {path.parent.name for path in conf_dir().glob("*/*.yaml")}
    assert set(rows) == groups
    for group in groups:
        for path in (conf_dir() / group).glob("*.yaml"):
            assert f"`{path.stem}`" in rows[group], f"{group}={path.stem} is not in README"


def test_every_family_and_method_has_a_page_with_a_command_to_start_from() -> None:
    models: dict[str, list[str]] = {}
    for path in sorted((conf_dir() / "model").glob("*.yaml")):
        models.setdefault(OmegaConf.load(path)._target_.split(".")[-2], []).append(path.stem)
    assert {f"docs/families/{family}.md" for family in models} == {n for n in TEXTS if n.startswith("docs/families/")}
    for family, names in models.items():
        page = TEXTS[f"docs/families/{family}.md"]
        assert [name for name in names if f"`{name}`" not in page] == []
        assert re.search(rf"(?m)^python -m otl model=(?:{'|'.join(names)}) ", page)
    for path in sorted((conf_dir() / "method").glob("*.yaml")):
        assert f"method={path.stem}" in TEXTS[f"docs/methods/{path.stem}.md"]


def test_the_settings_that_are_listed_exist(settings: Callable[..., DictConfig]) -> None:
    rows = re.findall(r"(?m)^\| (`[a-z].+?) \| ", section("One page to a real run").split("changed most")[1])
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert len(names) >= 18
    assert [name for name in names if not exists(name, settings("++method.parts.text_encoder.lr=1e-4"))] == []


def exists(name: str, cfg: DictConfig) -> bool:
    """Whether a setting is in the composed ones, or an argument of what they configure."""
    parent, _, leaf = name.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    return leaf in node or ("_target_" in node and leaf in signature(node._target_).parameters)


def test_the_data_page_names_only_settings_that_exist() -> None:
    named = set(re.findall(r"\bdata\.(\w+)", TEXTS["docs/data.md"]))
    assert len(named) >= 12
    assert named <= set(Data.__dataclass_fields__)


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/adr/0006-floors-of-imports.md"])
def test_the_floors_are_those_that_are_tested(page: str) -> None:
    from tests.test_floors import FLOORS

    shown = dict(re.findall(r"(?m)^(\d)  (.+)$", TEXTS[page]))
    assert {int(level): set(names.split()) for level, names in shown.items()} == dict(enumerate(FLOORS))


def test_the_page_on_formats_names_the_header_fields() -> None:
    import torch

    from otl.formats.modelspec import lora_metadata
    from otl.types import LoraLayer, Size

    layer = LoraLayer(torch.zeros(4, 8), torch.zeros(8, 4), 4.0)
    header = lora_metadata(
        {"unet": {"a": layer}},
        architecture="a",
        base_model_version="b",
        title="t",
        name="n",
        resolution=Size(64, 64),
        trigger="w",
    )
    assert len(header) >= 15
    assert [field for field in header if f"`{field}`" not in TEXTS["docs/formats.md"]] == []
