"""Text encoders are let go and come back; drawing does not notice."""

import inspect
import json

import diffusers
import pytest
import torch

from otl.config import SettingsError
from otl.modules import drawing
from otl.modules.pixart_alpha import PixArtAlpha
from otl.modules.stable_cascade import StableCascade
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_2 import StableDiffusion2
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.modules.wuerstchen import Wuerstchen


@pytest.fixture(params=["sd15", "sdxl"])
def module(request, sd15_folder, sdxl_folder):
    made = StableDiffusion(str(sd15_folder)) if request.param == "sd15" else StableDiffusionXL(str(sdxl_folder))
    made.configure_model()
    made.data_resolution = 32
    return made


def drawn(module, *prompts):
    pictures = module.draw(list(prompts), [3] * len(prompts), negative_prompt="blurry", steps=2, guidance=3.0)
    return [picture.tobytes() for picture in pictures]


def test_pictures_are_the_same_after_the_text_encoders_were_let_go(module):
    before = drawn(module, "a cat", "a dog")
    module.kept_prompts = drawing.encoded(module, ["a cat", "blurry"], batch_size=1)
    module.release(module.text_encoders)
    for name in module.text_encoders:
        assert {p.device.type for p in module.part(name).parameters()} == {"meta"}
    assert drawn(module, "a cat", "a dog") == before  # a dog was not kept: the encoders came back for it
    assert module.released == set(module.text_encoders)  # and went again


def test_what_was_kept_is_drawn_without_loading_anything(module, monkeypatch):
    expected = drawn(module, "a cat")
    module.kept_prompts = drawing.encoded(module, ["a cat", "blurry"], batch_size=4)
    module.release(module.text_encoders)
    monkeypatch.setattr(type(module), "load_part", lambda *_: pytest.fail("loaded"))
    assert drawn(module, "a cat") == expected


def test_what_comes_back_is_what_was_loaded(module):
    weights = {name: part.clone() for name, part in module.part("text_encoder").state_dict().items()}
    module.release(["text_encoder"])
    module.recover()
    assert not module.released
    back = module.part("text_encoder").state_dict()
    assert back.keys() == weights.keys()
    assert all(torch.equal(back[name], weights[name]) and back[name].dtype == weights[name].dtype for name in weights)
    assert not any(p.requires_grad for p in module.part("text_encoder").parameters())


def test_a_checkpoint_that_went_away_is_named(sd15_folder, tmp_path):
    import shutil

    folder = shutil.copytree(sd15_folder, tmp_path / "model")
    module = StableDiffusion(str(folder))
    module.configure_model()
    module.release(["text_encoder"])
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(SettingsError, match=r"model\.checkpoint=.*text_encoder .*put it back"):
        module.recover()


def test_prompt_identity_sees_the_tokenizer(sd15_folder, tmp_path):
    import shutil

    folder = shutil.copytree(sd15_folder, tmp_path / "model")
    settings = folder / "tokenizer" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_max_length": 40}))
    identities = []
    for checkpoint in (sd15_folder, folder):
        module = StableDiffusion(str(checkpoint))
        module.configure_model()
        identities.append(module.prompt_identity())
    assert identities[0] != identities[1]


def identities(folder):
    module = StableDiffusion(str(folder))
    module.configure_model()
    return module.image_identity(), module.prompt_identity()


@pytest.mark.parametrize(
    ("part", "change", "image", "prompt"),
    [
        ("vae", {"scaling_factor": 0.5}, True, False),
        ("vae", {"norm_num_groups": 16}, True, False),
        ("vae", {"act_fn": "gelu"}, True, False),
        ("text_encoder", {"hidden_act": "gelu"}, False, True),
        ("text_encoder", {"num_attention_heads": 4}, False, True),
        ("text_encoder", {"layer_norm_eps": 0.1}, False, True),
        ("vae", {"sample_size": 64, "_name_or_path": "x", "_diffusers_version": "0.1"}, False, False),
        ("text_encoder", {"initializer_range": 1.0, "attention_dropout": 0.5, "torch_dtype": "float16"}, False, False),
        ("unet", {"norm_eps": 0.1}, False, False),
        ("scheduler", {"prediction_type": "v_prediction"}, False, False),
    ],
)
def test_identities_see_the_configs_of_their_networks_as_far_as_these_matter(
    sd15_folder, tmp_path, part, change, image, prompt
):
    """Same weights, same tokenizer, in another folder."""
    import shutil

    folder = shutil.copytree(sd15_folder, tmp_path / "model")
    file = folder / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    before, after = identities(sd15_folder), identities(folder)
    assert [one != other for one, other in zip(before, after)] == [image, prompt]


def test_a_pipeline_that_has_drawn_still_says_that_it_has_text_encoders(module):
    before = {name: module.pipeline.config[name] for name in module.text_encoders}
    drawn(module, "a cat")
    assert {name: module.pipeline.config[name] for name in module.text_encoders} == before
    assert all(library == "transformers" for library, _ in before.values())


def test_drawing_leaves_what_the_pipeline_would_save_as_it_was(module):
    before = dict(module.pipeline.config)
    drawn(module, "a cat")
    assert dict(module.pipeline.config) == before


def test_prompt_identity_does_not_depend_on_what_was_encoded_before(module):
    before = module.prompt_identity()
    module.encode_prompt(["a cat", "a dog that is fed"])
    assert module.prompt_identity() == before


def test_without_a_guidance_the_family_s_own_draws(module):
    def picture(**options):
        return module.draw(["a cat"], [3], steps=2, **options)[0].tobytes()

    assert picture() == picture(guidance=module.guidance) != picture(guidance=1.0)


@pytest.mark.parametrize(
    ("family", "pipeline", "name"),
    [
        (StableDiffusion, diffusers.StableDiffusionPipeline, "guidance_scale"),
        (StableDiffusion2, diffusers.StableDiffusionPipeline, "guidance_scale"),
        (StableDiffusionXL, diffusers.StableDiffusionXLPipeline, "guidance_scale"),
        (PixArtAlpha, diffusers.PixArtAlphaPipeline, "guidance_scale"),
        (Wuerstchen, diffusers.WuerstchenCombinedPipeline, "prior_guidance_scale"),
        (StableCascade, diffusers.StableCascadePriorPipeline, "guidance_scale"),
    ],
)
def test_a_family_s_guidance_is_the_published_pipeline_s(family, pipeline, name):
    assert family.guidance == inspect.signature(pipeline.__call__).parameters[name].default
