"""Which precision a machine without a GPU trains in, and why."""

import pytest
import torch

from otl.config import SettingsError
from otl.tasks.precision import choose


def test_auto_is_fp32_without_a_gpu_and_says_why():
    chosen = choose("auto", accelerator="cpu")
    assert (chosen.name, chosen.autocast, chosen.reason) == ("32-true", None, "no GPU is used")


def test_bf16_works_on_a_cpu_when_asked_for():
    assert choose("bf16-mixed", accelerator="cpu").autocast == torch.bfloat16


def test_fp16_is_refused_without_a_gpu():
    with pytest.raises(SettingsError, match=r"trainer\.precision=16-mixed: fp16 needs a GPU"):
        choose("16-mixed", accelerator="cpu")


def test_an_unknown_precision_lists_the_known_ones():
    with pytest.raises(SettingsError, match="auto, 32-true, bf16-mixed, 16-mixed"):
        choose("8-true")
