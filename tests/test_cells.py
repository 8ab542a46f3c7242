"""Every family with every method, in small: the contract of methods holds, or the cell is refused with the reason."""

import pytest

from otl.config import SettingsError
from otl.tasks.run import build_module
from otl.testing import METHOD_CHECKS
from otl.testing.methods import started, unreached
from tests.cells import CELLS, FAMILIES, IMPOSSIBLE, METHODS, NO_FORM, build, table
from tests.commands import ROOT


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """family -> the words that choose its tiny checkpoint."""
    return {family: build(family, tmp_path_factory.mktemp(family) / "model") for family in FAMILIES}


@pytest.fixture
def made(request, settings, checkpoints):
    """() -> a new module of a cell."""
    family, method = request.param
    cfg = settings(*checkpoints[family], *METHODS[method].line, "data.path=x", "logger=none")
    return lambda: build_module(cfg)


@pytest.mark.parametrize("check", METHOD_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
@pytest.mark.parametrize("made", CELLS, ids="-".join, indirect=True)
def test_the_contract_of_methods(made, check):
    check(made)


WITHOUT_GRADIENT = {"stable_cascade": {"trained.prior.clip_img_mapper.weight"}}  # the picture that it reads is zeros


@pytest.mark.parametrize("made", [cell for cell in CELLS if cell[1] == "finetune"], ids="-".join, indirect=True)
def test_a_fine_tune_reaches_every_weight_of_the_denoiser_but_one(made, request):
    family = request.node.callspec.params["made"][0]
    assert set(unreached(started(made))) == WITHOUT_GRADIENT.get(family, set())


@pytest.mark.parametrize("made", IMPOSSIBLE, ids="-".join, indirect=True)
def test_an_impossible_cell_is_refused_before_weights_are_loaded(made):
    with pytest.raises(SettingsError, match=NO_FORM):
        made().build_skeleton()


def test_the_table_is_whole():
    assert len(CELLS) + len(IMPOSSIBLE) == len(FAMILIES) * len(METHODS)


def test_docs_support_is_that_table():
    assert (ROOT / "docs" / "support.md").read_text(encoding="utf-8") == table(), "write it: python -m tests.cells"
