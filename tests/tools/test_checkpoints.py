"""What is said where a checkpoint is not there, or not whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPSegForImageSegmentation

from otl.config import SettingsError
from otl.tools.checkpoints import file_of, located, pretrained

KEY = "masker.checkpoint"


def test_a_path_where_nothing_is_gets_a_hint(tmp_path: Path) -> None:
    (tmp_path / "clipseg").mkdir()
    with pytest.raises(SettingsError, match=r"masker.checkpoint=.*no such file or folder; did you mean .*clipseg\?"):
        located(KEY, str(tmp_path / "clipsge"))


def test_a_name_on_the_hub_is_no_path() -> None:
    assert located(KEY, "CIDAS/clipseg-rd64-refined") is None


@pytest.mark.parametrize("given", ["", "model.onnx"])
def test_a_file_is_found_in_its_folder_and_beside_another(tmp_path: Path, given: str) -> None:
    for name in ("model.onnx", "selected_tags.csv"):
        (tmp_path / name).touch()
    checkpoint = str(tmp_path / given)
    assert file_of(KEY, checkpoint, "model.onnx") == tmp_path / "model.onnx"
    assert file_of(KEY, checkpoint, "selected_tags.csv") == tmp_path / "selected_tags.csv"


def test_a_file_may_have_a_name_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "u2net.onnx").touch()
    assert file_of(KEY, str(tmp_path / "u2net.onnx"), "model.onnx") == tmp_path / "u2net.onnx"


def test_a_folder_without_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"there is no model.onnx in"):
        file_of(KEY, str(tmp_path), "model.onnx")


def test_a_checkpoint_that_lacks_weights_is_refused(clipseg: Path, tmp_path: Path) -> None:
    shutil.copytree(clipseg, tmp_path, dirs_exist_ok=True)
    weights = load_file(tmp_path / "model.safetensors")
    save_file({key: value for key, value in weights.items() if "film_mul" not in key}, tmp_path / "model.safetensors")
    with pytest.raises(
        SettingsError, match=r"2 weights of transformers' CLIPSegFor.* \(such as decoder.film_mul.bias\)"
    ):
        pretrained(KEY, str(tmp_path), CLIPSegForImageSegmentation, dtype=torch.float32)


def test_an_empty_folder_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="cannot be loaded"):
        pretrained(KEY, str(tmp_path), CLIPSegForImageSegmentation, dtype=torch.float32)
