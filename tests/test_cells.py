"""The tables of families and methods are whole, and the page that shows them claims no cell that is not tested."""

import pytest
import yaml

from otl import registry
from otl.testing import METHODS, PROOFS, Cell
from otl.testing.methods import unreached
from tests.cells import ALL_METHODS, BESIDE, CELLS, FAMILIES, INPAINTING, PAGE, RUN, TABLES, build, claimed, page
from tests.commands import ROOT

WITHOUT_GRADIENT = {"stable_cascade": {"trained.prior.clip_img_mapper.weight"}}  # the picture that it reads is zeros


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fine_tune_reaches_every_weight_of_the_denoiser_but_one(family, tmp_path):
    cell = Cell(build(family, tmp_path / "model"), METHODS["finetune"], tmp_path)
    assert set(unreached(cell.module())) == WITHOUT_GRADIENT.get(family, set())


# The page


def test_the_page_has_the_cells_that_are_tested_and_no_others():
    assert claimed().keys() == set(CELLS) and len(CELLS) == len(set(CELLS)) >= 100


def test_a_cell_says_what_is_proven_or_why_it_is_impossible():
    claims = claimed()
    possible = {cell: set(claim.split(", ")) for cell, claim in claims.items() if not claim.startswith("impossible: ")}
    for proven in possible.values():
        assert {"contract", "again"} <= proven <= PROOFS.keys()
    assert {cell for cell, proven in possible.items() if "run" in proven} == RUN & possible.keys()
    assert {method for _, method in claims.keys() - possible.keys()} == {"inpaint", "inpaint + embedding"}


def test_the_page_is_what_its_claims_are_written_as():
    assert PAGE.read_text(encoding="utf-8") == page(claimed()), "pytest tests/test_support.py --write-support"


# What there is


def own(group):
    """Registered name -> class, of those that are OTL's."""
    return {name: entry.value.replace(":", ".") for name, entry in group().items() if entry.value.startswith("otl.")}


def target(group, name):
    return yaml.safe_load((ROOT / "conf" / group / f"{name}.yaml").read_text(encoding="utf-8"))["_target_"]


def test_every_family_is_a_row():
    """By the class that its settings make: what is registered as sd2 has the settings sd21, sd20 and others."""
    rows = {family: target("model", family) for family in FAMILIES}
    assert sorted(rows.values()) == sorted(own(registry.families).values())
    assert rows["sd21"] == own(registry.families)["sd2"]


def test_every_inpainting_checkpoint_is_a_row():
    there = {path.stem for path in (ROOT / "conf" / "model").glob("*_inpaint.yaml")}
    assert there == INPAINTING.keys() and len(there) >= 3


def test_every_method_is_a_column():
    words = {word for words in METHODS.values() for word in words}
    chosen = {word.removeprefix("method=") for word in words if word.startswith("method=")}
    there = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    assert chosen == there and len(there) >= 8
    assert sorted(target("method", name) for name in there) == sorted(own(registry.methods).values())


def test_embeddings_stand_beside_every_other_method():
    others = {name for name in METHODS if "embedding" not in name}
    assert BESIDE.keys() == {f"{name} + embedding" for name in others} and len(others) >= 7
    assert {method for table in TABLES for method in table.methods} == ALL_METHODS.keys()
