"""How long a run is, and what its images are called."""

import pytest
from omegaconf import OmegaConf

from otl.config import SettingsError
from otl.methods.embedding import Embedding
from otl.modules.stable_diffusion import StableDiffusion
from otl.tasks.run import DEFAULT_STEPS, build_module, data_options, total_steps, try_optimizer


def steps(batches, *, max_steps=None, max_epochs=None, accumulate=1):
    trainer = OmegaConf.create(
        {"max_steps": max_steps, "max_epochs": max_epochs, "accumulate_grad_batches": accumulate}
    )
    return total_steps(trainer, batches)


def test_epochs_count_optimizer_steps_and_the_last_partial_accumulation_is_one():
    assert steps(10, max_epochs=3) == 30
    assert steps(10, max_epochs=3, accumulate=4) == 9


def test_whichever_ends_first_ends_the_run():
    assert steps(10, max_steps=12, max_epochs=3) == 12
    assert steps(10, max_steps=50, max_epochs=3) == 30


def test_without_either_there_is_a_default():
    assert steps(10) == DEFAULT_STEPS


def test_a_run_of_no_steps_is_an_error_that_says_what_to_do():
    with pytest.raises(SettingsError, match=r"no step.*data\.batch_size.*data\.partial_batches=keep"):
        steps(0, max_steps=10)
    with pytest.raises(SettingsError, match="no step"):
        steps(10, max_epochs=0)


def test_templates_are_prompts_and_need_them_among_the_sources(settings):
    module = StableDiffusion("nowhere/at-all")
    module.method = Embedding(embeddings={"cat": {}}, templates=["a {}", "the {}"])
    assert data_options(settings("data.path=."), module).prompt == "a <cat>\nthe <cat>"
    with pytest.raises(SettingsError, match=r"method\.templates.*data\.captions\.sources has no prompt"):
        data_options(settings("data.path=.", "data.captions.sources=[file]"), module)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["+optimizer.fused=true", "+optimizer.foreach=true"], "optimizer: torch.optim.AdamW says: .*fused.*foreach"),
        (
            ["optimizer=adamw8bit", "+optimizer.optim_bits=7"],
            "optimizer: bitsandbytes.optim.AdamW8bit says: .*optim_bits",
        ),
    ],
)
def test_what_an_optimizer_refuses_is_told_before_anything_is_loaded(settings, lines, said):
    with pytest.raises(SettingsError, match=said):
        try_optimizer(build_module(settings("data.path=.", "logger=none", *lines)))


@pytest.mark.parametrize("name", ["adafactor", "adamw", "adamw8bit", "lion", "prodigy"])
def test_every_optimizer_can_be_made(settings, name):
    try_optimizer(build_module(settings("data.path=.", "logger=none", f"optimizer={name}")))
