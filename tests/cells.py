"""The table of families and methods: how each cell is made in small, and which are impossible and why."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests import tiny, tiny_priors

WORD = "+method.embeddings.cat={placeholder: '<cat>', vectors: 2}"


@dataclass(frozen=True)
class Method:
    """One column of the table."""

    line: tuple[str, ...]  # of the command
    file: str  # what comes out
    inpaints: bool = False


FAMILIES = {  # `model=` of the tiny checkpoint -> row of the table
    "sd15": "Stable Diffusion 1.5",
    "sd21": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "wuerstchen": "Wuerstchen v2",
    "stable_cascade": "Stable Cascade",
    "pixart_alpha": "PixArt Alpha",
}
METHODS = {
    "lora": Method(("method=lora", "method.rank=4"), "final.safetensors"),
    "dora": Method(("method=dora", "method.rank=4"), "final.safetensors"),
    "loha": Method(("method=loha", "method.rank=4"), "final.safetensors"),
    "lokr": Method(("method=lokr", "method.rank=2", "method.factor=4"), "final.safetensors"),
    "oft": Method(("method=oft", "method.block_size=8"), "final.safetensors"),
    "finetune": Method(("method=finetune",), "final"),
    "embedding": Method(("method=embedding", WORD), "final.safetensors"),
    "lora + embedding": Method(("method=lora", "method.rank=4", WORD), "final.safetensors"),
    "inpaint": Method(("method=inpaint",), "final", inpaints=True),
}
WITHOUT_INPAINTING = {"wuerstchen", "stable_cascade", "pixart_alpha"}
NO_FORM = "no program would feed its denoiser a mask"

CELLS = [
    (family, method)
    for family in FAMILIES
    for method in METHODS
    if not (METHODS[method].inpaints and family in WITHOUT_INPAINTING)
]
IMPOSSIBLE = [(family, "inpaint") for family in FAMILIES if family in WITHOUT_INPAINTING]


def build(family: str, folder: Path) -> list[str]:
    """Make a tiny random checkpoint; the words of a command that choose it."""
    if family in tiny_priors.FAMILIES:
        tiny_priors.FAMILIES[family][1](folder)
        others = [f"model.{name}={path}" for name, path in tiny_priors.options(folder).items()]
    else:
        tiny.BUILDERS["sd2" if family == "sd21" else family](folder)
        others = []
    return [f"model={family}", f"model.checkpoint={folder}", *others]


STOCK = ("sd15", "sd21", "sdxl")  # families that diffusers and others have readers for
READERS = {
    "formula": "the file's tensors, added to the plain weights by their published formula, predict as the live adapter",
    "diffusers": "diffusers' own loader gives the prediction, or the conditioning, of the live model",
    "weights": "the networks of the folder, loaded by their own classes, have the trained weights bit for bit",
    "keys": "the vectors, bit for bit, under the keys that ComfyUI looks up",
}


def readers(family: str, method: str) -> list[str]:
    """Who else reads what a cell writes, and is asked in its test."""
    if method in {"lora", "dora", "loha", "lokr", "oft"}:
        return ["formula", *(["diffusers"] if method == "lora" and family in STOCK else [])]
    if method in {"finetune", "inpaint"}:
        return ["weights", *(["diffusers"] if family in STOCK else [])]
    if method == "embedding" and family in STOCK:
        return ["keys", "diffusers"]
    return ["keys"]


INTRODUCTION = """\
# What is supported, and what is proven of it

Written by `python -m tests.cells` from the table that the tests go through; a test holds it to that table.
Every cell is trained with tiny random models of the real classes:

- **contract** (`tests/test_cells.py`): gradients reach each trained weight that the loss depends on, and nothing
  else; the loss of one batch falls and no frozen weight changes a bit; cached and uncached loss agree; a checkpoint's
  weights give the same prediction.
- **run** (`tests/test_support.py`): photographs through plan, cache, training, sampling and export; a run resumed
  in its middle writes bit for bit the files of the unbroken one; OTL goes on from the file with the prediction
  that the run ended with.
- who else reads the file, in the same test:
"""


def table() -> str:
    """docs/support.md."""
    others = "".join(f"  - **{name}**: {text}.\n" for name, text in READERS.items())
    rows = [
        ["", *METHODS],
        ["---"] * (1 + len(METHODS)),
        *([title, *(cell(family, method) for method in METHODS)] for family, title in FAMILIES.items()),
    ]
    lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    return f"{INTRODUCTION}{others}\n{lines}\n(1) Impossible and refused at once: {NO_FORM}.\n"


def cell(family: str, method: str) -> str:
    return ", ".join(["contract", "run", *readers(family, method)]) if (family, method) in CELLS else "(1)"


if __name__ == "__main__":
    (Path(__file__).parents[1] / "docs" / "support.md").write_text(table(), encoding="utf-8")
