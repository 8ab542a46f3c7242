"""The benchmarks run at their smallest, and their numbers are what they are called."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import cache, flops, formats, index, loader, many, photos, pixels, report, startup, train, versus
from otl.config import register
from otl.types import Size


def numbers(found: Any) -> list[float]:
    """Every number in nested dicts and lists."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list):
        return [number for each in found for number in numbers(each)]
    return [float(found)] if isinstance(found, int | float) else []


def all_positive(found: Any) -> bool:
    values = numbers(found)
    return bool(values) and all(math.isfinite(value) and value > 0 for value in values)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_training_is_timed_beside_the_plain_loops(family: str, tmp_path: Path) -> None:
    line = ["--size", "tiny", "--blocks", "2", "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "train.json")]
    results = train.main([*line, "--families", family])
    (case,) = results["cases"]
    assert "error" not in case, case.get("error")
    assert set(case["loops"]) == {"otl", "bare", "diffusers"}
    assert all_positive({name: case["loops"][name]["step_ms"] for name in case["loops"]})
    assert all_positive([case["loops"]["bare"][f"otl_{clock}_ratio"] for clock in ("wall", "processor")])
    assert all_positive([case["flops_per_step"], case["matmul_flops_per_second"]])
    assert {name: len(loop["wall"]) for name, loop in case["blocks"].items()} == dict.fromkeys(case["loops"], 2)
    assert case["loss_difference"] < 1e-4
    assert (tmp_path / "train.json").is_file()


@pytest.mark.slow
@pytest.mark.long
def test_the_start_is_timed_stage_by_stage(tmp_path: Path) -> None:
    results = startup.main(["--rounds", "1", "--images", "2", "--out", str(tmp_path / "startup.json")])
    seconds = {name: spread["median"] for name, spread in results["cases"][0]["seconds"].items()}
    assert all_positive(seconds)
    assert seconds["libraries imported, settings checked, cache empty"] <= seconds["images scanned, cache empty"]
    assert seconds["images scanned, cache empty"] <= seconds["first step, cache empty"]
    assert {"--help", "task=plan", "imports alone", "first step, cache filled"} <= set(seconds)


@pytest.mark.slow
@pytest.mark.long
def test_the_index_and_the_plan_of_many_images_are_timed(tmp_path: Path) -> None:
    results = index.main(["--images", "9", "--rounds", "1", "--out", str(tmp_path / "index.json")])
    assert results["index"]["images"]["median"] == results["plan"]["images"]["median"] == 9
    assert all_positive([results[part][clock] for part in ("index", "plan") for clock in ("wall", "processor")])
    assert results["index"]["peak_bytes"]["median"] > 50 * 2**20  # torch alone takes more


@pytest.mark.parametrize("encoder", ["none", "narrow"])
def test_the_cache_is_filled_beside_work_by_hand(encoder: str, tmp_path: Path) -> None:
    small = ["--images", "3", "--height", "96", "--width", "128", "--resolution", "64", "--rounds", "1"]
    line = [*small, "--encoder", encoder, "--device", "cpu", "--out", str(tmp_path / "cache.json")]
    (case,) = cache.main(line)["cases"]
    assert (
        set(case["contenders"])
        == {"none": {"otl", "pillow", "pillow, reduced"}, "narrow": {"otl", "vae alone"}}[encoder]
    )
    assert all_positive(case["contenders"])


def test_pixels_are_timed_beside_other_libraries(tmp_path: Path) -> None:
    line = ["--side", "64", "--shrink", "8", "--rounds", "1", "--out", str(tmp_path / "pixels.json")]
    cases = pixels.main(line)["cases"]
    assert [case["kind"] for case in cases] == ["jpg", "jpg", "jpg", "png", "webp"]
    assert all_positive([case["contenders"] for case in cases])
    # The same pixels as Pillow's own filter makes, but for its sharpness: a crop one pixel off is 5 levels off.
    assert all(case["contenders"]["otl"]["levels_off"] < 2 for case in cases)
    assert all(case["best"] != "otl" for case in cases)


def test_the_loader_is_timed(tmp_path: Path) -> None:
    small = ["--samples", "6", "--latents", "8", "--tokens", "3", "--workers", "0", "--rounds", "1"]
    assert all_positive(loader.main([*small, "--folder", str(tmp_path), "--out", str(tmp_path / "loader.json")]))


def test_the_memory_of_very_many_samples_is_looked_at_during_an_epoch(tmp_path: Path) -> None:
    small = ["--samples", "200", "--batch-size", "4", "--workers", "1"]
    results = many.main([*small, "--folder", str(tmp_path), "--out", str(tmp_path / "many.json")])
    assert results["samples"] == 200 and len(results["during"]) == many.PARTS
    assert all_positive(results["during"])


def test_ways_to_keep_a_cache_are_timed(tmp_path: Path) -> None:
    results = formats.main(["--entries", "16", "--tiny", "50", "--out", str(tmp_path / "formats.json")])
    assert {"otl"} < {name.lower() for name in results["formats"]}
    assert all_positive(results["formats"])


def test_pixels_by_hand_are_those_of_otl(tmp_path: Path) -> None:
    """What is compared does the same: apart from the rounding of two kinds of bicubic scaling."""
    from otl.datamodules import images, views

    path = photos.write(tmp_path, 1, height=240, width=320) / "photo-0000.jpg"
    own = images.pixels(path, views.centred(Size(240, 320), Size(64, 64)), "white")
    by_hand = cache.pixels(path, 64, reduced=False)
    assert own.shape == by_hand.shape
    assert (own - by_hand).abs().mean() < 0.02  # of a range of 2; a crop one pixel off gives 0.03


@pytest.mark.slow
@pytest.mark.parametrize(("family", "side", "teraflops"), [("sd15", 512, 1.75), ("sdxl", 1024, 14.35)])
def test_the_flops_of_a_lora_step(family: str, side: int, teraflops: float) -> None:
    """Against a count made apart from OTL, with the UNets of diffusers and PEFT alone."""
    register()
    assert flops.training_flops([f"model={family}"], Size(side, side), 1) == pytest.approx(teraflops * 1e12, rel=0.01)


def test_the_ceiling_is_finite_and_positive() -> None:
    assert all_positive(flops.matmul_ceiling(torch.device("cpu"), torch.float32))


def test_ratios_are_of_neighbours() -> None:
    """A machine that becomes three times as slow half-way changes neither ratio."""
    assert report.ratios([1.1, 3.3], [1.0, 3.0]) == pytest.approx({"min": 1.1, "median": 1.1, "max": 1.1})


def test_a_loop_that_computes_something_else_is_refused() -> None:
    class Own:
        autocast_dtype = None

        def autocast(self) -> Any:
            return torch.no_grad()

        def losses(self, *arguments: Any, **options: Any) -> torch.Tensor:
            return torch.ones(2)

    class Other:
        def forward(self) -> torch.Tensor:
            return torch.tensor(1.01)

    class Keyed:
        key = torch.tensor([1, 2])

    with pytest.raises(RuntimeError, match="differ in what they do"):
        versus.loss_difference(Own(), Keyed(), Other())  # type: ignore[arg-type]


def test_the_loader_is_given_time_to_use_up_what_it_made_ahead() -> None:
    """torch's loader keeps two batches ready for each worker."""
    assert train.settle(2) > 2 * 2
