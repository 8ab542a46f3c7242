"""The decoders come only to draw, and what is missing is told before the large networks are loaded."""

import gc
import shutil
import weakref

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from otl.config import SampleOptions, SettingsError
from otl.modules import fetching
from otl.modules.efficientnet import EfficientNetEncoder
from otl.modules.stable_cascade import StableCascade
from otl.modules.wuerstchen import Wuerstchen
from otl.types import Size
from tests import tiny_priors
from tests.modules.priors import Recorder, features, loaded, pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_priors.stable_cascade(tmp_path_factory.mktemp("cascade"))


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def no_networks(monkeypatch):
    """Loading any network but the image encoder fails the test."""
    monkeypatch.setattr(fetching, "fetch", lambda *_, **__: pytest.fail("a network was loaded"))


def drawing(module):
    module.sample_options = SampleOptions(prompts=["a cat"])
    return module


def test_the_decoders_are_loaded_once_for_a_drawing_and_let_go(folder, monkeypatch):
    module = loaded(StableCascade, folder)
    load, seen = module.load_decoders, []

    def counted():
        pipeline = load()
        seen.append(weakref.ref(pipeline.decoder))
        return pipeline

    monkeypatch.setattr(module, "load_decoders", counted)
    assert module.decoders is None
    module.draw(["a cat", "a dog", "a cow"], [0, 1, 2], steps=1, guidance=1.0, batch_size=2)
    gc.collect()
    assert [reference() for reference in seen] == [None]


@pytest.mark.parametrize(("family", "build"), tiny_priors.FAMILIES.values(), ids=tiny_priors.FAMILIES)
def test_without_guidance_the_negative_prompt_has_no_effect(family, build, tmp_path):
    module = loaded(family, build(tmp_path))
    with torch.no_grad():
        cond, *unconds = (module.encode_prompt([text] * 2) for text in ("a cat", "", "seven trees"))

    def latents(uncond, guidance):
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return module.sample(cond, uncond, generators=generators, steps=2, guidance=guidance, size=Size(128, 128))

    assert torch.equal(latents(unconds[0], 1.0), latents(unconds[1], 1.0))
    assert not torch.equal(latents(unconds[0], 2.0), latents(unconds[1], 2.0))


def test_a_picture_decodes_alike_alone_and_beside_others(folder):
    module = loaded(StableCascade, folder)
    with torch.no_grad():
        latents = module.encode_image(pixels())
        both, alone = module.decode_image(latents), module.decode_image(latents[1:])
    torch.testing.assert_close(both[1:], alone)
    assert not torch.allclose(both[0], both[1])


@pytest.mark.parametrize(("family", "build"), tiny_priors.FAMILIES.values(), ids=tiny_priors.FAMILIES)
def test_the_decoders_read_what_the_image_encoder_gives(family, build, tmp_path):
    module = loaded(family, build(tmp_path))
    module.decoders = Recorder()
    with torch.no_grad():
        module.decode_image(module.encode_image(pixels()))
    torch.testing.assert_close(torch.cat(module.decoders.seen), features(tmp_path), rtol=1e-4, atol=1e-4)


def test_the_pictures_follow_the_prompt_in_the_decoder_too(folder):
    module = loaded(StableCascade, folder)
    with torch.no_grad():
        latents = module.encode_image(pixels())[:1]
        one, other = (
            module.decode_sample(latents, [prompt], generators=[torch.Generator().manual_seed(0)])
            for prompt in ("a cat", "seven trees")
        )
    assert not torch.equal(one, other)


@pytest.mark.parametrize("family", [Wuerstchen, StableCascade])
def test_drawing_without_a_decoder_is_refused_in_the_plan_and_before_loading(family, folder, no_networks):
    for start in ("build_skeleton", "configure_model"):
        module = drawing(family(str(folder), effnet=str(folder / "effnet")))
        with pytest.raises(SettingsError, match=r"model\.decoder: null.*sample\.prompts=\[\]"):
            getattr(module, start)()


def test_a_size_that_cannot_be_drawn_is_refused_in_the_plan(folder):
    module = StableCascade(str(folder), **tiny_priors.options(folder))
    module.sample_options = SampleOptions(prompts=["a cat"], height=1024, width=1000)
    with pytest.raises(SettingsError, match=r"sample\.width=1000.*multiple"):
        module.build_skeleton()


