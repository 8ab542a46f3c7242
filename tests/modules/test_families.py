"""Each family's prediction and loss against an independent computation with the stock pipeline's own parts."""

import pytest
import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch.nn import functional as F

from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.registry import families
from otl.types import Batch, Size

CAPTIONS = ["a small red circle", "a photo of a cat"]
SIZES = torch.tensor([[480, 640], [1080, 1920]])
CROPS = torch.tensor([[0, 12], [7, 0]])
TARGETS = torch.tensor([[32, 48], [32, 48]])
T = torch.tensor([100, 981])


def batch(pixels: torch.Tensor, noise: torch.Tensor) -> Batch:
    return Batch(
        index=torch.arange(2),
        key=torch.tensor([5, 6]),
        captions=CAPTIONS,
        original_size=SIZES,
        crop=CROPS,
        target_size=TARGETS,
        weight=torch.tensor([1.0, 2.0]),
        pixels=pixels,
        noise=noise,
    )


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
    return pixels, torch.randn(2, 4, 16, 24, generator=generator)


def u_of(t: torch.Tensor) -> torch.Tensor:
    """The uniform numbers that become these timesteps."""
    return (t + 0.5) / 1000


def test_stable_diffusion_agrees_with_the_parts_of_the_stock_pipeline(sd15_folder, drawn):
    pixels, noise = drawn
    module = StableDiffusion(str(sd15_folder))
    module.configure_model()
    ours = module.losses(batch(pixels, noise), u=u_of(T), stream="noise")

    pipe = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * 0.18215
        hidden, _ = pipe.encode_prompt(CAPTIONS, "cpu", 1, False)
        noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, T)
        predicted = pipe.unet(noisy, T, encoder_hidden_states=hidden).sample
        expected = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3)) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_sdxl_agrees_with_the_parts_of_the_stock_pipeline(sdxl_folder, drawn):
    pixels = drawn[0].repeat(1, 1, 4, 4)  # its image encoder halves the sides three times
    noise = drawn[1]
    module = StableDiffusionXL(str(sdxl_folder))
    module.configure_model()
    ours = module.losses(batch(pixels, noise), u=u_of(T), stream="noise")

    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * 0.18215
        hidden, _, pooled, _ = pipe.encode_prompt(CAPTIONS, device="cpu", do_classifier_free_guidance=False)
        sizes = torch.cat(
            [
                pipe._get_add_time_ids(
                    tuple(SIZES[i].tolist()), tuple(CROPS[i].tolist()), tuple(TARGETS[i].tolist()), torch.float32, 32
                )
                for i in range(2)
            ]
        )
        noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, T)
        conditions = {"text_embeds": pooled, "time_ids": sizes}
        predicted = pipe.unet(noisy, T, encoder_hidden_states=hidden, added_cond_kwargs=conditions).sample
        expected = F.mse_loss(predicted, noise, reduction="none").mean((1, 2, 3)) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


def test_v_prediction_and_zero_terminal_snr_reach_the_loss(sd15_folder, drawn):
    pixels, noise = drawn
    module = StableDiffusion(str(sd15_folder), prediction="v_prediction", zero_terminal_snr=True)
    module.configure_model()
    t = torch.tensor([500, 999])
    ours = module.losses(batch(pixels, noise), u=u_of(t), stream="noise")

    pipe = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    scheduler = DDPMScheduler.from_config(pipe.scheduler.config, rescale_betas_zero_snr=True)
    with torch.no_grad():
        latents = pipe.vae.encode(pixels).latent_dist.mean * 0.18215
        hidden, _ = pipe.encode_prompt(CAPTIONS, "cpu", 1, False)
        noisy = scheduler.add_noise(latents, noise, t)
        predicted = pipe.unet(noisy, t, encoder_hidden_states=hidden).sample
        target = scheduler.get_velocity(latents, noise, t)
        expected = F.mse_loss(predicted, target, reduction="none").mean((1, 2, 3)) * torch.tensor([1.0, 2.0])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_decoding_inverts_the_scaling_of_encoding(family, sd15_folder, sdxl_folder):
    module = family(str(sd15_folder if family is StableDiffusion else sdxl_folder))
    module.configure_model()
    pixels = torch.rand(1, 3, 32, 32) * 2 - 1
    vae = module.pipeline.vae
    with torch.no_grad():
        expected = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        torch.testing.assert_close(module.decode_image(module.encode_image(pixels)), expected)


def test_drawing_is_the_stock_pipeline_with_the_seed_s_own_noise(sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    module.configure_model()
    module.data_resolution = 32
    first = module.draw(["a cat", "a dog"], [3, 4], steps=2, guidance=3.0, batch_size=1)
    wide = module.draw(["a cat"], [3], steps=2, guidance=3.0, size=Size(32, 48))
    pipe = StableDiffusionPipeline.from_pretrained(sd15_folder, safety_checker=None)
    stock = pipe(
        "a dog",
        negative_prompt="",
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(4),
        height=32,
        width=32,
    ).images[0]
    assert first[1].tobytes() == stock.tobytes()
    assert wide[0].size == (48, 32)


OURS = sorted(name for name, entry in families().items() if entry.value.startswith("otl."))


def test_there_are_six_families():
    assert len(OURS) == 6


@pytest.mark.parametrize("name", OURS)
def test_a_family_says_where_it_departs_from_onetrainer(name):
    """In the docstring of its own class: what a dropped caption is, here and there."""
    said = " ".join((families()[name].load().__doc__ or "").split())
    assert "A dropped caption is the empty one" in said
    assert "OneTrainer multiplies what" in said


def test_what_random_numbers_follow_from_stays_on_the_cpu(drawn):
    moved = StableDiffusion("none").transfer_batch_to_device(batch(*drawn), torch.device("meta"), 0)
    assert {moved.index.device.type, moved.key.device.type} == {"cpu"}
    assert {moved.pixels.device.type, moved.noise.device.type, moved.target_size.device.type} == {"meta"}
