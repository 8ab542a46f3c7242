"""Imports go downwards only."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from otl.config import PACKAGE

FLOORS = [  # from the ground up; those on one floor do not import each other, but a module may import its own folder
    {"sizes", "aliases", "apart", "config", "wording", "quiet", "epochs", "console"},
    {"agreement", "augmentation", "registry", "sources", "types", "rng", "outcomes", "urls", "moving"},
    {"signatures", "declared", "trust", "schedules", "noise", "timesteps", "cosine", "loss", "variational", "formats"},
    {
        "methods",
        "datamodules",
        "ranges",
        "places",
        "sweeps",
        "choices",
        "overrides",
    },
    {"modules", "conflicts"},
    {"callbacks", "tools"},
    {"check"},
    {"tasks", "mistakes"},
    {"cli"},
    {"__main__", "testing"},
]
LEVELS = {name: level for level, names in enumerate(FLOORS) for name in names}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
WITHOUT_TORCH = (
    "aliases apart config augmentation registry wording quiet sources signatures declared sweeps trust ranges places "
    "conflicts check mistakes outcomes cli schedules urls "
    "epochs choices overrides agreement sizes console"
).split()


def unit(path: Path) -> str:
    """The first part of a module's name below otl."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def imported(tree: ast.AST) -> Iterator[str]:
    """The units of otl that a tree imports, those under TYPE_CHECKING left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("otl."))
        elif isinstance(node, ast.ImportFrom) and node.module == "otl":
            yield from (alias.name for alias in node.names if (PACKAGE / alias.name).is_dir() or alias.name in LEVELS)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("otl."):
            yield str(node.module).split(".")[1]
        yield from imported(node)


def test_the_walk_sees_the_sources() -> None:
    assert len(SOURCES) >= 30
    assert {unit(path) for path in SOURCES} <= set(LEVELS)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_downwards(path: Path) -> None:
    own = unit(path)
    for other in imported(ast.parse(path.read_text(encoding="utf-8"))):
        assert other == own or LEVELS[other] < LEVELS[own], f"{own} imports {other}, which is not below it"


def test_an_upward_import_is_seen() -> None:
    assert list(imported(ast.parse("def f():\n    from otl.modules.base import x\n    from otl import rng"))) == [
        "modules",
        "rng",
    ]


def test_the_command_line_imports_no_torch() -> None:
    light = [path.relative_to(PACKAGE).with_suffix("").parts for path in SOURCES if unit(path) in WITHOUT_TORCH]
    modules = ", ".join(".".join(["otl", *parts]) for parts in light)
    heavy = "{'torch', 'lightning', 'diffusers', 'transformers', 'peft', 'numpy', 'PIL'}"
    code = f"import sys, {modules}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert done.stdout.strip() == "[]"
