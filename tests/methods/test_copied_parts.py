"""A full fine-tune's export copies the text encoders that were let go, and never makes them again."""

import json
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from otl.config import CheckpointFormat, Output
from otl.formats.lora import portable_text_path
from otl.formats.original import config_folder
from otl.methods.finetune import Finetune
from otl.modules.pixart_alpha import PixArtAlpha
from otl.modules.stable_cascade import StableCascade
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_2 import StableDiffusion2
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.modules.wuerstchen import Wuerstchen
from tests import tiny, tiny_priors

CLASSES = {
    "sd15": StableDiffusion,
    "sd21": StableDiffusion2,
    "sdxl": StableDiffusionXL,
    "pixart_alpha": PixArtAlpha,
    "wuerstchen": Wuerstchen,
    "stable_cascade": StableCascade,
}
FILES = [name for name, family in CLASSES.items() if family.writes_file]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, sd15_folder, sd2_folder, sdxl_folder):
    """family -> folder and further settings."""
    made = {"sd15": sd15_folder, "sd21": sd2_folder, "sdxl": sdxl_folder}
    made["pixart_alpha"] = tiny.pixart_alpha(tmp_path_factory.mktemp("pixart_alpha"))
    found = {name: (folder, {}) for name, folder in made.items()}
    for name, (_, build) in tiny_priors.FAMILIES.items():
        folder = build(tmp_path_factory.mktemp(name))
        found[name] = folder, tiny_priors.options(folder)
    return found


def tuned(module, **output):
    """As after a fine-tune whose captions were cached, and what its text encoders were before they were let go."""
    module.method, module.output_options = Finetune(), Output(**{"dtype": "fp32"} | output)
    module.configure_model()
    texts = {name: module.part(name).state_dict() for name in module.text_encoders}
    module.release(module.text_encoders)
    return module, texts


@pytest.fixture
def nothing_made(monkeypatch):
    """From its call on no network of transformers can be made."""

    def refuse(*_, **__):
        raise AssertionError("a text encoder was made")

    return lambda: monkeypatch.setattr(PreTrainedModel, "__init__", refuse)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def portable(state, dtype=torch.float32):
    return {portable_text_path(name): tensor.to(dtype) for name, tensor in state.items()}


def assert_copied(folder, texts, dtype=torch.float32):
    for name, state in texts.items():
        assert same(load_file(folder / name / "model.safetensors"), portable(state, dtype)), name


@pytest.mark.parametrize(("name", "dtype"), [*((name, "fp32") for name in CLASSES), ("pixart_alpha", "bf16")])
def test_into_a_folder(name, dtype, checkpoints, nothing_made, tmp_path):
    folder, options = checkpoints[name]
    module, texts = tuned(CLASSES[name](str(folder), **options), dtype=dtype)
    nothing_made()
    assert_copied(module.export(tmp_path / "final"), texts, torch.float32 if dtype == "fp32" else torch.bfloat16)
    assert module.released == set(module.text_encoders)


@pytest.mark.parametrize("name", FILES)
def test_into_a_single_file(name, checkpoints, nothing_made, tmp_path):
    folder, options = checkpoints[name]
    module, _ = tuned(CLASSES[name](str(folder), **options), checkpoint_format=CheckpointFormat.single_file)
    module.recover()
    whole = dict(module.single_file())
    module.release(module.text_encoders)
    nothing_made()
    assert same(load_file(module.export(tmp_path / "final")), whole)


@pytest.mark.parametrize("name", ["sdxl", "stable_cascade"])
def test_out_of_the_hub_s_cache(name, checkpoints, nothing_made, tmp_path, monkeypatch):
    folder, options = checkpoints[name]
    module, texts = tuned(CLASSES[name](str(folder), **options))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--someone--something"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / "abc").symlink_to(folder)
    module.checkpoint = "someone/something"
    nothing_made()
    assert_copied(module.export(tmp_path / "final"), texts)


@pytest.mark.parametrize("name", [name for name in FILES if name != "sd15"])
def test_out_of_a_single_file(name, checkpoints, nothing_made, tmp_path):
    folder, options = checkpoints[name]
    first, _ = tuned(CLASSES[name](str(folder), **options), checkpoint_format=CheckpointFormat.single_file)
    first.recover()
    file = tmp_path / "published.safetensors"
    save_file({key: tensor.contiguous().clone() for key, tensor in first.single_file().items()}, file)

    config = config_folder("sdxl" if name == "sdxl" else "sd15", tmp_path / "config")
    for part in first.part_names:
        shutil.copytree(folder / part, config / part, dirs_exist_ok=True)
    if name == "stable_cascade":
        options = options | {"text_encoder": str(folder)}
    reader = type("Tiny", (CLASSES[name],), {"file_keys": (), "config_name": str(config)})(str(file), **options)
    module, texts = tuned(reader)
    nothing_made()
    assert_copied(module.export(tmp_path / "final"), texts)
    module.output_options.checkpoint_format = CheckpointFormat.single_file
    assert same(load_file(module.export(tmp_path / "other")), load_file(file))


def test_names_that_only_the_library_knows_are_loaded_by_it(checkpoints, tmp_path):
    """As a checkpoint of torch.save, which is not read one tensor at a time."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoints["sd15"][0], folder)
    weights = folder / "text_encoder" / "model.safetensors"
    torch.save(load_file(weights), weights.with_name("pytorch_model.bin"))
    weights.unlink()
    module, texts = tuned(StableDiffusion(str(folder)))
    assert_copied(module.export(tmp_path / "final"), texts)
    assert module.released == {"text_encoder"}
    assert json.loads((tmp_path / "final" / "model_index.json").read_text())["text_encoder"][1] == "CLIPTextModel"
