"""Stable Cascade against its formulas and the parts of the stock pipelines."""

import math

import pytest
import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeDecoderPipeline,
    StableCascadePriorPipeline,
    StableCascadeUNet,
)
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from torch.nn import functional as F
from transformers import CLIPTextModelWithProjection, CLIPTokenizer

from otl.config import CheckpointFormat, Output, SettingsError
from otl.methods.finetune import Finetune
from otl.methods.lora import Lora
from otl.methods.targets import layers, matching
from otl.modules.stable_cascade import StableCascade
from otl.tasks import memory
from otl.testing import CHECKS
from tests import tiny_priors
from tests.modules.priors import CAPTIONS, Recorder, apart, batch, features, loaded, noise

U = torch.tensor([0.3, 0.999], dtype=torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_priors.stable_cascade(tmp_path_factory.mktemp("cascade"))


def words(folder):
    return {
        "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        "text_encoder": CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder"),
    }


def prior_pipeline(folder):
    """The stock pipeline of the folder's parts."""
    prior = StableCascadeUNet.from_pretrained(folder / "prior")
    return StableCascadePriorPipeline(**words(folder), prior=prior, scheduler=DDPMWuerstchenScheduler())


def decoder_pipeline(folder):
    return StableCascadeDecoderPipeline(
        **words(folder),
        decoder=StableCascadeUNet.from_pretrained(folder / "decoders" / "decoder"),
        vqgan=PaellaVQModel.from_pretrained(folder / "decoders" / "vqgan"),
        scheduler=DDPMWuerstchenScheduler(),
    )


def original_noise(u):
    """Share of the signal and the time that the denoiser is told, as in Stability-AI/StableCascade's gdf."""
    s, low, high = 0.008, 0.0001, 0.9999
    lowest = math.cos(s / (1 + s) * math.pi / 2) ** 2
    t = (u + 0.001).clamp(0.001, 1.0)
    bars = (((s + t) / (1 + s) * math.pi / 2).cos().clamp(0, 1) ** 2 / lowest).clamp(low, high)
    log_snr = (bars / (1 - bars)).log()
    told = (log_snr.sigmoid() * lowest).sqrt().acos() / (math.pi / 2) * (1 + s) - s
    return bars, told


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_it_keeps_the_contract(check, folder):
    check(lambda: StableCascade(str(folder), **tiny_priors.options(folder)))


def test_the_loss_is_that_of_the_original_training(folder):
    ours = loaded(StableCascade, folder).losses(batch(), u=U, stream="noise")
    pipe = prior_pipeline(folder)
    bars, told = original_noise(U)
    assert told[1] < 0.995  # where the schedule is clamped, a later time would be the same noise
    signal, sigma = (share.sqrt().reshape(2, 1, 1, 1).float() for share in (bars, 1 - bars))
    with torch.no_grad():
        hidden, pooled, _, _ = pipe.encode_prompt("cpu", 2, 1, False, prompt=CAPTIONS)
        noisy = signal * features(folder) + sigma * noise()
        predicted = pipe.prior(
            noisy, told.float(), clip_text=hidden, clip_text_pooled=pooled, clip_img=torch.zeros(2, 1, 24)
        ).sample
        error = F.mse_loss(predicted, noise(), reduction="none").mean((1, 2, 3))
        expected = error * (1 + bars / (1 - bars)) ** -1.0 * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("u", [0.0, 0.0005, 0.5, 0.994, 1.0])
