"""Settings of the training and its pictures that make no sense together."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import DictConfig

from otl.check import check
from otl.choices import STRATEGIES
from otl.config import assets_dir

PICTURE = assets_dir() / "quickstart" / "00000.png"
HERE = f"[{PICTURE}]"
UNFITTING = ("fast_dev_run=2", "limit_train_batches=1", "overfit_batches=1", "barebones=true", "default_root_dir=x")


@pytest.mark.parametrize(
    ("lines", "key", "text"),
    [
        *(([f"trainer.{name}"], f"trainer.{name.partition('=')[0]}", "has no place in a run") for name in UNFITTING),
        (
            ["trainer.gradient_clip_algorithm=value", "trainer.gradient_clip_val=null"],
            "trainer.gradient_clip_algorithm",
            "trainer.gradient_clip_val says how much",
        ),
        (["trainer.min_steps=9"], "trainer.min_steps", "nothing ends the run"),
        (
            ["trainer.check_val_every_n_epoch=2", "trainer.val_check_interval=9", "data.validation_share=0.1"],
            "trainer.check_val_every_n_epoch",
            "2 would have no effect beside trainer.val_check_interval=9",
        ),
        (["trainer.limit_val_batches=3"], "trainer.limit_val_batches", "no image is held out"),
        (["trainer.check_val_every_n_epoch=2"], "trainer.check_val_every_n_epoch", "no image is held out"),
        ([f"sample.image={HERE}"], "sample.image", "give sample.mask too"),
        ([f"sample.mask={HERE}"], "sample.mask", "give sample.image too"),
        (
            ["sample.prompts=[a,b,c]", f"sample.image=[{PICTURE},{PICTURE}]", f"sample.mask={PICTURE}"],
            "sample.image",
            "2 files for 3 prompts",
        ),
        (["scheduler.warmup=100", "trainer.max_steps=100"], "scheduler.warmup", "100 steps of warm-up"),
        (["resume=auto", "callbacks.checkpoint=null"], "resume", "callbacks.checkpoint=null makes none"),
        (["allow_changes=true"], "allow_changes", "it needs resume=auto"),
    ],
)
def test_what_makes_no_sense_is_refused(
    settings: Callable[..., DictConfig], lines: list[str], key: str, text: str
) -> None:
    found = {problem.key: problem.message for problem in check(settings("data.path=.", *lines))}
    assert list(found) == [key]
    assert text in found[key]


@pytest.mark.parametrize(
    "lines",
    [
        ["scheduler.warmup=99", "trainer.max_steps=100"],
        ["scheduler.warmup=0.5", "trainer.max_steps=100"],
        ["scheduler.warmup=500"],
        ["trainer.limit_val_batches=3", "trainer.check_val_every_n_epoch=2", "data.validation_share=0.1"],
        ["trainer.min_steps=9", "trainer.max_time=00:01:00:00"],
        ["trainer.max_time={hours: 1}"],
        ["optimizer=prodigy"],
        ["optimizer.lr=1"],  # the plan warns of it
        ["trainer.val_check_interval=4", "data.validation_share=0.1"],
        ["trainer.val_check_interval=4", "data.concepts.a.path=..", "data.concepts.a.type=validation"],
        ["callbacks.checkpoint.best=true", "data.concepts.a.path=..", "data.concepts.a.validation_share=0.5"],
        ["callbacks.checkpoint=null"],
        ["callbacks.checkpoint=null", f"resume={__file__}", "allow_changes=true"],
        ["model=sd15_inpaint", "sample.prompts=[a,b]", f"sample.image={HERE}", f"sample.mask=[{PICTURE},{PICTURE}]"],
        ["sample.seeds=[]"],
        ["task=cache", "trainer.val_check_interval=4"],
        ["trainer.strategy=fsdp", "trainer.profiler=null", "trainer.gradient_clip_algorithm=value"],
    ],
)
def test_what_makes_sense_is_accepted(settings: Callable[..., DictConfig], lines: list[str]) -> None:
    assert check(settings("data.path=.", *lines)) == []


def test_a_concept_that_is_switched_off_holds_nothing_out(settings: Callable[..., DictConfig]) -> None:
    concept = [f"data.concepts.a.{field}" for field in ("path=..", "type=validation", "enabled=false")]
    (problem,) = check(settings("data.path=.", "trainer.val_check_interval=4", *concept))
    assert problem.key == "trainer.val_check_interval"


def test_every_strategy_of_lightning_is_accepted() -> None:
    assert set(STRATEGIES) == {"auto", *StrategyRegistry.available_strategies()}
