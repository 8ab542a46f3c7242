"""Folders of strangers: code that comes with one is never run, and what is wrong with one is said by its name."""

import json
import os
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from otl.config import SettingsError
from otl.formats import stored
from otl.modules import tokenizers
from otl.modules.stable_diffusion import StableDiffusion

EVIL = """
import pathlib
pathlib.Path("RAN").touch()
class Evil:
    from_pretrained = classmethod(lambda *_, **__: 1)
"""
OWN = {"AutoModel": "evil.Evil", "AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}


@pytest.fixture
def gift(sd15_folder, tmp_path, monkeypatch):
    """A checkpoint with a program in each of its folders."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "gift"
    shutil.copytree(sd15_folder, folder)
    for place in (folder, *(each for each in folder.iterdir() if each.is_dir())):
        (place / "evil.py").write_text(EVIL)
    return folder


def changed(path, **settings):
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ("unet", ["evil", "Evil"]),
        ("_class_name", ["evil", "Evil"]),
        ("scheduler", ["subprocess", "Popen"]),
        ("text_encoder", ["transformers", "AutoModel"]),
        ("tokenizer", ["transformers", "AutoTokenizer"]),
        ("safety_checker", ["../unet/evil", "Evil"]),
        ("vae", ["diffusers", "AutoencoderKL", "evil"]),
    ],
)
def test_classes_from_elsewhere_are_refused_before_weights_are_loaded(gift, part, named):
    changed(gift / "model_index.json", **{part: named})
    with pytest.raises(SettingsError, match=rf"gift: in model_index\.json {part} is {named[0]}\.{named[1]}"):
        StableDiffusion(str(gift)).build_skeleton()
    assert not os.path.exists("RAN")


def test_weights_that_would_take_more_memory_than_they_have_bytes_are_not_loaded(gift):
    with zipfile.ZipFile(gift / "unet" / "diffusion_pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("archive/data/0", bytes(10**6))
    with pytest.raises(SettingsError, match=r"unet/.*\.bin: says it holds 1000000 bytes, and the file has \d+"):
        StableDiffusion(str(gift)).build_skeleton()


def test_what_published_checkpoints_name_is_loaded(gift):
    old = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "image_encoder": [None, None]}
    changed(gift / "model_index.json", **old, feature_extractor=["transformers", "CLIPFeatureExtractor"])
    module = StableDiffusion(str(gift))
    module.build_skeleton()
    assert {type(module.part(name)).__name__ for name in ("unet", "vae")} == {"UNet2DConditionModel", "AutoencoderKL"}


def test_code_that_configs_map_to_is_not_run_and_nobody_is_asked(gift, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: "y")
    for file in ("text_encoder/config.json", "unet/config.json", "vae/config.json", "tokenizer/tokenizer_config.json"):
        changed(gift / file, auto_map=OWN)
    StableDiffusion(str(gift)).configure_model()
    changed(gift / "tokenizer/tokenizer_config.json", tokenizer_class="Evil")
    with pytest.raises(SettingsError, match="no tokenizer that can be read"):
        tokenizers.read(gift / "tokenizer")
    assert not os.path.exists("RAN")


def test_weights_that_could_run_code_are_not_loaded(gift):
    class Touch:
        def __reduce__(self):
            return os.system, ("touch RAN",)

    weights = gift / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({"conv_in.weight": Touch()}, weights.with_suffix(".bin"))
    with pytest.raises(SettingsError, match=r"gift: cannot be loaded \(.*diffusion_pytorch_model\.bin"):
        StableDiffusion(str(gift)).configure_model()
    assert not os.path.exists("RAN")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/secret.safetensors", "..", 7])
def test_shards_lie_beside_their_index(gift, file):
    unet = gift / "unet"
    keys = load_file(unet / "diffusion_pytorch_model.safetensors")
    (unet / "diffusion_pytorch_model.safetensors").rename(unet.parent / "secret.safetensors")
    index = unet / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, file)}))
    for load in (StableDiffusion(str(gift)).build_skeleton, lambda: stored.in_folder(unet)):
        with pytest.raises(SettingsError, match=r"unet/diffusion_pytorch_model\.safetensors\.index\.json: n"):
            load()


@pytest.mark.parametrize(
    ("file", "content", "text"),
    [
        ("model_index.json", "{", r"gift: model_index\.json is not JSON"),
        ("model_index.json", "[" * 10**5, r"gift: model_index\.json is not JSON"),
        ("model_index.json", "[]", r"gift: model_index\.json holds no settings by name"),
        ("model_index.json", '{"unet": 3}', r"gift: a None without unet, .*which StableDiffusion needs"),
        ("scheduler/scheduler_config.json", "{", r"gift/scheduler: scheduler_config\.json is not JSON"),
        ("tokenizer/tokenizer_config.json", "[]", r"gift/tokenizer: tokenizer_config\.json holds no settings by name"),
        ("tokenizer/tokenizer_config.json", "{}", r"tokenizer_config\.json: model_max_length is None, not a number"),
        ("unet/config.json", "{", r"gift/unet: config\.json is not JSON"),
        ("unet/config.json", '{"layers_per_block": 1000000000}', "asks for layers_per_block=1000000000"),
        ("unet/config.json", '{"in_channels": -4}', r"gift/unet/config\.json describes no UNet2DConditionModel"),
        ("text_encoder/config.json", '{"hidden_size": "x"}', r"text_encoder/config\.json describes no CLIPTextModel"),
    ],
)
def test_configs_that_describe_nothing_are_named(gift, file, content, text):
    (gift / file).write_text(content)
    with pytest.raises(SettingsError, match=text):
        StableDiffusion(str(gift)).build_skeleton()


def test_weights_of_other_sizes_than_the_config_are_refused(gift):
    file = gift / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {"conv_in.weight": torch.zeros(1, 1, 1, 1)}, file)
    with pytest.raises(SettingsError, match="gift: cannot be loaded"):
        StableDiffusion(str(gift)).configure_model()
