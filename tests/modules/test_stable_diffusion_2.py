"""Stable Diffusion 2 and the published variants: networks, prediction, resolution, and what a single file is."""

import re
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from hydra.utils import instantiate
from safetensors.torch import save_file
from torch.nn import functional as F

from otl.config import SettingsError
from otl.formats.original import config_folder
from otl.methods.lora import Lora
from otl.methods.targets import layers, matching
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_2 import StableDiffusion2
from tests.modules.test_families import CAPTIONS, T, batch, u_of
from tests.modules.test_loading import original

UNETS = {"sd15": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}  # published
NINE = 5 * 320 * 9  # weights of five more input channels of a 3 x 3 convolution to 320
VARIANTS = [  # model, parameters of the UNet, of the text encoder, predicts, trained at
    ("sd15", UNETS["sd15"], 123_060_480, "epsilon", 512),
    ("sd15_inpaint", UNETS["sd15"] + NINE, 123_060_480, "epsilon", 512),
    ("sd20", UNETS["sd2"], 340_387_840, "v_prediction", 768),
    ("sd20_base", UNETS["sd2"], 340_387_840, "epsilon", 512),
    ("sd20_inpaint", UNETS["sd2"] + NINE, 340_387_840, "epsilon", 512),
    ("sd21", UNETS["sd2"], 340_387_840, "v_prediction", 768),
    ("sd21_base", UNETS["sd2"], 340_387_840, "epsilon", 512),
    ("sdxl", UNETS["sdxl"], 123_060_480, "epsilon", 1024),
    ("sdxl_inpaint", UNETS["sdxl"] + NINE, 123_060_480, "epsilon", 1024),
    ("sdxl_vpred", UNETS["sdxl"], 123_060_480, "v_prediction", 1024),
]


@pytest.mark.parametrize(("name", "unet", "text", "predicts", "side"), VARIANTS)
def test_the_published_variants_by_their_yaml(name, unet, text, predicts, side, settings):
    module = instantiate(settings(f"model={name}", "data.path=x").model)
    module.build_skeleton()
    counts = [sum(p.numel() for p in module.part(part).parameters()) for part in ("unet", "text_encoder")]
    assert counts == [unet, text]
    assert module.noise_schedule.prediction == predicts
    assert (module.resolution, module.data_resolution) == (side, side)


def test_attention_is_upcast_in_2_1_at_768_alone(settings):
    upcast = {}
    for name in ("sd20", "sd21", "sd21_base"):
        module = instantiate(settings(f"model={name}", "data.path=x").model)
        module.build_skeleton()
        upcast[name] = bool(module.part("unet").config.upcast_attention)
    assert upcast == {"sd20": False, "sd21": True, "sd21_base": False}


@torch.no_grad()
def test_attention_scores_beyond_fp16_are_kept_in_fp32(sd2_folder):
    """What upcast_attention is for, which diffusers' attention by torch's own function does not look at."""
    module = StableDiffusion2(str(sd2_folder))
    module.configure_model()
    attention = next(each for name, each in module.part("unet").named_modules() if name.endswith("attn1")).half()
    assert attention.upcast_attention
    for each in (attention.to_q, attention.to_k):
        each.weight.mul_(2000 / each.weight.norm(dim=1).mean())
    x = torch.randn(1, 24, attention.to_q.in_features, generator=torch.Generator().manual_seed(0)).half()
    q, k, v = (each(x).double().unflatten(2, (attention.heads, -1)).transpose(1, 2) for each in
               (attention.to_q, attention.to_k, attention.to_v))  # fmt: skip
    scores = q @ k.transpose(2, 3) * attention.scale
    assert scores.abs().max() > torch.finfo(torch.float16).max
    expected = attention.to_out[0]((scores.softmax(3) @ v).transpose(1, 2).flatten(2).half())
    torch.testing.assert_close(attention(x), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("preset", "count"), [("attn-mlp", 192), ("attn-only", 128), ("full", 282)])
def test_presets_find_the_published_number_of_layers(preset, count):
    module = StableDiffusion2("published/weights")
    module.build_skeleton()
    names = {"unet": layers(module.part("unet"))}
    assert len(matching(names, preset, module.lora_targets)["unet"]) == count


@pytest.mark.parametrize(
    ("name", "architecture", "version"),
    [("sd21", "stable-diffusion-v2-768-v", "sd_v2_v"), ("sd21_base", "stable-diffusion-v2-512", "sd_v2")],
)
def test_the_ids_in_a_lora_s_header(name, architecture, version, settings):
    module = instantiate(settings(f"model={name}", "data.path=x").model)
    module.build_skeleton()
    assert (module.architecture, module.base_model_version) == (architecture, version)


