"""Stage C files: names, and what comes back."""

import pytest
import torch
from safetensors.torch import save_file

from otl.config import SettingsError
from otl.formats import cascade

ATTENTION = "down_blocks.0.2.attention"


@pytest.fixture
def prior():
    """Some of a prior, under diffusers' names."""
    shapes = {"clip_txt_mapper.weight": (4, 3), "down_blocks.0.0.channelwise.0.bias": (8,)}
    for letter in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes |= {f"{ATTENTION}.{letter}.weight": (4, 4), f"{ATTENTION}.{letter}.bias": (4,)}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("path", "spelled"),
    [  # as ComfyUI reads them
        ("up_blocks.1.5.attention.to_k", "up_blocks.1.5.attention.attn.to_k"),
        ("up_blocks.1.5.attention.to_out.0", "up_blocks.1.5.attention.attn.out_proj"),
        ("up_blocks.1.5.kv_mapper.1", "up_blocks.1.5.kv_mapper.1"),
        ("clip_txt_mapper", "clip_txt_mapper"),
    ],
)
def test_layers_in_lora_files(path, spelled):
    assert cascade.lora_name(path) == spelled


def test_the_original_has_one_projection_in_for_query_key_and_value(prior):
    original = cascade.prior_to_original(prior)
    assert set(original) == {
        "clip_txt_mapper.weight",
        "down_blocks.0.0.channelwise.0.bias",
        *(f"{ATTENTION}.attn.in_proj_{kind}" for kind in ("weight", "bias")),
        *(f"{ATTENTION}.attn.out_proj.{kind}" for kind in ("weight", "bias")),
    }
    torch.testing.assert_close(original[f"{ATTENTION}.attn.in_proj_weight"][4:8], prior[f"{ATTENTION}.to_k.weight"])
    assert same(cascade.prior_from_original(original), prior)


@pytest.mark.parametrize("write", [cascade.prior_to_original, dict], ids=["original names", "diffusers' names"])
def test_a_file_of_the_prior_alone(prior, write, tmp_path):
    save_file(write(prior), tmp_path / "stage_c.safetensors")
    assert same(cascade.read_prior(tmp_path / "stage_c.safetensors"), prior)
    assert cascade.read_text(tmp_path / "stage_c.safetensors") == {}


def test_a_file_with_the_text_encoder(prior, tmp_path):
    text = {"text_model.final_layer_norm.weight": torch.randn(4), "text_projection.weight": torch.randn(2, 4)}
    file = tmp_path / "all.safetensors"
    save_file(dict(cascade.joined(prior, text)), file)
    assert same(cascade.read_prior(file), prior)
    assert same(cascade.read_text(file), text)


def test_a_transposed_projection_is_turned_back(prior, tmp_path):
    projection = torch.randn(2, 4)
    tensors = dict(cascade.joined(prior, {})) | {"text_encoder.clip_g.text_projection": projection.T.contiguous()}
    save_file(tensors, tmp_path / "all.safetensors")
    torch.testing.assert_close(cascade.read_text(tmp_path / "all.safetensors")["text_projection.weight"], projection)


def test_another_file_has_no_prior(tmp_path):
    save_file({"clip_mapper.weight": torch.zeros(1)}, tmp_path / "stage_b.safetensors")
    assert cascade.read_prior(tmp_path / "stage_b.safetensors") == {}
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    with pytest.raises(SettingsError, match=r"broken\.safetensors: not a whole safetensors file"):
        cascade.read_prior(tmp_path / "broken.safetensors")
