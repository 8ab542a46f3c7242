"""Which precision a machine without a GPU trains in, and why."""

import pytest
import torch

from otl.config import SettingsError
from otl.tasks.precision import allow_tf32, choose, first_device


@pytest.fixture
def cuda(monkeypatch):
    """A machine with an old GPU and a new one."""
    current = [0]

    class Current:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            current[0] = self.number

        def __exit__(self, *_):
            current[0] = 0

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device", Current)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: ["T4", "L4"][current[0]])
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: current[0] == 1)


@pytest.fixture
def mps(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.parametrize(
    ("devices", "name", "reason"),
    [
        (1, "16-mixed", "T4 has no bf16 units"),
        ([1], "bf16-mixed", "L4 has bf16 units"),
        ("1,0", "bf16-mixed", "L4 has"),
    ],
)
def test_the_chosen_gpu_decides(cuda, devices, name, reason):
    chosen = choose("auto", devices=devices)
    assert (chosen.name, chosen.reason[: len(reason)]) == (name, reason)


def test_the_cpu_decides_where_it_is_asked_for_beside_a_gpu(cuda):
    assert choose("auto", accelerator="cpu").reason == "no GPU is used"


def test_on_an_apple_gpu_auto_is_fp32_and_fp16_is_refused(mps):
    assert choose("auto").name == "32-true"
    assert choose("bf16").autocast == torch.bfloat16
    with pytest.raises(SettingsError, match="fp16 needs a CUDA GPU"):
        choose("16-mixed")


@pytest.mark.parametrize(("devices", "first"), [(1, 0), (4, 0), ("auto", 0), (-1, 0), ([2, 3], 2), ("3,", 3)])
def test_the_first_device(devices, first):
    assert first_device(devices) == first


@pytest.mark.parametrize("earlier", [True, False])
@pytest.mark.parametrize(("asked", "kept"), [("auto", "high"), ("32-true", "highest")])
def test_tf32_is_for_mixed_precision_alone_in_products_and_convolutions(cuda, monkeypatch, asked, kept, earlier):
    """Whatever torch does by itself, or another job before."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", earlier)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("high" if earlier else "highest")
        assert allow_tf32(choose(asked), accelerator="auto") == (kept == "high")
        assert torch.get_float32_matmul_precision() == kept
        assert torch.backends.cudnn.allow_tf32 == (kept == "high")
    finally:
        torch.set_float32_matmul_precision(before)


def test_auto_is_fp32_without_a_gpu_and_says_why():
    chosen = choose("auto", accelerator="cpu")
    assert (chosen.name, chosen.autocast, chosen.reason) == ("32-true", None, "no GPU is used")


def test_bf16_works_on_a_cpu_when_asked_for():
    assert choose("bf16-mixed", accelerator="cpu").autocast == torch.bfloat16


def test_fp16_is_refused_without_a_gpu():
    with pytest.raises(SettingsError, match=r"trainer\.precision=16-mixed: fp16 needs a CUDA GPU"):
        choose("16-mixed", accelerator="cpu")


def test_an_unknown_precision_lists_the_known_ones():
    with pytest.raises(SettingsError, match="auto, 32-true, bf16-mixed, 16-mixed"):
        choose("8-true")
