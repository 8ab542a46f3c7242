"""The untrained start of the small checkpoint."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from examples.shapes.draw import NEW_WORD, Scene, combinations
from examples.shapes.make_base import (
    NOISE,
    TOKENS,
    narrowed,
    random_vae,
    scribbles,
    small_tokenizer,
    train_decoder,
    untrained_pipeline,
)
from otl.formats.folder import save_pipeline

LONGEST = Scene("small", "yellow", "triangle", "orange", "at the bottom")


@pytest.fixture(scope="module")
def tokenizer():
    return small_tokenizer()


def test_the_longest_caption_fits_with_the_new_word(tokenizer):
    assert len(tokenizer(LONGEST.caption(NEW_WORD)).input_ids) <= TOKENS == tokenizer.model_max_length


def test_every_word_of_the_captions_is_one_token(tokenizer):
    captions = {scene.caption() for scene in combinations()} | {LONGEST.caption()}
    assert all(len(tokenizer(caption).input_ids) == len(caption.split()) + 2 for caption in captions)


def test_any_text_can_be_read_back(tokenizer):
    ids = tokenizer("a gle, café!").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True).replace(" ", "") == "agle,café!"


def test_the_posterior_is_as_wide_as_the_noise_in_training():
    posterior = narrowed(random_vae()).encode(torch.randn(1, 3, 16, 16)).latent_dist
    assert posterior.std.min().item() == pytest.approx(NOISE) == pytest.approx(posterior.std.max().item())


def test_the_folder_gives_the_same_pictures_as_what_was_saved(tmp_path):
    pipeline = untrained_pipeline(random_vae())
    pictures = []
    loaded = StableDiffusionPipeline.from_pretrained(save_pipeline(pipeline, tmp_path / "base", dtype="fp32"))
    for each in (pipeline, loaded):
        each.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        pictures.append(each(LONGEST.caption(), num_inference_steps=2, generator=generator, output_type="np").images)
    assert (pictures[0] == pictures[1]).all()
    assert pictures[0].shape == (1, 64, 64, 3)


def test_the_decoders_training_leaves_the_latents_alone():
    vae, images = random_vae(), scribbles(4, seed=0)
    before = vae.encode(images).latent_dist.mean
    error = (vae.decode(before).sample - images).abs().mean()
    train_decoder(vae, images, steps=20, batch=2)
    assert torch.equal(vae.encode(images).latent_dist.mean, before)
    assert (vae.decode(before).sample - images).abs().mean() < error


def test_scribbles_are_a_function_of_their_seed():
    assert torch.equal(scribbles(2, seed=0), scribbles(2, seed=0))
    assert not torch.equal(scribbles(2, seed=0), scribbles(2, seed=1))
    assert scribbles(2, seed=0).abs().max() <= 1
