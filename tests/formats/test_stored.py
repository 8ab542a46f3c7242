"""Weights that are read and written one at a time, so that a model of any size can be copied."""

import contextlib
import json
import shutil
import weakref
from collections.abc import Mapping
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextModel, T5Config, T5EncoderModel

from otl.config import SettingsError
from otl.formats import single_file
from otl.formats.files import DiskError
from otl.formats.stored import in_file, in_folder, of_network, write
from tests.tiny import clip


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Watched(Mapping):
    """Makes each tensor anew, and knows how many of them there were at most at one time."""

    def __init__(self, count):
        self.names, self.alive, self.most = [f"w{k}" for k in range(count)], weakref.WeakSet(), 0

    def __getitem__(self, name):
        tensor = torch.full((4, 5), float(name[1:]))
        self.alive.add(tensor)
        self.most = max(self.most, len(self.alive))
        return tensor

    def __iter__(self):
        return iter(self.names)

    def __len__(self):
        return len(self.names)


def test_one_tensor_is_in_memory_while_the_next_is_read(tmp_path):
    tensors = Watched(20)
    write(tmp_path / "a.safetensors", tensors, {}, dtype=torch.float16)
    assert tensors.most <= 2
    assert same(load_file(tmp_path / "a.safetensors"), {name: tensors[name].half() for name in tensors})


def test_safetensors_reads_what_is_written(tmp_path):
    tensors = {
        "number": torch.tensor(3.5),
        "counts": torch.arange(3),
        "nothing": torch.zeros(0),
        "turned": torch.arange(6.0).view(2, 3).T,
    }
    write(tmp_path / "a.safetensors", tensors, {"format": "pt"}, dtype=torch.bfloat16)
    cast = {name: tensor if name == "counts" else tensor.bfloat16() for name, tensor in tensors.items()}
    assert same(load_file(tmp_path / "a.safetensors"), cast)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert same(dict(in_file(tmp_path / "a.safetensors")), cast)


def test_a_weight_that_overflows_is_refused_and_nothing_is_written(tmp_path):
    tensors = {"a": torch.tensor([1e6]), "b": torch.tensor([1.0])}
    with pytest.raises(SettingsError, match=r"final\.safetensors was not written: a would hold NaN or infinity"):
        write(tmp_path / "final.safetensors", tensors, {}, dtype=torch.float16)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_enough(value, dtype, tmp_path):
    tensor = torch.arange(30.0).view(5, 6)
    tensor[3, 2] = value
    with pytest.raises(SettingsError, match="NaN or infinity"):
        write(tmp_path / "a.safetensors", {"a": tensor}, {}, dtype=dtype)


class Forgetful(Watched):
    """Says something else each time."""

    def __getitem__(self, name):
        return torch.randn(4, 5)


def test_what_is_not_read_back_as_it_was_written_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match=r"final\.safetensors: what was read back is not what was written"):
        write(tmp_path / "final.safetensors", Forgetful(1), {}, dtype=torch.float32)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def clip_model():
    torch.manual_seed(0)
    return CLIPTextModel(clip(32))


@pytest.fixture(scope="module")
def t5():
    torch.manual_seed(0)
    return T5EncoderModel(T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2))


@pytest.mark.parametrize("size", ["10GB", "2kB"])  # in one file, in several
@pytest.mark.parametrize("name", ["clip_model", "t5"])
def test_a_folder_has_the_weights_under_the_network_s_own_names(name, size, request, tmp_path):
    """transformers puts `text_model.` before CLIP's names, and writes tied weights once."""
    network = request.getfixturevalue(name)
    network.save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").is_file() == (size == "2kB")
    assert same(dict(of_network(network, in_folder(tmp_path))), network.state_dict())


def test_transformers_4_spelled_clip_with_another_level(clip_model, tmp_path):
    state = {f"text_model.{name}": tensor for name, tensor in clip_model.state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    assert same(dict(of_network(clip_model, in_folder(tmp_path))), clip_model.state_dict())


def test_a_network_of_diffusers_has_a_file_of_another_name(tmp_path):
    network = nn.Linear(2, 3)
    save_file(network.state_dict(), tmp_path / "diffusion_pytorch_model.safetensors")
    assert same(dict(of_network(network, in_folder(tmp_path))), network.state_dict())


@pytest.mark.parametrize("change", ["a name", "a shape", "all"])
def test_what_a_checkpoint_has_otherwise_is_left_to_its_library(change, tmp_path):
    network = nn.Linear(2, 3)
    state = network.state_dict()
    if change == "a name":
        state["gamma"] = state.pop("weight")
    if change == "a shape":
        state["weight"] = torch.zeros(3, 4)
    if change != "all":
        save_file(state, tmp_path / "model.safetensors")
    assert of_network(network, in_folder(tmp_path)) is None


def test_a_broken_index_or_file_is_named(tmp_path):
    places = {"weight_map": {"weight": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(places))
    with pytest.raises(SettingsError, match=r"00001\.safetensors: not a whole safetensors file"):
        of_network(nn.Linear(2, 3, bias=False), in_folder(tmp_path))


@pytest.mark.parametrize("layout", ["CLIP", "OPEN_CLIP"])
def test_a_text_encoder_comes_back_from_the_names_of_single_files(layout, clip_model):
    layout = getattr(single_file, layout)
    state = clip_model.state_dict() | {"text_projection.weight": torch.randn(3, 32)}
    file = dict(layout.spelled("model", state)) | {"model.logit_scale": torch.ones(()), "vae.weight": torch.ones(1)}
    found = layout.read("model", file)
    assert all(torch.equal(found[f"text_model.{name}" if f"text_model.{name}" in found else name], tensor)
               for name, tensor in state.items())  # fmt: skip


@pytest.mark.parametrize(("free", "fits"), [(3 * 20 * 2 - 1, False), (3 * 20 * 2, True)])
def test_it_is_begun_only_where_the_disk_has_room(tmp_path, monkeypatch, free, fits):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with contextlib.nullcontext() if fits else pytest.raises(DiskError, match="No space left on device, it needs"):
        write(tmp_path / "a.safetensors", Watched(3), {}, dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"] * fits
