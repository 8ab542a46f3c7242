"""Class images: what is missing is drawn once, from seeds of its own, and what is there is left alone."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from omegaconf import DictConfig
from PIL import Image

from otl.config import SettingsError
from otl.modules.base import DiffusionModule
from otl.tasks import disk, plan
from otl.tasks.classes import draw_missing


@pytest.fixture
def composed(settings, sd15_folder, tmp_path):
    def _composed(*overrides, generate=3) -> DictConfig:
        return settings(
            f"model.checkpoint={sd15_folder}",
            f"data.concepts.dogs.path={tmp_path / 'dogs'}",
            "data.concepts.dogs.type=regularisation",
            "data.concepts.dogs.prompt=a dog",
            f"data.concepts.dogs.generate={generate}",
            "data.resolution=64",
            "sample.steps=2",
            "sample.batch_size=2",
            "logger=none",
            *overrides,
        )

    return _composed


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_is_missing_is_drawn_and_what_is_there_stays(composed, tmp_path):
    folder = tmp_path / "dogs"
    draw_missing(composed(generate=2), autocast=None)
    first = contents(folder)
    assert len(first) == 2 and len(set(first.values())) == 2
    assert all(Image.open(path).size == (64, 64) for path in folder.iterdir())
    draw_missing(composed(generate=4), autocast=None)
    both = contents(folder)
    assert len(both) == 4 and both.items() >= first.items()


def test_a_picture_depends_on_seed_and_number_alone(composed, tmp_path):
    draw_missing(composed(), autocast=None)
    whole = contents(tmp_path / "dogs")
    (tmp_path / "dogs" / "class-00001.png").unlink()
    draw_missing(composed(), autocast=None)
    assert contents(tmp_path / "dogs") == whole


def test_several_prompts_take_turns(composed, tmp_path):
    draw_missing(composed("data.concepts.dogs.prompt='a dog\na cat'", generate=4), autocast=None)
    both = contents(tmp_path / "dogs")
    for path in (tmp_path / "dogs").iterdir():
        path.unlink()
    draw_missing(composed("data.concepts.dogs.prompt=a cat", generate=4), autocast=None)
    cats = contents(tmp_path / "dogs")
    assert {name: both[name] == cats[name] for name in both} == {
        f"class-{number:05d}.png": number % 2 == 1 for number in range(4)
    }


def test_they_are_drawn_on_the_first_gpu_of_the_settings(composed, monkeypatch):
    seen = []

    def draw(module, prompts, *_, **__):
        seen.append(module.device)
        return [Image.new("RGB", (64, 64))] * len(prompts)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(DiffusionModule, "draw", draw)
    draw_missing(composed("trainer.devices=[1]", generate=1), autocast=None)
    assert seen == [torch.device("cuda", 1)]


def test_photographs_count_and_nothing_is_loaded_where_there_are_enough(composed, tmp_path, monkeypatch):
    (tmp_path / "dogs").mkdir()
    for number in range(3):
        Image.new("RGB", (64, 64)).save(tmp_path / "dogs" / f"{number}.jpg")
    monkeypatch.setattr("otl.tasks.classes.build_module", lambda _: pytest.fail("a model was built"))
    draw_missing(composed(), autocast=None)


def test_without_a_prompt_it_is_refused(composed):
    with pytest.raises(SettingsError, match=r"data\.concepts\.dogs\.generate=3: .* set data\.concepts\.dogs\.prompt"):
        draw_missing(composed("data.concepts.dogs.prompt=null"), autocast=None)


def test_a_plan_counts_what_will_be_drawn(composed, tmp_path, monkeypatch, capsys, caplog):
    """One of 3 is there, and one photograph: 4 images in 5 epochs. Its sheet shows those that can be looked at."""
    for name in ("photos/mine.png", "dogs/class-00001.png"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (64, 64), (200, 0, len(name))).save(tmp_path / name)
    monkeypatch.setattr("otl.tasks.plan.run_dir", lambda: tmp_path)
    line = [f"data.path={tmp_path / 'photos'}", "data.prompt=sks", f"data.cache_dir={tmp_path / 'cache'}"]
    plan.plan(composed(*line, "trainer.max_epochs=5"))
    made = json.loads((tmp_path / "plan.json").read_text())
    assert (made["images_to_draw"], made["images_used"], made["images_cached"], made["total_steps"]) == (2, 4, 4, 20)
    assert made["buckets"] == [{"height": 64, "width": 64, "images": 4, "batches": 4}]
    assert made["disk"]["class_images"] == 2 * 3 * 64**2
    assert made["disk"]["total"] == sum(made["disk"][name] for name in ("run", "cache", "class_images"))
    assert "2 of all still to be drawn" in " ".join(capsys.readouterr().out.split())
    assert made["contact_sheet"]["pictures"] == 2 and "cannot be decoded" not in caplog.text
    (warning,) = [each for each in made["warnings"] if each["about"] == "data.concepts.dogs.path"]
    assert warning["message"].startswith(
        "2 images will be drawn before the run, as many as are missing; the plan counts"
    )


def test_class_images_that_have_no_room_are_not_begun(composed, tmp_path, monkeypatch):
    cfg = composed(f"data.cache_dir={tmp_path / 'cache'}")
    needs = {"class_image": 1000, "run": 0, "cache": 0, "checkpoints": 0, "checkpoint": 0, "results": 0, "result": 0}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2999))
    (problem,) = disk.problems(needs | {"drawings": 0, "drawing": 0}, cfg, tmp_path)
    assert problem.key == "data.concepts.dogs.path" and "3 class images of 1 kB" in problem.message
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=3000))
    assert disk.problems(needs | {"drawings": 0, "drawing": 0}, cfg, tmp_path) == []


def test_a_run_draws_them_and_trains_on_them_as_prior(composed, tmp_path):
    from otl.tasks.train import train

    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "mine.png")
    (tmp_path / "photos").mkdir()
    (tmp_path / "mine.png").rename(tmp_path / "photos" / "mine.png")
    cfg = composed(
        f"data.path={tmp_path / 'photos'}",
        "data.prompt=sks",
        "data.concepts.dogs.type=prior",
        f"data.cache_dir={tmp_path / 'cache'}",
        "data.workers=0",
        "logger=none",
        "trainer.max_steps=2",
    )
    (tmp_path / "run").mkdir()
    train(cfg, tmp_path / "run")
    assert (tmp_path / "run" / "final.safetensors").is_file()
    assert len(list((tmp_path / "dogs").iterdir())) == 3


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("scheduler.warmup=20", r"scheduler\.warmup: .* the run has 20"),  # 4 images, 5 epochs
        ("method.targets=[no_such_layer]", r"method\.targets: 'no_such_layer' matches no layer"),
    ],
)
def test_what_is_wrong_is_told_before_weights_are_loaded_to_draw(composed, tmp_path, monkeypatch, line, said):
    from otl.tasks.train import train

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "photos" / "mine.png")
    monkeypatch.setattr("otl.modules.loading.load", lambda *_, **__: pytest.fail("weights were loaded"))
    (tmp_path / "run").mkdir()
    with pytest.raises(SettingsError, match=said):
        train(
            composed(f"data.path={tmp_path / 'photos'}", "data.prompt=sks", "trainer.max_epochs=5", line),
            tmp_path / "run",
        )
    assert not (tmp_path / "dogs").exists()


def test_class_images_that_are_still_to_be_drawn_count_for_the_rules(composed, tmp_path, monkeypatch):
    """Of 4 images, in 5 epochs, 20 steps: a warm-up of 19 is right, though only one image is there."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "photos" / "mine.png")
    line = [f"data.path={tmp_path / 'photos'}", "data.prompt=sks", "trainer.max_epochs=5", "scheduler.warmup=19"]
    made, problems = plan.undrawn(composed(*line))
    assert made["total_steps"] == 20 and [problem for problem in problems if problem.fatal] == []
