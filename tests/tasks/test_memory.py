"""The plan's weights at full size, against what users of these models are told."""

import pytest

from otl.tasks.memory import weights
from otl.tasks.run import build_module

TOLD = [  # GB in fp32, as in OneTrainer's guide
    ("sd15", {"unet": 3.44, "text_encoder": 0.49, "vae": 0.33}),
    ("sd21", {"unet": 3.46, "text_encoder": 1.36}),
    ("sdxl", {"unet": 10.3, "text_encoder": 0.49, "text_encoder_2": 2.78}),
    ("stable_cascade", {"prior": 14.4, "text_encoder": 2.8}),
    ("stable_cascade_lite", {"prior": 4.1, "text_encoder": 2.8}),
    ("pixart_alpha", {"transformer": 2.4, "text_encoder": 19.0}),
]


@pytest.mark.parametrize(("model", "told"), TOLD)
def test_the_weights_table_says_what_users_are_told(model, told, settings):
    module = build_module(settings(f"model={model}", "model.dtype=fp32", "data.path=x", "logger=none"))
    module.method = None
    module.build_skeleton()
    planned = {row["part"]: row["bytes"] / 1e9 for row in weights(module)}
    for part, gigabytes in told.items():
        assert planned[part] == pytest.approx(gigabytes, rel=0.02)


def test_in_bf16_the_text_encoder_of_cascade_takes_half(settings):
    module = build_module(settings("model=stable_cascade", "model.dtype=bf16", "data.path=x", "logger=none"))
    module.method = None
    module.build_skeleton()
    planned = {row["part"]: row["bytes"] / 1e9 for row in weights(module)}
    assert planned["text_encoder"] == pytest.approx(1.39, rel=0.01)