def test_a_time_means_one_noise(folder, u):
    schedule = loaded(StableCascade, folder).noise_schedule
    t = schedule.sample(torch.tensor([u], dtype=torch.float64))
    bars, told = original_noise(torch.tensor([u], dtype=torch.float64))
    torch.testing.assert_close(t.double(), told, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(schedule.alpha_bars(t), bars, rtol=1e-3, atol=1e-8)


def test_times_are_embedded_exactly_where_the_weights_are_in_bf16(folder):
    exact = loaded(StableCascade, folder).part("prior")
    coarse = loaded(StableCascade, folder, dtype="bf16").part("prior")
    t = torch.tensor([0.5003, 0.5004])
    expected = exact.get_timestep_ratio_embedding(t)
    assert (expected[0] - expected[1]).abs().max() > 0.5  # in bf16 both times would be 0.5
    embedded = coarse.get_timestep_ratio_embedding(t)
    assert embedded.dtype == torch.bfloat16
    torch.testing.assert_close(embedded.float(), expected, rtol=0, atol=0.01)


def test_drawing_is_that_of_the_stock_pipelines(folder):
    module = loaded(StableCascade, folder)
    options = {"negative_prompt": "blurry", "steps": 3, "guidance": 4.0}
    drawn = module.draw(["a cat", "a dog"], [3, 4], **options)
    module.decoders = Recorder()
    module.draw(["a cat", "a dog"], [3, 4], **options)
    generator = torch.Generator().manual_seed(4)
    size = {"height": 128, "width": 128}
    embeddings = prior_pipeline(folder)(
        "a dog", negative_prompt="blurry", num_inference_steps=3, guidance_scale=4.0, generator=generator, **size
    ).image_embeddings
    torch.testing.assert_close(module.decoders.seen[1], embeddings, rtol=1e-4, atol=1e-4)
    expected = decoder_pipeline(folder)(embeddings, "a dog", generator=generator).images[0]
    assert apart(drawn[1], expected) <= 1
    assert apart(drawn[0], expected) > 1


def test_fp16_is_refused_before_anything_is_loaded(folder):
    module = StableCascade(str(folder), **tiny_priors.options(folder), dtype="fp16")
    with pytest.raises(SettingsError, match=r"model\.dtype=fp16.*bf16"):
        module.configure_model()
    module = StableCascade("published/weights", effnet="published/effnet")
    module.autocast_dtype = torch.float16
    with pytest.raises(SettingsError, match=r"trainer\.precision.*bf16-mixed"):
        memory.weights(module)


# Files


def test_a_lora_file_has_the_names_that_comfyui_reads(folder, tmp_path):
    module = StableCascade(str(folder), **tiny_priors.options(folder))
    module.method = Lora(rank=4, targets="full", parts={"denoiser": {}, "text_encoder": {}})
    module.configure_model()
    from safetensors.torch import load_file

    keys = load_file(module.export(tmp_path / "adapter"))
    stems = {key.removesuffix(".alpha") for key in keys if key.endswith(".alpha")}
    block = "lora_prior_unet_down_blocks_1_2_attention_attn"
    assert {f"{block}_to_q", f"{block}_to_k", f"{block}_to_v", f"{block}_out_proj"} <= stems
    assert {"lora_prior_unet_down_blocks_0_0_channelwise_4", "lora_prior_unet_clip_txt_mapper"} <= stems
    assert {"lora_prior_te_text_model_encoder_layers_0_self_attn_q_proj", "lora_prior_te_text_projection"} <= stems
    assert not [stem for stem in stems if "depthwise" in stem or "clip_img" in stem]


@pytest.fixture(scope="module")
def single_file(folder, tmp_path_factory):
    """A fine-tuned prior and its text encoder in one file, and what is in it."""
    module = StableCascade(str(folder), **tiny_priors.options(folder))
    module.method = Finetune()
    module.output_options = Output(dtype="fp32", checkpoint_format=CheckpointFormat.single_file)
    module.configure_model()
    with torch.no_grad():
        module.part("prior").clip_txt_mapper.weight.add_(1.0)
    file = module.export(tmp_path_factory.mktemp("file") / "final")
    return file, {name: module.part(name).state_dict() for name in ("prior", "text_encoder")}


def from_file(file, folder, **settings):
    module = StableCascade(str(file), **tiny_priors.options(folder) | {"text_encoder": str(folder)} | settings)
    module.config_name = str(folder)  # the tiny one's architecture in the place of the published
    module.configure_model()
    return module


def same(state, other):
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


def test_a_single_file_comes_back(single_file, folder):
    file, written = single_file
    module = from_file(file, folder)
    assert same(module.part("prior").state_dict(), written["prior"])
    assert same(module.part("text_encoder").state_dict(), written["text_encoder"])
    with torch.no_grad():
        assert module.losses(batch(), u=U, stream="noise").isfinite().all()
    assert from_file(file, folder, dtype="bf16").part("prior").dtype == torch.bfloat16


def stage_c(file, target):
    """The prior alone, as the published stage C files have it."""
    from safetensors.torch import load_file, save_file

    prefix = "model.diffusion_model."
    prior = {key.removeprefix(prefix): tensor for key, tensor in load_file(file).items() if key.startswith(prefix)}
    save_file(prior, target)
    return target


def test_diffusers_reads_the_same_out_of_stage_c(single_file, folder, tmp_path):
    file = stage_c(single_file[0], tmp_path / "stage_c.safetensors")
    theirs = StableCascadeUNet.from_single_file(str(file), config=str(folder), subfolder="prior", local_files_only=True)
    assert same(theirs.state_dict(), single_file[1]["prior"])


def test_stage_c_alone_takes_the_text_encoder_from_elsewhere(single_file, folder, tmp_path):
    module = from_file(stage_c(single_file[0], tmp_path / "stage_c.safetensors"), folder)
    assert same(module.part("prior").state_dict(), single_file[1]["prior"])
    text = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder").state_dict()
    assert same(module.part("text_encoder").state_dict(), text)
    module.release(["text_encoder"])
    module.recover()
    assert same(module.part("text_encoder").state_dict(), text)


def test_a_file_of_another_size_names_the_model_that_it_belongs_to(single_file, folder):
    module = StableCascade(str(single_file[0]), **tiny_priors.options(folder), text_encoder=str(folder), lite=True)
    with pytest.raises(SettingsError, match=r"of another size.*model=stable_cascade_lite"):
        module.configure_model()


def test_a_file_that_is_no_stage_c_is_refused(folder):
    other = folder / "decoders" / "decoder" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(SettingsError, match="not a file of Stable Cascade's stage C"):
        from_file(other, folder)


def test_lite_takes_the_small_networks_where_both_lie(tmp_path):
    folder = tiny_priors.stable_cascade(tmp_path / "both")
    small = tiny_priors.stable_cascade(tmp_path / "small", width=16)
    (small / "prior").rename(folder / "prior_lite")
    (small / "decoders" / "decoder").rename(folder / "decoders" / "decoder_lite")
    widths = {}
    for lite in (False, True):
        module = loaded(StableCascade, folder, lite=lite)
        widths[lite] = module.part("prior").config.block_out_channels[0]
        skeleton = StableCascade(str(folder), **tiny_priors.options(folder), lite=lite)
        skeleton.build_skeleton()
        assert skeleton.part("prior").config.block_out_channels[0] == widths[lite]
    assert widths == {False: 32, True: 16}
    assert "decoder_lite" in module.decoder_subfolders("decoder")


# At full size


def full(**settings):
    module = StableCascade("published/weights", effnet="published/effnet", **settings)
    module.build_skeleton()
    return module


@pytest.fixture(scope="module")
def both_sizes():
    """The 3.6B and the 1B model on the meta device."""
    return {False: full(), True: full(lite=True)}


@pytest.mark.parametrize(
    ("lite", "part", "count", "gigabytes"),
    [
        (False, "prior", 3_589_103_632, 14.4),
        (True, "prior", 1_030_785_040, 4.1),
        (False, "text_encoder", 694_659_840, 2.8),
    ],
)
def test_it_has_the_published_size(both_sizes, lite, part, count, gigabytes):
    module = both_sizes[lite]
    assert sum(p.numel() for p in module.part(part).parameters()) == count
    row = next(row for row in memory.weights(module) if row["part"] == part)
    assert row["bytes"] / 1e9 == pytest.approx(gigabytes, abs=0.05)
    assert row["dtype"] == "float32"


@pytest.mark.parametrize(
    ("preset", "count"),
    [  # published, less the depthwise convolutions (32 each way) and the mapper of the image condition
        ("attn-only", 256),
        ("down-blocks", 352 - 32),
        ("up-blocks", 352 - 32),
        ("blocks", 2 * (352 - 32)),
        ("mapper", 259 - 1),
        ("full", 711 - 64 - 1),
        ("attn-mlp", 256 + 2 * 64),
    ],
)
def test_presets_find_the_published_number_of_layers(both_sizes, preset, count):
    module = both_sizes[False]
    prior = module.part("prior")
    assert len(matching({"prior": layers(prior)}, preset, module.lora_targets)["prior"]) == count
