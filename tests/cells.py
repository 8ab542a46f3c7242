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