def test_no_prompts_need_no_decoder(folder):
    module = StableCascade(str(folder), effnet=str(folder / "effnet"))
    module.configure_model()
    with pytest.raises(SettingsError, match=r"model\.decoder: null"):
        module.draw(["a cat"], [0], steps=1)


@pytest.mark.parametrize(
    ("decoder", "message"),
    [
        ("{folder}/nowhere", r"model\.decoder=.*nowhere: there is no such folder"),
        ("{folder}/effnet", r"model\.decoder=.*effnet: the folder has no vqgan/config\.json"),
        ("nobody/nothing", r"model\.decoder=nobody/nothing: vqgan cannot be loaded from there.*model\.decoder=PATH"),
    ],
)
def test_a_decoder_that_is_not_there_is_told_before_loading(folder, decoder, message, no_networks, offline):
    module = drawing(StableCascade(str(folder), effnet=str(folder / "effnet"), decoder=decoder.format(folder=folder)))
    with pytest.raises(SettingsError, match=message):
        module.configure_model()


@pytest.mark.parametrize(
    ("effnet", "message"),
    [
        ("{folder}/nowhere.safetensors", r"model\.effnet=.*nowhere\.safetensors: there is no such file or folder"),
        ("{folder}/prior/diffusion_pytorch_model.safetensors", "not the published image encoder"),
        ("{folder}/prior/config.json", "not a whole safetensors file"),
        ("{folder}/tokenizer", r"model\.effnet=.*tokenizer: .*effnet_encoder\.safetensors"),
        ("nobody/nothing/effnet.safetensors", "no file here, and the hub did not give it"),
        ("nobody/nothing", r"model\.effnet=nobody/nothing"),
    ],
)
def test_an_image_encoder_that_is_not_there_is_told_before_loading(folder, effnet, message, no_networks, offline):
    module = StableCascade(str(folder), effnet=effnet.format(folder=folder))
    with pytest.raises(SettingsError, match=message):
        module.configure_model()


def test_the_plan_sees_a_path_to_nothing(folder):
    module = StableCascade(str(folder), effnet=str(folder / "effnt"))
    with pytest.raises(SettingsError, match=r"did you mean .*effnet"):
        module.build_skeleton()
    module = StableCascade(str(folder / "nowhere"), effnet=str(folder / "effnet"))
    with pytest.raises(SettingsError, match=r"model\.checkpoint=.*nowhere: there is no such folder"):
        module.build_skeleton()


def test_a_checkpoint_of_the_other_family_is_refused(folder, tmp_path):
    other = tiny_priors.wuerstchen(tmp_path)
    with pytest.raises(SettingsError, match="is a WuerstchenPrior, not a StableCascadeUNet"):
        StableCascade(str(other), **tiny_priors.options(other)).build_skeleton()
    with pytest.raises(SettingsError, match=r"model\.checkpoint=.*Choose the model= that it belongs to"):
        StableCascade(str(other), **tiny_priors.options(other)).configure_model()


def test_a_checkpoint_with_weights_missing_is_refused(folder, tmp_path):
    broken = shutil.copytree(folder, tmp_path / "broken")
    file = broken / "prior" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["clip_txt_mapper.weight"]
    save_file(tensors, file)
    with pytest.raises(SettingsError, match=r"prior is not a whole StableCascadeUNet: 1 weights .*clip_txt_mapper"):
        StableCascade(str(broken), **tiny_priors.options(folder)).configure_model()


@pytest.mark.parametrize("affine", [True, False])
def test_the_image_encoder_is_read_from_a_published_file(affine, tmp_path):
    torch.manual_seed(0)
    made = EfficientNetEncoder(affine=affine)
    made.mapper[1].running_mean.normal_()
    state = made.state_dict()
    save_file({name: t.half() if t.is_floating_point() else t for name, t in state.items()}, tmp_path / "e.safetensors")
    read = fetching.fetch_encoder(str(tmp_path / "e.safetensors")).state_dict()
    assert read.keys() == state.keys()
    for name, tensor in state.items():
        assert read[name].dtype == tensor.dtype
        torch.testing.assert_close(read[name], tensor, rtol=1e-3, atol=1e-4)


def test_the_latents_of_a_picture_depend_on_the_scaling_too(folder):
    cascade = loaded(StableCascade, folder)
    other = loaded(StableCascade, folder)
    assert cascade.image_identity() == other.image_identity()
    other.latent_scale = 42.0
    assert cascade.image_identity() != other.image_identity()
