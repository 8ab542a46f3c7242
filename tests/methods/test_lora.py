"""LoRA: which layers, which strength, and what the file does in the stock pipeline."""

import json

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

from otl.config import PACKAGE, LoraFormat, Output, SettingsError
from otl.methods.lora import Lora
from otl.methods.targets import layers, matching
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_2 import StableDiffusion2
from otl.modules.stable_diffusion_xl import StableDiffusionXL

COUNTS = [  # published: kohya's and OneTrainer's networks
    (StableDiffusion, "unet", "attn-mlp", 192),
    (StableDiffusion, "unet", "attn-only", 128),
    (StableDiffusion, "unet", "full", 282),
    (StableDiffusion, "text_encoder", "full", 72),
    (StableDiffusionXL, "unet", "attn-mlp", 722),
    (StableDiffusionXL, "unet", "attn-only", 560),
    (StableDiffusionXL, "unet", "full", 794),
    (StableDiffusionXL, "text_encoder", "full", 72),
    (StableDiffusionXL, "text_encoder_2", "full", 193),
]
PARAMETERS = [  # published, at rank 16
    (StableDiffusion, "attn-mlp", 6_782_976),
    (StableDiffusion, "attn-only", 3_188_736),
    (StableDiffusion, "full", 16_931_456),
    (StableDiffusionXL, "attn-mlp", 42_557_440),
    (StableDiffusionXL, "attn-only", 23_224_320),
    (StableDiffusionXL, "full", 49_412_736),
]


@pytest.fixture(scope="module")
def skeletons():
    """Both families at full size on the meta device."""
    built = {}
    for family in (StableDiffusion, StableDiffusionXL):
        built[family] = family("published/weights")
        built[family].build_skeleton()
    return built


@pytest.mark.parametrize(("family", "part", "preset", "count"), COUNTS)
def test_presets_find_the_published_number_of_layers(skeletons, family, part, preset, count):
    names = {part: layers(skeletons[family].part(part))}
    assert len(matching(names, preset, family.lora_targets)[part]) == count


def attention_layers(config):
    """Linear and convolution layers in the transformers of a published UNet, block by block, counted from its config.

    A transformer has a projection in and out; each of its blocks four in either attention and two in the feed-forward.
    """
    levels = len(config["block_out_channels"])
    depths = config.get("transformer_layers_per_block", 1)
    depths = depths if isinstance(depths, list) else [depths] * levels
    of = [2 + 10 * depth for depth in depths]
    down = [2 * of[n] for n, kind in enumerate(config["down_block_types"]) if kind.startswith("CrossAttn")]
    up = [3 * of[levels - 1 - n] for n, kind in enumerate(config["up_block_types"]) if kind.startswith("CrossAttn")]
    return {"down-blocks": sum(down), "mid-block": of[-1], "up-blocks": sum(up)}


@pytest.mark.parametrize(
    ("model", "family", "total"),
    [("sd15", StableDiffusion, 192), ("sd21", StableDiffusion2, 192), ("sdxl", StableDiffusionXL, 722)],
)
def test_presets_of_blocks_find_the_attention_and_feed_forward_of_their_blocks(model, family, total):
    config = json.loads((PACKAGE / "assets" / "configs" / model / "unet" / "config.json").read_text())
    assert config["layers_per_block"] == 2
    expected = attention_layers(config)
    module = family("published/weights")
    module.build_skeleton()
    names = {"unet": layers(module.part("unet"))}
    found = {preset: matching(names, preset, family.lora_targets)["unet"] for preset in (*expected, "blocks")}
    assert {preset: len(found[preset]) for preset in expected} == expected
    assert len(found["blocks"]) == sum(expected.values()) == total
    assert all(name.startswith(preset.replace("-", "_")) for preset in expected for name in found[preset])


@pytest.mark.parametrize(("family", "preset", "count"), PARAMETERS)
def test_rank_16_has_the_published_number_of_parameters(family, preset, count):
    module = family("published/weights")
    module.method = Lora(rank=16, targets=preset)
    module.build_skeleton()
    assert sum(p.numel() for p in module.trained_parameters().values()) == count


def adapted(family, folder, *, parts, alpha=4.0, targets="attn-mlp", seed=0):
    """A family with an adapter that is not nothing."""
    module = family(str(folder))
    module.seed = seed
    module.method = Lora(rank=8, alpha=alpha, targets=targets, parts={part: {} for part in parts})
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return module


