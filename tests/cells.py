"""The tables of families and methods: what makes each cell in small, and the page that says what is proven of it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from otl.testing import METHODS, PROOFS, Impossible, Names
from otl.testing.cells import EMBEDDING
from tests import tiny, tiny_priors
from tests.commands import ROOT

PAGE = ROOT / "docs" / "support.md"
FAMILIES = {  # `model=` of the tiny checkpoint -> row of the table
    "sd15": "Stable Diffusion 1.5",
    "sd21": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "wuerstchen": "Wuerstchen v2",
    "stable_cascade": "Stable Cascade",
    "pixart_alpha": "PixArt Alpha",
}
INPAINTING = {
    "sd15_inpaint": "Stable Diffusion 1.5, inpainting checkpoint",
    "sd20_inpaint": "Stable Diffusion 2.x, inpainting checkpoint",
    "sdxl_inpaint": "Stable Diffusion XL, inpainting checkpoint",
}
ENCODERS = {  # a family for each kind of text encoders: CLIP-L; with bigG; bigG with its projection; T5
    name: FAMILIES[name] for name in ("sd15", "sdxl", "stable_cascade", "pixart_alpha")
}
BESIDE = {
    f"{name} + embedding": (*words, EMBEDDING) for name, words in METHODS.items() if "embedding" not in name
}  # with that of the first table, every method that is none of embeddings
ALL_METHODS = METHODS | BESIDE


class Table(NamedTuple):
    """One table of the page."""

    title: str
    families: Mapping[str, str]
    methods: Sequence[str]

    def cells(self) -> list[tuple[str, str]]:
        return [(family, method) for family in self.families for method in self.methods]


TABLES = (
    Table("Families and methods", FAMILIES | INPAINTING, list(METHODS)),
    Table("Embeddings beside every method, for each kind of text encoder", ENCODERS, sorted(BESIDE.keys() - METHODS)),
)
CELLS = [cell for table in TABLES for cell in table.cells()]
RUN = {  # the cells that go through whole runs
    *((family, method) for family in FAMILIES for method in METHODS),
    *(("sd15_inpaint", method) for method in ("lora", "dora", "embedding", "inpaint")),
    ("pixart_alpha", "finetune + embedding"),
}
ALIKE = {  # cells that differ little from others: with `--long` only
    *((family, method) for family in ("sd21", *INPAINTING) for method in ("loha", "lokr", "oft")),
    *((family, f"{method} + embedding") for family in ENCODERS for method in ("loha", "lokr", "oft")),
}


def build(family: str, folder: Path) -> list[str]:
    """Make a tiny random checkpoint; the words of a command that choose it."""
    others: list[str] = []
    if family in tiny_priors.FAMILIES:
        tiny_priors.FAMILIES[family][1](folder)
        others = [f"model.{name}={path}" for name, path in tiny_priors.options(folder).items()]
    elif family == "sd20_inpaint":
        tiny.sd15(folder, in_channels=9, pad="!", act="gelu", linear=True)
    elif family in INPAINTING:
        tiny.BUILDERS[family.removesuffix("_inpaint")](folder, in_channels=9)
    else:
        tiny.BUILDERS["sd2" if family == "sd21" else family](folder)
    return [f"model={family}", f"model.checkpoint={folder}", *others]


# What other programs look up


def flat(prefix: str) -> Callable[[str], str]:
    """kohya's way."""
    return lambda path: f"{prefix}_{path.replace('.', '_')}"


def sgm(path: str) -> str:
    """A layer of an attention in the original code of SDXL, whose blocks are numbered through: one layer each going
    down, two going up. No other layer is adapted here, so that the names of others do not matter."""
    path = path.replace("mid_block.attentions.0", "middle_block.1")
    found = re.fullmatch(r"(down|up)_blocks\.(\d)\.attentions\.(\d)\.(.+)", path)
    if found is None:
        return flat("lora_unet")(path)
    way, number = found[1], 2 * int(found[2]) + int(found[3])
    block = f"input_blocks_{number + 1}" if way == "down" else f"output_blocks_{number}"
    return flat(f"lora_unet_{block}_1")(found[4])


def stage_c(path: str) -> str:
    """Attention as in the original code of Stable Cascade."""
    path = path.replace(".attention.to_out.0", ".attention.attn.out_proj")
    return flat("lora_prior_unet")(path.replace(".attention.to_", ".attention.attn.to_"))


NAMES = {
    "sd15": Names(flat("lora_unet"), ["emb_params"]),
    "sd21": Names(flat("lora_unet"), ["emb_params"]),
    "sd20_inpaint": Names(flat("lora_unet"), ["emb_params"]),
    "sdxl": Names(sgm, ["clip_l", "clip_g"]),
    "wuerstchen": Names(flat("lora_prior_unet"), ["clip_g"]),
    "stable_cascade": Names(stage_c, ["clip_g"]),
    "pixart_alpha": Names("transformer.{}".format, ["t5xxl"]),
}
NAMES |= {family: NAMES[family.removesuffix("_inpaint")] for family in ("sd15_inpaint", "sdxl_inpaint")}


# The page

INTRODUCTION = """\
# What is supported, and what is proven of it

Each cell is a test, `tests/test_support.py::test_a_cell_proves_what_the_page_says`: it goes through what `otl.testing`
can prove of a family with a method, and fails where this page says anything else. The page is written by the same
tests: `pytest tests/test_support.py --write-support`. The networks are tiny and random, of the real classes. Cells
that differ little from others (`ALIKE` in `tests/cells.py`) are tested with `--long` only.

"""


def written(proven: list[str] | Impossible) -> str:
    """A cell of the page."""
    return f"impossible: {proven}" if isinstance(proven, Impossible) else ", ".join(proven)


def page(claims: Mapping[tuple[str, str], str]) -> str:
    """docs/support.md."""
    proofs = "".join(f"- **{name}**: {text}.\n" for name, text in PROOFS.items())
    reasons = list(dict.fromkeys(claim for claim in claims.values() if claim.startswith("impossible: ")))
    tables = "".join(f"\n## {table.title}\n\n{grid(table, claims, reasons)}" for table in TABLES)
    notes = "\n\n".join(f"({number}) {reason}" for number, reason in enumerate(reasons, start=1))
    return f"{INTRODUCTION}{proofs}{tables}\n{notes}\n"


def grid(table: Table, claims: Mapping[tuple[str, str], str], reasons: list[str]) -> str:
    def short(claim: str) -> str:
        return f"({reasons.index(claim) + 1})" if claim in reasons else claim

    rows = [
        ["", *table.methods],
        ["---"] * (1 + len(table.methods)),
        *(
            [title, *(short(claims.get((family, method), "")) for method in table.methods)]
            for family, title in table.families.items()
        ),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def claimed() -> dict[tuple[str, str], str]:
    """(family, method) -> what the page says of it."""
    text = PAGE.read_text(encoding="utf-8")
    reasons = dict(re.findall(r"^(\(\d+\)) (impossible: .+)$", text, re.MULTILINE))
    titles = {title: family for family, title in (FAMILIES | INPAINTING).items()}
    claims, methods = {}, []
    for line in text.splitlines():
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|  |"):
            methods = cells
        elif name in titles:
            claims |= {(titles[name], method): reasons.get(cell, cell) for method, cell in zip(methods, cells)}
    return claims
