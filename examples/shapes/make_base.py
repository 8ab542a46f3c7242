"""Make the untrained start of the small checkpoint: a trained VAE, a tokenizer, and a random UNet and text encoder."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from examples.shapes.draw import COLOURS, FINER, SIDE, draw, on_circle, shade, training_scenes
from otl.formats.folder import save_pipeline
from otl.formats.tokenizer import byte_letters, write_clip_tokenizer

TOKENS = 16  # the longest caption has 13 with start and end, 15 where one of its words is new
WIDTH = 128  # of the text encoder
NOISE = 0.05  # standard deviation of the posterior


def pictures(count: int, seed: int) -> Tensor:
    """[count, 3, 64, 64] in -1..1."""
    random = Random(seed)
    drawn = np.stack([np.asarray(draw(scene, random)) for scene in training_scenes(count, random)])
    return torch.from_numpy(drawn).permute(0, 3, 1, 2).float() / 127.5 - 1


def scribbles(count: int, seed: int) -> Tensor:
    """[count, 3, 64, 64] in -1..1: outlines of any form, so that the decoder can show more than four shapes."""
    random = Random(seed)
    drawn = []
    for _ in range(count):
        ground, colour = (shade(name, random) for name in random.sample(list(COLOURS), 2))
        picture = Image.new("RGB", (SIDE * FINER, SIDE * FINER), ground)
        radius, tips = random.uniform(8, 22), random.randint(3, 12)
        x, y = (random.uniform(radius, SIDE - radius) for _ in "xy")
        outline = [on_circle(radius * random.uniform(0.3, 1), 2 * math.pi * tip / tips) for tip in range(tips)]
        ImageDraw.Draw(picture).polygon([((x + px) * FINER, (y + py) * FINER) for px, py in outline], fill=colour)
        drawn.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 127.5 - 1


def random_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
    )


def train_vae(images: Tensor, *, steps: int, batch: int) -> AutoencoderKL:
    """Trained on the posterior's mean plus a little noise: drawing from the posterior from the start stalls."""
    vae = random_vae().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        pixels = images[torch.randint(len(images), (batch,))].contiguous(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            mean = vae.encode(pixels).latent_dist.mean.float()
            back = vae.decode(mean + NOISE * torch.randn_like(mean)).sample.float()
        loss = F.mse_loss(back, pixels) + 0.1 * F.l1_loss(back, pixels) + 1e-4 * mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}: mean absolute error {(back - pixels).abs().mean():.4f}", flush=True)
    return scaled(narrowed(vae), images)


def train_decoder(vae: AutoencoderKL, images: Tensor, *, steps: int, batch: int) -> AutoencoderKL:
    """The decoder alone, which sharpens edges; the latents stay what they are."""
    with torch.no_grad():
        means = torch.cat([vae.encode(part).latent_dist.mean for part in images.split(50)])
    parameters = [*vae.decoder.parameters(), *vae.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,))
        with torch.autocast("cpu", torch.bfloat16):
            back = vae.decode(means[chosen] + NOISE * torch.randn_like(means[chosen])).sample.float()
        loss = F.mse_loss(back, images[chosen]) + 0.5 * F.l1_loss(back, images[chosen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"decoder step {step + 1}: {(back - images[chosen]).abs().mean():.4f}", flush=True)
    return vae


@torch.no_grad()
def narrowed(vae: AutoencoderKL) -> AutoencoderKL:
    """With the posterior's variance, which nothing trained, set to that of the noise in training."""
    channels = vae.config.latent_channels
    vae.quant_conv.weight[channels:] = 0
    vae.quant_conv.bias[channels:] = 2 * math.log(NOISE)
    return vae


@torch.no_grad()
def scaled(vae: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """With the factor that gives its latents unit variance."""
    latents = vae.encode(images[:256]).latent_dist.mean
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    error = (vae.decode(latents).sample - images[:256]).abs().mean()
    print(f"VAE: mean absolute error {error:.4f}, scaling factor {vae.config.scaling_factor}")
    return vae.eval()


def merges() -> str:
    """Byte pairs that make one token of every word of the captions."""
    random = Random(0)
    captions = [scene.caption() for scene in training_scenes(5000, random)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    letters = byte_letters()
    trainer = trainers.BpeTrainer(
        vocab_size=2000, initial_alphabet=letters, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return "#version: 0.2\n" + "\n".join(" ".join(pair) for pair in pairs) + "\n"


def random_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(48, 96, 96),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        cross_attention_dim=WIDTH,
        attention_head_dim=3,  # heads, in spite of its name
        norm_num_groups=16,
    )


def random_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def small_tokenizer() -> CLIPTokenizer:
    with tempfile.TemporaryDirectory() as folder:
        write_clip_tokenizer(Path(folder), pad_token="<|endoftext|>", max_length=TOKENS, merges=merges())
        return CLIPTokenizer.from_pretrained(folder)


def untrained_pipeline(vae: AutoencoderKL) -> StableDiffusionPipeline:
    """Everything around a VAE, with random weights."""
    tokenizer = small_tokenizer()
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,  # True is the default, and makes every colour wrong
        set_alpha_to_one=True,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=random_text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=random_unet(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the diffusers folder")
    parser.add_argument("--steps", type=int, default=1200, help="of the VAE's training, 16 pictures each")
    parser.add_argument("--decoder-steps", type=int, default=1500, help="of the decoder alone, after that")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    images = pictures(3000, arguments.seed)
    vae = train_vae(images, steps=arguments.steps, batch=16)
    images = torch.cat([images, scribbles(3000, arguments.seed)])
    vae = train_decoder(vae, images, steps=arguments.decoder_steps, batch=16)
    save_pipeline(untrained_pipeline(vae), arguments.out, dtype="fp32")


if __name__ == "__main__":
    main()
