"""Every family with every method, in small: the contract of methods holds, or the cell is refused with the reason."""

import pytest
import yaml

from otl import registry
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


def test_every_method_is_a_column():
    chosen = {
        word.removeprefix("method=") for each in METHODS.values() for word in each.line if word.startswith("method=")
    }
    there = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")}
    assert chosen == there and len(there) >= 8
    assert sorted(target("method", name) for name in there) == sorted(own(registry.methods).values())


def test_docs_support_is_that_table():
    assert (ROOT / "docs" / "support.md").read_text(encoding="utf-8") == table(), "write it: python -m tests.cells"
