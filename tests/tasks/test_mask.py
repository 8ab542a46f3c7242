"""`task=mask`: which files are written, with what, and that training reads exactly them."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from omegaconf import DictConfig
from PIL import Image

from otl.check import require
from otl.cli import options
from otl.config import Data, Inpaint, MaskSource, RunEnded, SettingsError
from otl.datamodules.scan import scan
from otl.tasks.mask import mask
from otl.tools.maskers import ColourMasker

Run = Callable[..., list[dict[str, str]]]
LEFT = np.zeros((20, 40), np.uint8)
LEFT[:, :10] = 255


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A picture whose left quarter is lime."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    levels = np.full((20, 40, 3), (255, 0, 255), np.uint8)
    levels[:, :10] = (0, 255, 0)
    Image.fromarray(levels).save(folder / "more" / "a.png")
    return folder


@pytest.fixture
def run(settings: Callable[..., DictConfig], photos: Path, tmp_path: Path) -> Run:
    """Mask what is lime; returns the rows of mask.csv."""

    def run(*overrides: str) -> list[dict[str, str]]:
        composed = settings("task=mask", "masker=colour", "masker.colours=[lime]", f"data.path={photos}", *overrides)
        require(composed)
        mask(composed, **options(composed.task), folder=tmp_path)
        return list(csv.DictReader((tmp_path / "mask.csv").open(encoding="utf-8", newline="")))

    return run


def read(file: Path) -> np.ndarray:
    image = Image.open(file)
    assert (image.format, image.mode) == ("PNG", "L")
    return np.asarray(image)


def label(photos: Path, array: np.ndarray | None = None, suffix: str = ".png") -> Path:
    """The mask's file; with an array, one that is there."""
    file = photos / "more" / f"a-masklabel{suffix}"
    if array is not None:
        Image.fromarray(array).save(file)
    return file


def test_a_mask_is_written_beside_its_image_and_is_exact(run: Run, photos: Path) -> None:
    rows = run()
    np.testing.assert_array_equal(read(label(photos)), LEFT)
    assert [(row["outcome"], row["white"]) for row in rows] == [("written", "0.2500")]


def test_training_finds_the_mask_and_takes_it(run: Run, photos: Path) -> None:
    run()
    (photos / "more" / "a.txt").write_text("a picture")
    samples, problems = scan(Data(path=str(photos)), Inpaint(masks=MaskSource.files))
    assert problems == []
    assert [sample.mask for sample in samples] == [label(photos)]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_mask_lies_over_the_image_as_it_is_seen(run: Run, tmp_path: Path, orientation: int) -> None:
    folder = tmp_path / "turned"
    folder.mkdir()
    stored = Image.new("RGB", (40, 20), "magenta")
    stored.paste("lime", (0, 0, 10, 20))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(folder / "a.png", exif=exif)
    run(f"data.path={folder}")
    from PIL import ImageOps

    seen = ImageOps.exif_transpose(Image.open(folder / "a.png"))
    expected = (np.asarray(seen.convert("RGB")) == (0, 255, 0)).all(axis=2) * 255
    np.testing.assert_array_equal(read(folder / "a-masklabel.png"), expected)


def test_a_folder_of_masks_has_the_subfolders_of_the_images(run: Run, photos: Path, tmp_path: Path) -> None:
    run(f"data.mask_folder={tmp_path / 'masks'}")
    np.testing.assert_array_equal(read(tmp_path / "masks" / "more" / "a.png"), LEFT)
    assert not label(photos).exists()


def test_a_mask_is_no_image_to_mask(run: Run, photos: Path) -> None:
    for _ in range(2):
        rows = run(f"data.mask_folder={photos / 'masks'}", "task.mode=replace", "output.overwrite=true")
    assert [Path(row["image"]).name for row in rows] == ["a.png"]


def test_filling_leaves_a_mask_that_is_there_bit_for_bit(run: Run, photos: Path) -> None:
    there = label(photos, np.full((20, 40), 7, np.uint8)).read_bytes()
    assert [row["reason"] for row in run()] == ["masked already"]
    assert label(photos).read_bytes() == there


