"""Every family with every method, in small and on photographs: the cell proves what docs/support.md says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import skimage
from PIL import Image

from otl.testing import Cell, prove
from tests.cells import ALIKE, ALL_METHODS, CELLS, FAMILIES, NAMES, PAGE, RUN, build, claimed, page, written
from tests.commands import fork_otl

pytestmark = pytest.mark.slow

PHOTOGRAPHS = {  # shipped with scikit-image
    "astronaut.png": "a photo of an astronaut, <cat>",
    "chelsea.png": "a photo of a <cat>",
    "coffee.png": "a cup of coffee beside a <cat>",
}
TYPED = {  # of each family the method whose run is typed as a command; between them, of every kind one
    "sd15": "inpaint",
    "sd21": "finetune",
    "sdxl": "lora + embedding",
    "wuerstchen": "oft",
    "stable_cascade": "lokr",
    "pixart_alpha": "embedding",
}


class Typed(Cell):
    """Its first run is made by `python -m otl`."""

    def run(self, name: str, *more: str) -> Path:
        if name != "whole":
            return super().run(name, *more)
        words = self.words(*self.sized(), f"hydra.run.dir={self.folder / name}", *more)
        done = fork_otl(*words, cwd=self.folder)
        assert done.code == 0, done.err
        return self.folder / name


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, caption in PHOTOGRAPHS.items():
        with Image.open(Path(skimage.__file__).parent / "data" / name) as image:
            image.convert("RGB").save(folder / name)
        (folder / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """family -> the words that choose its tiny checkpoint."""
    return {family: build(family, tmp_path_factory.mktemp(family) / "model") for family in NAMES}


@pytest.fixture(scope="module")
def claims(request):
    """What the page says; with --write-support, afterwards it says what the tests have found."""
    found = claimed()
    yield found
    if request.config.getoption("--write-support"):
        PAGE.write_text(page(found), encoding="utf-8")


@pytest.mark.parametrize(
    ("family", "method"),
    [pytest.param(*cell, id="-".join(cell), marks=[pytest.mark.long] * (cell in ALIKE)) for cell in CELLS],
)
def test_a_cell_proves_what_the_page_says(family, method, tmp_path, photos, checkpoints, claims, request):
    kind = Typed if TYPED.get(family) == method else Cell
    cell = kind(checkpoints[family], ALL_METHODS[method], tmp_path, pictures=photos, names=NAMES[family])
    proven = written(prove(cell, run=(family, method) in RUN))
    if request.config.getoption("--write-support"):
        claims[family, method] = proven
    assert claims[family, method] == proven, "write the page: pytest tests/test_support.py --write-support"


def test_a_run_of_every_family_is_typed_as_a_command():
    assert TYPED.keys() == FAMILIES.keys() and set(TYPED.items()) <= RUN