def test_a_new_adapter_changes_nothing(sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    module.method = Lora(rank=4, targets="full")
    module.configure_model()
    plain = StableDiffusion(str(sd15_folder))
    plain.configure_model()
    torch.testing.assert_close(predicted_sd15(module.pipeline), predicted_sd15(plain.pipeline), rtol=0, atol=0)


def test_the_start_is_a_function_of_the_seed(sd15_folder):
    def start(seed):
        module = StableDiffusion(str(sd15_folder))
        module.seed, module.method = seed, Lora(rank=4)
        torch.manual_seed(seed + 99)
        module.configure_model()
        return torch.cat([p.flatten() for p in module.trained_parameters().values()])

    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))


def predicted_sd15(pipe):
    generator = torch.Generator().manual_seed(2)
    noisy = torch.randn(2, 4, 16, 16, generator=generator)
    with torch.no_grad():
        hidden, _ = pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, False)
        return pipe.unet(noisy, torch.tensor([10, 900]), encoder_hidden_states=hidden).sample


def predicted_sdxl(pipe):
    generator = torch.Generator().manual_seed(2)
    noisy = torch.randn(2, 4, 16, 16, generator=generator)
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)
    with torch.no_grad():
        hidden, _, pooled, _ = pipe.encode_prompt(["a cat", "a dog"], device="cpu", do_classifier_free_guidance=False)
        conditions = {"text_embeds": pooled, "time_ids": sizes}
        return pipe.unet(
            noisy, torch.tensor([10, 900]), encoder_hidden_states=hidden, added_cond_kwargs=conditions
        ).sample


@pytest.mark.parametrize("style", list(LoraFormat))
@pytest.mark.parametrize("targets", ["attn-mlp", "full"])
def test_the_file_does_in_diffusers_what_the_live_adapter_does_sd15(sd15_folder, tmp_path, style, targets):
    module = adapted(StableDiffusion, sd15_folder, parts=["denoiser", "text_encoder"], targets=targets)
    module.output_options = Output(format=style, dtype="fp32")
    file = module.export(tmp_path / "final")

    stock = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    before = predicted_sd15(stock)
    stock.load_lora_weights(file)
    live = predicted_sd15(module.pipeline)
    assert (live - before).abs().max() > 0.01
    torch.testing.assert_close(predicted_sd15(stock), live, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("style", list(LoraFormat))
def test_the_file_does_in_diffusers_what_the_live_adapter_does_sdxl(sdxl_folder, tmp_path, style):
    module = adapted(StableDiffusionXL, sdxl_folder, parts=["denoiser", "text_encoder", "text_encoder_2"])
    module.output_options = Output(format=style, dtype="fp32")
    file = module.export(tmp_path / "final")

    stock = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    before = predicted_sdxl(stock)
    stock.load_lora_weights(file)
    live = predicted_sdxl(module.pipeline)
    assert (live - before).abs().max() > 0.01
    torch.testing.assert_close(predicted_sdxl(stock), live, rtol=1e-4, atol=1e-5)


def test_the_file_carries_the_true_alpha_and_rank(sd15_folder, tmp_path):
    module = adapted(StableDiffusion, sd15_folder, parts=["denoiser"], alpha=4.0)
    with safe_open(module.export(tmp_path / "final"), "pt") as file:
        alphas = {float(file.get_tensor(key)) for key in file.keys() if key.endswith(".alpha")}  # noqa: SIM118
        header = file.metadata()
    assert alphas == {4.0}
    assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("8", "4")
    assert header["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_an_adapter_with_nan_is_never_written(sd15_folder, tmp_path):
    module = adapted(StableDiffusion, sd15_folder, parts=["denoiser"])
    with torch.no_grad():
        next(iter(module.trained_parameters().values())).fill_(float("nan"))
    with pytest.raises(SettingsError, match="NaN"):
        module.export(tmp_path / "final")
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_too_small_for_fp16_is_written_in_fp32(sd15_folder, tmp_path):
    module = adapted(StableDiffusion, sd15_folder, parts=["denoiser"])
    with torch.no_grad():
        for name, parameter in module.trained_parameters().items():
            parameter.mul_(1e-6 if "lora_B" in name else 1)
    module.output_options = Output(dtype="fp16")
    with safe_open(module.export(tmp_path / "final"), "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_the_dtype_asked_for_is_that_of_the_file(sd15_folder, tmp_path):
    module = adapted(StableDiffusion, sd15_folder, parts=["denoiser"])
    module.output_options = Output(dtype="bf16")
    with safe_open(module.export(tmp_path / "final"), "pt") as file:
        dtypes = {file.get_tensor(key).dtype for key in file.keys() if not key.endswith(".alpha")}  # noqa: SIM118
    assert dtypes == {torch.bfloat16}


def test_a_part_that_does_not_exist_is_named_with_those_that_do(sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    module.method = Lora(parts={"text_encoder_2": {}})
    with pytest.raises(SettingsError, match=r"text_encoder_2.*denoiser, vae, text_encoder"):
        module.configure_model()
