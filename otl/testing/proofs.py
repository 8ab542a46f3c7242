"""All that is proven of a cell, by one call.

@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, tmp_path):
    proven = prove(Cell(["model=example", "model.checkpoint=tiny/"], METHODS[method], tmp_path))
    assert proven == ["contract", "run", "again", "formula", "PEFT"]
"""

from __future__ import annotations

from pathlib import Path

from otl.modules.base import DiffusionModule
from otl.testing.cells import Cell
from otl.testing.methods import METHOD_CHECKS, moved
from otl.testing.readers import READERS, TEXTS, check_again
from otl.testing.runs import check_run

PROOFS = {
    "contract": "the prediction keeps the latents' shape; gradients reach each trained weight that the loss depends "
    "on, and nothing else; the loss of one batch falls and no frozen weight changes a bit; cached and uncached loss "
    "agree; a checkpoint's weights give the same prediction",
    "run": "pictures through plan, cache, training, sampling and export; a run resumed in its middle writes bit for "
    "bit the tensors and pictures of the unbroken one",
    "again": "OTL goes on from the exported file, which changes the prediction as the live model does",
    **TEXTS,
}


class Impossible(str):
    """Why a method cannot be with a family: the message of the refusal."""


def prove(cell: Cell, *, run: bool = True) -> list[str] | Impossible:
    """Everything that can be shown of a cell.

    Args:
        run: whether also by a whole run, whose result is read; else that of weights moved by chance is.

    Returns:
        What holds, as `PROOFS` names it; or why the cell is impossible, where it is refused before weights are loaded.

    Raises:
        AssertionError: something does not hold.
    """
    if reason := cell.refusal():
        return Impossible(reason)
    for check in METHOD_CHECKS:
        check(cell.made)
    live, result = check_run(cell) if run else exported(cell)
    check_again(cell, live, result)
    readers = [reader for reader in READERS if reader.reads(live)]
    for reader in readers:
        reader.check(cell, live, result)
    return ["contract", *(["run"] if run else []), "again", *dict.fromkeys(reader.name for reader in readers)]


def exported(cell: Cell) -> tuple[DiffusionModule, Path]:
    """A module whose weights have moved by chance, and its file."""
    live = moved(cell.made)
    folder = cell.folder / "exported"
    folder.mkdir()
    return live, live.export(folder / live.output_options.name)
