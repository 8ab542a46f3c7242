"""What other programs make of the files: their prediction with the file is that with the live adapter."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from peft import inject_adapter_in_model
from peft.mapping import get_peft_config
from peft.utils import set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file

from otl.config import LoraFormat, Output
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from tests.methods.kinds import KINDS, trained
from tests.methods.test_lora import predicted_sd15, predicted_sdxl

BOTH = {"denoiser": {}, "text_encoder": {}}


def assert_same_prediction(before, live, loaded):
    assert (live - before).abs().max() > 0.01
    torch.testing.assert_close(loaded, live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("targets", ["attn-mlp", "full"])
def test_diffusers_reads_a_dora_of_sd15_in_peft_s_names(sd15_folder, tmp_path, targets):
    module = trained(StableDiffusion, sd15_folder, KINDS["dora"](targets=targets, parts=BOTH))
    module.output_options = Output(format=LoraFormat.peft, dtype="fp32")
    stock = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    before = predicted_sd15(stock)
    stock.load_lora_weights(module.export(tmp_path / "final"))

    assert_same_prediction(before, predicted_sd15(module.pipeline), predicted_sd15(stock))


def test_diffusers_reads_a_dora_of_sdxl_in_peft_s_names(sdxl_folder, tmp_path):
    parts = BOTH | {"text_encoder_2": {}}
    module = trained(StableDiffusionXL, sdxl_folder, KINDS["dora"](parts=parts))
    module.output_options = Output(format=LoraFormat.peft, dtype="fp32")
    stock = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    before = predicted_sdxl(stock)
    stock.load_lora_weights(module.export(tmp_path / "final"))
    assert_same_prediction(before, predicted_sdxl(module.pipeline), predicted_sdxl(stock))


@pytest.mark.parametrize("kind", ["loha", "loha_tucker", "lokr", "lokr_both", "lokr_tucker", "lokr_whole"])
def test_peft_builds_the_layers_again_from_the_file_alone(sd15_folder, tmp_path, kind):
    module = trained(StableDiffusion, sd15_folder, KINDS[kind](targets="full", ranks={"attn2": 3}))
    module.output_options = Output(format=LoraFormat.peft, dtype="fp32")
    file = module.export(tmp_path / "final")
    with safe_open(file, "pt") as opened:
        config = get_peft_config(json.loads(opened.metadata()["peft.unet"]))
    unet = UNet2DConditionModel.from_pretrained(sd15_folder, subfolder="unet")
    before = predicted(unet)
    inject_adapter_in_model(config, unet)
    tensors = {key.removeprefix("unet."): tensor for key, tensor in load_file(file).items()}
    result = set_peft_model_state_dict(unet, tensors)
    assert not result.unexpected_keys
    assert_same_prediction(before, predicted(module.part("unet").eval()), predicted(unet.eval()))


@torch.no_grad()
def predicted(unet):
    draw = torch.Generator().manual_seed(2)
    noisy, hidden = torch.randn(2, 4, 16, 16, generator=draw), torch.randn(2, 5, 32, generator=draw)
    return unet(noisy, torch.tensor([10, 900]), encoder_hidden_states=hidden).sample


def test_diffusers_reads_lora_alone_under_kohya_s_names(sd15_folder, tmp_path):
    """What the pages on the methods say: it refuses LoHa, LoKr and OFT, and takes a DoRA for a LoRA."""
    for kind in ("loha", "lokr", "oft"):
        file = trained(StableDiffusion, sd15_folder, KINDS[kind]()).export(tmp_path / kind)
        stock = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
        with pytest.raises(ValueError):
            stock.load_lora_weights(file)
    module = trained(StableDiffusion, sd15_folder, KINDS["dora"]())
    stock = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    before = predicted_sd15(stock)
    stock.load_lora_weights(module.export(tmp_path / "dora"))
    loaded, live = predicted_sd15(stock), predicted_sd15(module.pipeline)
    assert (loaded - before).abs().max() > 0.01
    assert (loaded - live).abs().max() > 0.01
