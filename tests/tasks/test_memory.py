"""The plan's weights at full size, against what users of these models are told."""

import io

import pytest
from rich.console import Console

from otl.tasks import tables
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


UNET, CLIP_L = 859_520_964, 123_060_480  # published


@pytest.mark.parametrize(
    ("line", "trained", "added"),
    [
        (["method=lora", "method.rank=16"], (6_782_976, 0), (6_782_976, 0)),  # published at rank 16
        (["method=lora", "method.rank=16", "method.embeddings.cat.vectors=2"], (6_782_976, 1536), (6_782_976, 1536)),
        (["method=embedding", "method.embeddings.cat={vectors: 3, output: true}"], (0, 2304), (0, 4608)),
        (["method=finetune"], (UNET, 0), (0, 0)),
        (["method=finetune", "method.targets=[conv_in]"], (4 * 320 * 9 + 320, 0), (0, 0)),
        (["method=finetune", "method.embeddings.cat.vectors=1"], (UNET, 768), (0, 768)),
    ],
)
def test_what_a_method_adds_is_not_among_the_weights_of_the_checkpoint(line, trained, added, settings):
    module = build_module(settings("model=sd15", "model.dtype=bf16", "data.path=x", "logger=none", *line))
    module.build_skeleton()
    rows = {row["part"]: row for row in weights(module)}
    parts = rows["unet"], rows["text_encoder"]
    assert tuple(row["parameters"] for row in parts) == (UNET, CLIP_L)
    assert tuple(row["trained"] for row in parts) == trained
    assert tuple((row["added"], row["added_bytes"]) for row in parts) == tuple((n, 4 * n) for n in added)
    whole = line[0] == "method=finetune"
    assert tuple(row["bytes"] for row in parts) == (UNET * (4 if whole else 2), CLIP_L * 2)


def test_the_table_shows_them_apart_and_whole_where_a_line_has_80_characters():
    row = {"part": "text_encoder_2", "parameters": 2_567_463_684, "trained": 42_557_440, "dtype": "float32"}
    row |= {"bytes": 4 * 2_567_463_684, "added": 42_557_440, "added_bytes": 4 * 42_557_440}
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(tables.weights({"weights": [row]}))
    shown = console.export_text()
    assert all(text in shown for text in ("text_encoder_2", "float32", "2,567.464", "10.27", "42.557", "170.2"))
    assert "…" not in shown
