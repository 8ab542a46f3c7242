"""`task=rank`: the loss of every image under the line's own model, worst first."""

from __future__ import annotations

import csv
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from otl.check import require
from otl.cli import options
from otl.config import Data, SettingsError, assets_dir
from otl.datamodules.layout import layout
from otl.datamodules.uses import records
from otl.tasks.rank import on_one_device, rank, worst_first
from otl.tasks.train import train
from otl.types import Sample, Size

Rows = list[dict[str, str]]
Run = Callable[..., Rows]


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    """Eight of the pictures that the small checkpoint knows, with their captions."""
    folder = tmp_path / "shapes"
    folder.mkdir()
    for number in range(8):
        for suffix in (".png", ".txt"):
            shutil.copy(assets_dir() / "quickstart_rest" / f"{number:05d}{suffix}", folder)
    return folder


@pytest.fixture
def run(settings: Callable[..., DictConfig], shapes: Path, tmp_path: Path) -> Run:
    """Rank the shapes under the small checkpoint; returns the rows of rank.csv."""

    def run(*overrides: str, folder: Path | None = None) -> Rows:
        common = ["task=rank", "model=sd15", f"model.checkpoint={assets_dir() / 'shapes'}", f"data.path={shapes}"]
        sizes = ["data.resolution=64", "data.batch_size=4", "data.workers=0", "output.overwrite=true", "logger=none"]
        composed = settings(*common, *sizes, f"data.cache_dir={tmp_path / 'cache'}", *overrides)
        require(composed)
        rank(composed, **options(composed.task), folder=folder or tmp_path)
        return read(folder or tmp_path)

    return run


def read(folder: Path) -> Rows:
    return list(csv.DictReader((folder / "rank.csv").open(encoding="utf-8", newline="")))


def by_name(rows: Rows) -> dict[str, str]:
    return {Path(row["path"]).name: row["loss"] for row in rows}


def test_a_caption_of_another_picture_comes_first(run: Run, shapes: Path, tmp_path: Path) -> None:
    (shapes / "00005.txt").write_text("a large red circle on a green background")
    rows = run("task.worst=3")
    assert rows[0]["caption"] == "a large red circle on a green background"
    losses = [float(row["loss"]) for row in rows]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 2 * losses[1]
    assert 3 * 256 < Image.open(tmp_path / "rank.png").size[0] < 4 * 256


def test_each_caption_of_an_image_is_ranked_and_the_loss_is_the_mean_over_timesteps(run: Run, shapes: Path) -> None:
    right = (shapes / "00005.txt").read_text().strip()
    (shapes / "00005.txt").write_text(f"{right}\na large red circle on a green background")
    rows = run("task.timesteps=2")
    assert len(rows) == 9
    assert [row["caption"] for row in rows if row["path"].endswith("00005.png")][1] == right
    for row in rows:
        each = [float(row[f"loss at t={t}"]) for t in (250, 750)]
        assert float(row["loss"]) == pytest.approx(sum(each) / 2)
        assert row["size"] == "64x64"


def test_a_loss_depends_on_no_other_image_nor_on_weights_of_concepts(run: Run, shapes: Path, tmp_path: Path) -> None:
    whole = by_name(run())
    (tmp_path / "few").mkdir()
    for number in (7, 2):
        for suffix in (".png", ".txt"):
            shutil.copy(shapes / f"{number:05d}{suffix}", tmp_path / "few")
    few = ["data.path=null", f"data.concepts.few.path={tmp_path / 'few'}", "data.concepts.few.loss_weight=3"]
    for name, loss in by_name(run(*few, "data.concepts.few.seed=5")).items():
        assert float(loss) == pytest.approx(float(whole[name]), rel=1e-5)


def test_what_was_trained_is_ranked_from_its_file_and_from_its_checkpoint(
    settings: Callable[..., DictConfig], sd15_folder: Path, shapes: Path, tmp_path: Path
) -> None:
    for path in sorted(shapes.iterdir())[4:]:
        path.unlink()
    common = [f"model.checkpoint={sd15_folder}", f"data.path={shapes}", "data.resolution=64", "data.batch_size=4"]
    common += ["data.workers=0", f"data.cache_dir={tmp_path / 'cache'}", "logger=none", "output.dtype=fp32"]
    (tmp_path / "run").mkdir()
    train(settings(*common, "trainer.max_steps=2", "optimizer.lr=0.01"), folder=tmp_path / "run")

    def ranked(name: str, *overrides: str) -> dict[str, str]:
        (tmp_path / name).mkdir()
        rank(settings(*common, *overrides), timesteps=2, folder=tmp_path / name)
        return by_name(read(tmp_path / name))

    before = ranked("before")
    file = ranked("file", f"method.from_file={tmp_path / 'run' / 'final.safetensors'}", "method.targets=file")
    resumed = ranked("resumed", f"resume={tmp_path / 'run' / 'checkpoints'}")
    for name, loss in file.items():
        assert float(resumed[name]) == pytest.approx(float(loss), rel=1e-4)
        assert float(before[name]) != pytest.approx(float(loss), rel=1e-3)


def test_a_ranking_leaves_what_training_uses_of_the_cache_in_use(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a dataset's records the newest counts, so that a ranking has to be one of its own."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    run("task.timesteps=1")
    assert not torch.backends.cudnn.allow_tf32, "a ranking rounds other than training"
    assert [use.dataset.endswith("StableDiffusion, ranked") for use in records(tmp_path / "cache")] == [True]


def test_an_earlier_ranking_is_not_written_over_unasked(run: Run, tmp_path: Path) -> None:
    (tmp_path / "rank.csv").write_text("path\n")
    with pytest.raises(SettingsError, match=r"rank\.csv is an earlier ranking"):
        run("output.overwrite=false")


def test_what_is_no_number_is_the_worst() -> None:
    samples = [Sample(Path(f"{number}.png"), Size(8, 8), [""]) for number in range(4)]
    placed = layout(samples, Data(), resolution=8, step=8, seed=0)
    measured = [
        (torch.tensor([2, 0]), torch.tensor([[1.0, 2.0], [3.0, 1.0]])),
        (torch.tensor([3, 1]), torch.tensor([[9.0, 9.0], [math.nan, 0.0]])),
    ]
    assert [each.sample.name for each in worst_first(placed, measured)] == ["1.png", "3.png", "0.png", "2.png"]


@pytest.mark.parametrize(("devices", "warned"), [("1", False), ("2", True)])
def test_one_device_is_used_and_that_is_said(
    settings: Callable[..., DictConfig], caplog: pytest.LogCaptureFixture, devices: str, warned: bool
) -> None:
    copy = on_one_device(settings(f"trainer.devices={devices}", "trainer.accelerator=cpu"))
    assert copy.trainer.devices == 1
    assert ("uses the first" in caplog.text) == warned
