"""Learning rates of parts and of embeddings reach the optimizer; the others take its own."""

import pytest

from otl.tasks.run import build_module

PARTS = "method.parts={denoiser: {}, text_encoder: {lr: 1e-5}}"
CAT = "+method.embeddings.cat={placeholder: '<cat>', vectors: 2, lr: 1e-2}"


@pytest.mark.parametrize(
    ("words", "rates"),
    [
        (["method=lora", PARTS], {"unet": 1e-3, "text_encoder": 1e-5}),
        (["method=finetune", PARTS], {"unet": 1e-3, "text_encoder": 1e-5}),
        (["method=lora", CAT], {"unet": 1e-3, "embedding.cat.text_encoder": 1e-2}),
        (["method=embedding", CAT], {"embedding.cat.text_encoder": 1e-2}),
    ],
)
def test_each_part_and_each_embedding_has_its_own_rate(words, rates, settings, sd15_folder):
    line = [f"model.checkpoint={sd15_folder}", "data.path=x", "logger=none", "optimizer.lr=1e-3"]
    module = build_module(settings(*line, *words))
    module.configure_model()
    module.total_steps, module.steps_per_epoch = 10, 5
    found = module.configure_optimizers()["optimizer"].param_groups
    assert {group["name"]: group["lr"] for group in found} == rates