def test_it_agrees_with_the_parts_of_the_stock_pipeline(sd2_folder):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    noise = torch.randn(2, 4, 16, 24, generator=generator)
    module = StableDiffusion2(str(sd2_folder))
    module.configure_model()
    ours = module.losses(batch(pixels, noise), u=u_of(T), stream="noise")

    pipe = StableDiffusionPipeline.from_pretrained(sd2_folder, safety_checker=None)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * 0.18215
        hidden, _ = pipe.encode_prompt(CAPTIONS, "cpu", 1, False)
        predicted = pipe.unet(scheduler.add_noise(latents, noise, T), T, encoder_hidden_states=hidden).sample
        target = scheduler.get_velocity(latents, noise, T)
        expected = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3)) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def open_clip(state):
    """A CLIP text encoder's weights under OpenCLIP's names: q, k and v of a layer are one matrix."""
    tensors = {}
    for name, tensor in state.items():
        layer = re.match(r"encoder\.layers\.(\d+)\.", name)
        if layer is None:
            renamed = {
                "embeddings.token_embedding.weight": "token_embedding.weight",
                "embeddings.position_embedding.weight": "positional_embedding",
                "final_layer_norm.weight": "ln_final.weight",
                "final_layer_norm.bias": "ln_final.bias",
            }
            tensors[renamed[name]] = tensor
            continue
        block, rest = f"transformer.resblocks.{layer[1]}", name[layer.end() :]
        if ".q_proj" in rest:
            three = [state[name.replace("q_proj", f"{x}_proj")] for x in "qkv"]
            tensors[f"{block}.attn.in_proj_{rest.rpartition('.')[2]}"] = torch.cat(three)
        elif "_proj" not in rest or "out_proj" in rest:
            for own, other in (("self_attn", "attn"), ("layer_norm", "ln_"), ("fc1", "c_fc"), ("fc2", "c_proj")):
                rest = rest.replace(own, other)
            tensors[f"{block}.{rest}"] = tensor
    return {f"cond_stage_model.model.{name}": tensor for name, tensor in tensors.items()}


@pytest.fixture
def single_file(sd2_folder, tmp_path):
    """The tiny checkpoint as one file, and a config folder that describes it."""
    config = config_folder("sd21", tmp_path / "config")
    for part in ("unet", "vae", "text_encoder"):
        shutil.copy(sd2_folder / part / "config.json", config / part / "config.json")
    module = StableDiffusion2(str(sd2_folder))
    module.configure_model()
    tensors = {name: t for name, t in original(module.pipeline).items() if not name.startswith("cond_stage_model")}
    tensors |= open_clip(module.pipeline.text_encoder.state_dict())
    file = tmp_path / "model.safetensors"
    save_file({name: t.contiguous().clone() for name, t in tensors.items()}, file)
    return module, file, config


@pytest.mark.parametrize("predicts", ["v_prediction", "epsilon"])
def test_a_single_file_predicts_as_its_config_says(predicts, single_file, monkeypatch):
    from_folder, file, config = single_file
    scheduler = config / "scheduler" / "scheduler_config.json"
    scheduler.write_text(re.sub(r'"prediction_type": "\w+"', f'"prediction_type": "{predicts}"', scheduler.read_text()))
    monkeypatch.setattr(StableDiffusion2, "file_keys", ())
    module = StableDiffusion2(str(file), config=str(config))
    module.configure_model()
    assert module.noise_schedule.prediction == predicts
    for part in module.part_names:
        ours, theirs = module.part(part).state_dict(), from_folder.part(part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part


def test_a_file_of_2_1_is_no_1_5(tmp_path):
    keys = {key: torch.zeros(1) for key in StableDiffusion2.file_keys}
    save_file(keys, tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match="another family than StableDiffusion"):
        StableDiffusion(str(tmp_path / "model.safetensors")).configure_model()


def test_the_lora_file_names_the_text_encoder_as_a1111_looks_for_it(sd2_folder, tmp_path):
    from safetensors import safe_open

    module = StableDiffusion2(str(sd2_folder))
    module.method = Lora(rank=4, parts={"denoiser": {}, "text_encoder": {}})
    module.configure_model()
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.fill_(0.1)
    with safe_open(module.export(tmp_path / "final"), "pt") as file:
        keys, header = list(file.keys()), file.metadata()
    assert any(key.startswith("lora_te_text_model_encoder_layers_0_") for key in keys)
    assert not any(key.startswith("lora_te1_") for key in keys)
    assert header["ss_v2"] == "True"
