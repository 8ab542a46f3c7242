"""What PEFT says beside the weights, by patterns on the names of the network that it adapted, holds in any spelling."""

import json

import pytest
import torch
from peft import LoKrConfig, LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn

from otl.methods.injected import ADAPTER, adapted, live_state
from otl.methods.lokr import Lokr
from otl.methods.lora import Lora
from otl.modules.pixart_alpha import PixArtAlpha
from otl.modules.stable_diffusion import StableDiffusion
from tests import tiny
from tests.methods.kinds import trained

PATHS = {  # of PixArt's original code -> of diffusers'
    "blocks.0.attn.qkv": [f"transformer_blocks.0.attn1.to_{letter}" for letter in "qkv"],
    "blocks.0.attn.proj": ["transformer_blocks.0.attn1.to_out.0"],
    "blocks.1.attn.qkv": [f"transformer_blocks.1.attn1.to_{letter}" for letter in "qkv"],
    "t_block.1": ["adaln_single.linear"],
}
ALONE = ["blocks.0.attn.proj", "t_block.1"]  # not three layers in one


class Original(nn.Module):
    """Some layers of a small PixArt by the names of its original code."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"attn": nn.ModuleDict({"qkv": nn.Linear(24, 72), "proj": nn.Linear(24, 24)})})
            for _ in range(2)
        )
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(24, 144))


@pytest.fixture(scope="module")
def pixart(tmp_path_factory):
    return tiny.pixart_alpha(tmp_path_factory.mktemp("pixart"))


def written(config, folder):
    """PEFT's own folder of a random adapter of the original network; path -> what PEFT adds to its weight."""
    model = get_peft_model(Original(), config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "lokr_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    model.save_pretrained(folder)
    found = {}
    for name in config.target_modules:
        paths = PATHS[name]
        layer = model.base_model.model.get_submodule(name)
        found |= dict(zip(paths, layer.get_delta_weight("default").detach().chunk(len(paths))))
    return found


def assert_goes_on(folder, model_folder, method, expected):
    module = PixArtAlpha(str(model_folder))
    module.method = method(from_file=str(folder), targets="file")
    module.configure_model()
    live = adapted(module.part("denoiser"))
    assert live.keys() == expected.keys()
    for path, layer in live.items():
        torch.testing.assert_close(layer.get_delta_weight(ADAPTER).detach(), expected[path], msg=path)


@pytest.mark.parametrize("rslora", [False, True])
def test_alphas_and_ranks_of_single_layers_under_the_original_code_s_names(rslora, pixart, tmp_path):
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=[*PATHS],
        rank_pattern={"^t_block.1": 3, "blocks.0.attn.qkv": 2},
        alpha_pattern={r"blocks\.0\.attn\.qkv": 2, "attn.proj": 5, "^t_block.1": 7},
        use_rslora=rslora,
    )
    assert_goes_on(tmp_path, pixart, Lora, written(config, tmp_path))


def test_a_lokr_without_a_rank_is_as_strong_as_peft_has_it(pixart, tmp_path):
    """At rank 100 both factors are whole, and only the settings know that there is a rank."""
    config = LoKrConfig(
        r=100, alpha=25, target_modules=ALONE, rank_pattern={"attn.proj": 50}, alpha_pattern={"t_block.1": 10}
    )
    assert_goes_on(tmp_path, pixart, Lokr, written(config, tmp_path))


def test_a_text_encoder_s_names_are_those_of_the_file(sd15_folder, tmp_path):
    """diffusers with transformers 4 writes `text_model.`, and its header's patterns have it too."""
    layer = "encoder.layers.1.self_attn.q_proj"
    source = trained(StableDiffusion, sd15_folder, Lora(rank=4, targets=["self_attn"], parts={"text_encoder": {}}))
    tensors = {}
    for path, made in live_state(source)["text_encoder"].items():
        tensors[f"text_encoder.text_model.{path}.lora_A.weight"] = made.down
        tensors[f"text_encoder.text_model.{path}.lora_B.weight"] = made.up
    settings = {"text_encoder.lora_alpha": 3, "text_encoder.alpha_pattern": {f"text_model.{layer}": 2}}
    save_file(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": json.dumps(settings)})
    again = StableDiffusion(str(sd15_folder))
    again.method = Lora(from_file=str(tmp_path / "lora.safetensors"), targets="file", parts={"text_encoder": {}})
    again.configure_model()
    alphas = {path: made.alpha for path, made in live_state(again)["text_encoder"].items()}
    assert alphas == {path: 2.0 if path == layer else 3.0 for path in alphas}
