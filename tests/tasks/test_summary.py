"""What is said of a run before it and after it."""

import logging

import pytest

from otl.tasks import summary
from otl.tasks.train import train


def table(folder, rows):
    path = folder / "metrics.csv"
    path.write_text(
        "\n".join(["step,loss,val_loss", *(f"{step},{loss},{val}" for step, (loss, val) in enumerate(rows))])
    )
    return path


def test_losses_are_the_middle_of_the_first_and_of_the_last_tenth(tmp_path):
    rows = [(loss, "") for loss in [9, 5, 7, *[1] * 24, 0.5, 0.25, 8]]
    assert summary.losses(table(tmp_path, rows)) == "7.0000 at first, 0.5000 at last"


def test_the_last_loss_of_held_out_images_is_told_and_skipped_steps_are_left_out(tmp_path):
    assert summary.losses(table(tmp_path, [(2, ""), ("", ""), (1, 3), (1, 0.5)])).endswith(
        "1.0000 at last, held out 0.5000"
    )


def test_without_a_table_nothing_is_made_up(tmp_path):
    assert summary.losses(tmp_path / "metrics.csv") == "not written down"
    assert summary.losses(table(tmp_path, [("", "")])) == "not measured"


def test_pictures_are_where_they_lie_with_a_sheet_and_without(tmp_path):
    folder = tmp_path / "samples"
    assert summary.pictures(folder) == "none were drawn"
    (folder / "step-000003").mkdir(parents=True)
    assert summary.pictures(folder) == "none were drawn"
    (folder / "step-000003" / "0.png").touch()
    assert summary.pictures(folder) == str(folder)
    (folder / "before-after.png").touch()
    assert summary.pictures(folder) == str(folder / "before-after.png")


@pytest.mark.parametrize("kept", [True, False])
def test_five_lines_before_and_five_after(kept, settings, sd15_folder, tmp_path, caplog):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "photos" / "0.png")
    line = [f"model.checkpoint={sd15_folder}", f"data.path={tmp_path / 'photos'}", "data.prompt=a", "logger=none"]
    line += ["data.resolution=64", "data.workers=0", "data.batch_size=1", f"data.cache_dir={tmp_path / 'cache'}"]
    line += ["trainer.max_steps=1", "callbacks.sampling=null"] + ["callbacks.checkpoint=null"] * (not kept)
    (tmp_path / "run").mkdir()
    with caplog.at_level(logging.INFO, logger="otl.tasks"):
        train(settings(*line), tmp_path / "run")
    own = [record for record in caplog.records if record.name.startswith("otl.tasks")]
    said = [record.message for record in own if record.levelno == logging.INFO]
    begun = next(number for number, line in enumerate(said) if line.startswith("on cpu"))
    assert [line.split()[0] for line in said[begun - 4 : begun]] == ["precision", "StableDiffusion", "1", "1"]
    assert [line.split()[0] for line in said[-5:]] == ["1", "loss", "result", "pictures", "all"]
    assert ("checkpoints" in said[-1]) == kept