def test_a_mask_of_another_kind_of_file_is_one_too(run: Run, photos: Path) -> None:
    label(photos, LEFT, ".webp")
    assert [row["reason"] for row in run()] == ["masked already"]


TOP = np.zeros((20, 40), np.uint8)
TOP[:5] = 255


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["task.mode=replace"], LEFT),
        (["task.mode=add"], LEFT | TOP),
        (["task.mode=subtract"], TOP & ~LEFT),
        (["task.mode=blend", "task.alpha=0.2"], (LEFT * 0.2 + TOP * 0.8).round()),
        (["task.mode=blend"], (LEFT * 0.5 + TOP * 0.5).round()),
    ],
)
def test_modes(run: Run, photos: Path, overrides: list[str], expected: np.ndarray) -> None:
    label(photos, TOP)
    run(*overrides)
    np.testing.assert_allclose(read(label(photos)), expected, atol=0.5)


def test_a_smaller_mask_is_brought_to_the_image_first(run: Run, photos: Path) -> None:
    label(photos, np.full((10, 20), 255, np.uint8))
    run("task.mode=subtract")
    np.testing.assert_array_equal(read(label(photos)), 255 - LEFT)


def test_a_mask_of_another_shape_fails_and_stays(run: Run, photos: Path) -> None:
    there = label(photos, np.full((20, 20), 255, np.uint8)).read_bytes()
    with pytest.raises(RunEnded, match="does not have the shape of the image"):
        run("task.mode=add")
    assert label(photos).read_bytes() == there


def test_without_a_mask_there_is_nothing_to_subtract_from(run: Run, photos: Path) -> None:
    assert [row["reason"] for row in run("task.mode=subtract")] == ["no mask to subtract from"]
    assert not label(photos).exists()


@pytest.mark.parametrize("mode", ["add", "blend"])
def test_without_a_mask_the_new_one_is_it(run: Run, photos: Path, mode: str) -> None:
    run(f"task.mode={mode}")
    np.testing.assert_array_equal(read(label(photos)), LEFT)


@pytest.mark.parametrize(("grow", "columns"), [(3, 13), (-4, 6), (0, 10)])
def test_white_reaches_further_or_draws_back(run: Run, photos: Path, grow: int, columns: int) -> None:
    run(f"task.grow={grow}")
    assert (read(label(photos)) == 255).sum(axis=1).tolist() == [columns] * 20


def test_inverted_white_is_the_rest_and_what_grows(run: Run, photos: Path) -> None:
    run("task.invert=true", "task.grow=2")
    assert (read(label(photos)) == 255).sum(axis=1).tolist() == [32] * 20


def test_so_many_images_are_masked_at_once(run: Run, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("b.png", "c.png"):
        Image.new("RGB", (20, 20)).save(photos / name)
    sizes, masks = [], ColourMasker.masks
    monkeypatch.setattr(ColourMasker, "masks", lambda masker, some: sizes.append(len(some)) or masks(masker, some))
    run("task.batch_size=2")
    assert sizes == [2, 1]


def test_smooth_edges_have_greys(run: Run, photos: Path) -> None:
    run("task.smooth=2")
    row = read(label(photos))[10].astype(int)
    assert row[0] == 255 and row[39] == 0
    assert (np.diff(row) <= 0).all()
    assert len(set(row)) > 5


def test_what_is_not_masked_has_the_grey_that_is_asked_for(run: Run, photos: Path) -> None:
    run("task.unmasked=0.2")
    np.testing.assert_array_equal(read(label(photos)), np.where(LEFT == 255, 255, 51))


def test_a_mask_without_white_is_warned_of(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    assert [row["white"] for row in run("masker.colours=[black]", "task.unmasked=0.1")] == ["0.0000"]
    assert "1 masks have no white" in caplog.text


def test_an_alpha_that_nothing_uses_is_refused(run: Run) -> None:
    with pytest.raises(SettingsError, match=r"task\.alpha: .*needs task\.mode=blend"):
        run("task.alpha=0.3")
