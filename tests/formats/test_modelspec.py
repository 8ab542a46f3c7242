"""Header fields that other tools look for."""

import hashlib
from datetime import UTC, datetime

import pytest
import torch
from safetensors import safe_open

from otl.formats.files import read, write
from otl.formats.modelspec import lora_metadata, with_hash
from otl.types import LoraLayer, Size

MUST = {"sai_model_spec", "architecture", "implementation", "title", "resolution"}
SHOULD = {"description", "author", "date"}  # hash_sha256 comes with the file
KOHYA = {
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
    "ss_output_name",
}
SDXL = {"architecture": "stable-diffusion-xl-v1-base", "base_model_version": "sdxl_base_v1-0"}


def layer(rank: int, alpha: float) -> LoraLayer:
    return LoraLayer(torch.zeros(rank, 4), torch.zeros(4, rank), alpha)


def header(state, **changes):
    options = {"title": "My cat", "name": "final", "resolution": Size(h=768, w=1344), "author": "Ada"} | SDXL | changes
    return lora_metadata(state, date=datetime(2026, 11, 23, 20, tzinfo=UTC), **options)


def test_all_that_the_specification_and_kohya_ask_for():
    fields = header({"unet": {"a": layer(16, 8)}}, trigger="sks cat")
    assert {f"modelspec.{name}" for name in MUST | SHOULD} | KOHYA <= fields.keys()
    assert all(isinstance(value, str) for value in fields.values())
    assert fields["modelspec.sai_model_spec"] == "1.0.1"
    assert fields["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert fields["modelspec.resolution"] == "1344x768"
    assert fields["modelspec.date"] == "2026-11-23T20:00:00+00:00"
    assert fields["modelspec.trigger_phrase"] == "sks cat"
    assert (fields["ss_network_dim"], fields["ss_network_alpha"]) == ("16", "8")
    assert (fields["ss_v2"], fields["ss_network_module"]) == ("False", "networks.lora")


def test_what_is_unknown_is_left_out():
    fields = header({"unet": {"a": layer(16, 8)}}, author=None)
    assert not {"modelspec.author", "modelspec.trigger_phrase"} & fields.keys()


def test_mixed_ranks_are_called_dynamic():
    fields = header({"unet": {"a": layer(16, 8)}, "text_encoder": {"b": layer(4, 8)}})
    assert (fields["ss_network_dim"], fields["ss_network_alpha"]) == ("Dynamic", "8")


@pytest.mark.parametrize(("prediction", "written"), [("epsilon", "epsilon"), ("v_prediction", "v")])
def test_prediction_type(prediction, written):
    fields = header({"unet": {"a": layer(1, 1)}}, prediction=prediction)
    assert fields["modelspec.prediction_type"] == written


def test_the_hash_is_that_of_all_bytes_behind_the_header(tmp_path):
    path = tmp_path / "a.safetensors"
    tensors = {"b": torch.randn(3, 5).half(), "a": torch.randn(7), "a.alpha": torch.tensor(2.0)}
    write(path, tensors, {"modelspec.title": "Größe"})
    digest = with_hash(path)
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert start % 8 == 0
    assert digest == hashlib.sha256(content[start:]).hexdigest()
    back, fields = read(path)
    assert fields == {
        "modelspec.title": "Größe",
        "modelspec.hash_sha256": f"0x{digest}",
        "sshs_model_hash": digest,
    }
    assert back.keys() == tensors.keys() and all(torch.equal(back[key], tensors[key]) for key in tensors)


def test_hashing_again_changes_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path, {"x": torch.randn(4)}, {})
    with_hash(path)
    before = path.read_bytes()
    with_hash(path)
    assert path.read_bytes() == before
    with safe_open(path, "pt") as file:
        assert file.metadata().keys() == {"modelspec.hash_sha256", "sshs_model_hash"}
