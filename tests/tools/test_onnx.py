"""What is said where an ONNX file cannot be run."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from otl.config import SettingsError
from otl.tools.onnx import Onnx

CPU = torch.device("cpu")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_text("no network")
    with pytest.raises(SettingsError, match=r"masker.checkpoint: .*model.onnx is no ONNX network that can be run"):
        Onnx("masker.checkpoint", tmp_path / "model.onnx", CPU)


def test_without_onnxruntime_the_extra_to_install_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(SettingsError, match=r"pip install 'otl\[tools\]'"):
        Onnx("masker.checkpoint", tmp_path / "model.onnx", CPU)
