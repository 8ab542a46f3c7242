"""Pictures are drawn where they should be, and the training does not notice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from otl.callbacks.checkpoint import Checkpoint
from otl.callbacks.ema import EMA
from otl.callbacks.sampling import Sampling, before_after, canvases_of, slug, write
from otl.config import Data, Inpaint, SampleOptions, SettingsError
from otl.types import Sample, Size

from .conftest import Run, TinyModule

PROMPTS = ["A small red circle, on a blue background: photo!", "ein schöner Würfel"]


def prompts(module: TinyModule) -> None:
    module.sample_options.prompts = PROMPTS
    module.sample_options.seeds = [0, 5, 7]


def test_files_carry_step_prompt_and_seed(run: Run, tmp_path: Path) -> None:
    run(Sampling(every=2), steps=3, change=prompts)
    folder = tmp_path / "run/samples"
    for step in (0, 2, 3):
        assert sorted(path.name for path in (folder / f"step-{step:06d}").iterdir()) == [
            f"{k:02d}-{slug(prompt)}-seed{seed}.png" for k, prompt in enumerate(PROMPTS) for seed in (0, 5, 7)
        ]
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == [
        "before-after.png",
        *[f"step-{step:06d}.{suffix}" for step in (0, 2, 3) for suffix in ("json", "png")],
    ]


def test_the_call_is_kept_beside_the_pictures(run: Run, tmp_path: Path) -> None:
    run(Sampling(every=None), steps=1, change=prompts)
    call = json.loads((tmp_path / "run/samples/step-000001.json").read_text())
    assert {k: call[k] for k in ("steps", "guidance", "height", "width")} == {
        "steps": 25, "guidance": 6.0, "height": 8, "width": 8,
    }  # fmt: skip
    assert [(p["prompt"], p["seed"]) for p in call["pictures"]] == [(p, s) for p in PROMPTS for s in (0, 5, 7)]
    seed_five = Image.open(tmp_path / "run/samples" / call["pictures"][1]["file"])
    assert seed_five.getpixel((0, 0))[1:] == (5, len(PROMPTS[0]))


def test_the_training_is_the_same_with_and_without(run: Run) -> None:
    plain = run(EMA(0.9), steps=7)
    drawn = run(Sampling(every=2), EMA(0.9), steps=7, change=prompts)
    assert drawn.losses == plain.losses
    assert torch.equal(drawn.net.weight, plain.net.weight)
    assert drawn.dropout.training


def test_pictures_are_drawn_in_eval_mode_by_the_average(run: Run) -> None:
    drawn = run(Sampling(every=3), EMA(0.9), steps=5, change=prompts)
    assert drawn.draws == [(0, True, False), (3, True, True), (5, True, True)]


@pytest.mark.parametrize("steps", [3, 4])
def test_steps_are_optimizer_steps_and_none_is_drawn_twice(run: Run, steps: int) -> None:
    drawn = run(Sampling(every=2, first=False), steps=steps, accumulate=2, change=prompts)
    assert [step for step, *_ in drawn.draws] == [2, steps] if steps == 3 else [2, 4]


def test_a_resumed_run_does_not_draw_again_and_still_compares(run: Run, tmp_path: Path) -> None:
    run(Sampling(every=2), Checkpoint(every=2), steps=2, total=3, change=prompts)
    (tmp_path / "run/samples/before-after.png").unlink()
    resumed = run(
        Sampling(every=2), Checkpoint(), steps=3, change=prompts, ckpt=tmp_path / "run/checkpoints/step-00000002.ckpt"
    )
    assert [step for step, *_ in resumed.draws] == [3]
    assert (tmp_path / "run/samples/before-after.png").is_file()


def test_before_and_after_are_two_rows_for_each_prompt(run: Run, tmp_path: Path) -> None:
    module = run(Sampling(every=None), steps=5, change=prompts)
    page = Image.open(tmp_path / "run/samples/before-after.png")
    sheet = Image.open(tmp_path / "run/samples/step-000005.png")
    assert page.width == sheet.width == 8 + 3 * (192 + 8)  # pictures of 8 px are shown at 192 px
    assert page.height >= 4 * 192 > sheet.height >= 2 * 192
    first, last = (Image.open(next((tmp_path / f"run/samples/step-{k:06d}").glob("00*seed0.png"))) for k in (0, 5))
    colours = {colour for _, colour in page.getcolors(1 << 20)}
    assert {first.getpixel((0, 0)), last.getpixel((0, 0))} <= colours
    assert first.getpixel((0, 0)) != last.getpixel((0, 0))
    pixels = numpy.asarray(page)
    top = [(pixels == picture.getpixel((0, 0))).all(2).any(1).argmax() for picture in (first, last)]
    assert top[0] + 192 <= top[1]
    assert module.draws[0][0] == 0


def test_other_prompts_after_a_resume_are_not_compared(
    run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run(Sampling(every=None), Checkpoint(), steps=2, total=3, change=prompts)
    (tmp_path / "run/samples/before-after.png").unlink()

    def other(module: TinyModule) -> None:
        module.sample_options.prompts = ["something else"]

    run(Sampling(every=None), Checkpoint(), steps=3, change=other, ckpt=tmp_path / "run/checkpoints/step-00000002.ckpt")
    assert not (tmp_path / "run/samples/before-after.png").exists()
    assert "sample settings are others" in caplog.text


def test_no_prompts_is_said_once_and_draws_nothing(run: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    assert run(Sampling(every=1), steps=2).draws == []
    assert not (tmp_path / "run/samples").exists()
    assert caplog.text.count("sample.prompts is empty") == 1


def test_tensorboard_gets_the_pictures(run: Run, tmp_path: Path) -> None:
    run(Sampling(every=None), steps=1, change=prompts, logger=TensorBoardLogger(tmp_path, name="", version="tb"))
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"images": 0}).Reload()
    tag = f"samples/00-{slug(PROMPTS[0])}-seed5"
    assert [event.step for event in events.Images(tag)] == [0, 1]
    assert len(events.Tags()["images"]) == 6


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("A photo of sks, red!", "a-photo-of-sks-red"), ("", "empty"), ("?!", "empty"), ("x" * 99, "x" * 40)],
)
def test_slugs_are_short_and_plain(prompt: str, expected: str) -> None:
    assert slug(prompt) == expected


def test_prompts_without_seeds_are_refused(run: Run) -> None:
    def seedless(module: TinyModule) -> None:
        module.sample_options.prompts, module.sample_options.seeds = ["a"], []

    with pytest.raises(SettingsError, match=r"sample\.seeds"):
        run(Sampling(), steps=1, change=seedless)


def painted(folder: Path, step: int, shade: int) -> SampleOptions:
    """What a run of an inpainting model leaves: one prompt twice, each time in another picture."""
    options = SampleOptions(prompts=["a cat", "a cat"], seeds=[0, 1], image=["a.png", "b.png"], mask="m.png")
    pictures = [Image.new("RGB", (200, 200), (shade, 0, 50 * number)) for number in range(4)]
    given = [Image.new("RGB", (200, 200), (0, 255, 100 * number)) for number in range(2)]
    write(folder, step, options, Size(200, 200), pictures, given, average=False)
    return options


def test_what_was_painted_in_is_the_first_column(tmp_path: Path) -> None:
    painted(tmp_path, 5, 0)
    page = Image.open(tmp_path / "step-000005.png").convert("RGB")
    plain = [picture for picture in page.getcolors(page.width * page.height) if picture[0] >= 200 * 200]
    assert {color for _, color in plain} >= {
        (0, 255, 0),
        (0, 255, 100),
        (0, 0, 0),
        (0, 0, 50),
        (0, 0, 100),
        (0, 0, 150),
    }
    left = page.crop((0, 0, 208, page.height)).getcolors(208 * page.height)
    assert {color for count, color in left if count >= 200 * 200} == {(0, 255, 0), (0, 255, 100)}
    call = json.loads((tmp_path / "step-000005.json").read_text())
    assert (call["image"], call["mask"]) == (["a.png", "b.png"], "m.png")
    assert [Image.open(tmp_path / file).getpixel((0, 0)) for file in call["given"]] == [(0, 255, 0), (0, 255, 100)]


def test_one_prompt_in_two_pictures_is_compared_in_two_pairs_of_rows(tmp_path: Path) -> None:
    painted(tmp_path, 0, 0)
    painted(tmp_path, 7, 255)
    path = before_after(tmp_path, 7)
    assert path is not None
    page = Image.open(path).convert("RGB")
    reds = {color for count, color in page.getcolors(page.width * page.height) if count >= 200 * 200}
    assert reds >= {(shade, 0, 50 * number) for shade in (0, 255) for number in range(4)}


def test_without_a_picture_the_first_image_is_painted_in_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGB", (60, 40), "red").save(tmp_path / "first.png")
    options = SampleOptions(prompts=["a", "b"])
    module = SimpleNamespace(inpaints=True, sample_options=options, inpaint_options=Inpaint(), seed=0)
    samples = [Sample(tmp_path / "first.png", Size(40, 60), [""])]
    trainer = SimpleNamespace(datamodule=SimpleNamespace(samples=samples, data=Data()))
    with caplog.at_level("INFO"):
        one, two = canvases_of(trainer, module, Size(32, 48))
    assert one is two and one.pixels.shape == (3, 32, 48) and 0 < one.mask.mean() < 1
    assert "first.png" in caplog.text and "sample.image" in caplog.text
    assert torch.equal(canvases_of(trainer, module, Size(32, 48))[0].mask, one.mask)
    assert canvases_of(trainer, SimpleNamespace(inpaints=False), Size(32, 48)) is None
