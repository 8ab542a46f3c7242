"""Where weights come from, and what is said when they are not there."""

import json

import pytest
import torch
from huggingface_hub import constants

from otl.config import SettingsError
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL


def test_a_path_that_is_not_there_names_its_neighbour(sd15_folder):
    wrong = str(sd15_folder)[:-1] + "x"
    with pytest.raises(SettingsError, match=f"did you mean {sd15_folder}"):
        StableDiffusion(wrong).configure_model()


def test_a_folder_without_an_index_says_how_to_give_one(tmp_path):
    with pytest.raises(SettingsError, match=r"model_index\.json.*model\.checkpoint=PATH"):
        StableDiffusion(str(tmp_path)).configure_model()


def test_a_checkpoint_of_another_family_is_refused(sd15_folder, sdxl_folder):
    with pytest.raises(SettingsError, match="without text_encoder_2"):
        StableDiffusionXL(str(sd15_folder)).configure_model()
    with pytest.raises(SettingsError, match="two text encoders"):
        StableDiffusion(str(sdxl_folder)).configure_model()


def test_a_file_that_is_not_safetensors_is_refused(tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"x")
    with pytest.raises(SettingsError, match=r"only \.safetensors"):
        StableDiffusion(str(tmp_path / "model.ckpt")).configure_model()


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(SettingsError, match=r"model\.safetensors: not a whole safetensors file"):
        StableDiffusion(str(tmp_path / "model.safetensors")).configure_model()


def test_without_hub_and_cache_the_error_says_where_it_looked(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SettingsError, match=r"nobody/nothing.*not in the hub's cache.*model\.checkpoint=PATH"):
        StableDiffusion("nobody/nothing").configure_model()


def test_weights_are_frozen_and_nothing_is_registered_until_a_method_says_so(sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    module.configure_model()
    assert module.state_dict() == {}
    assert not any(p.requires_grad for name in module.part_names for p in module.part(name).parameters())


def test_frozen_weights_take_the_dtype_asked_for_but_the_vae_stays_fp32(sd15_folder):
    module = StableDiffusion(str(sd15_folder), dtype="bf16")
    module.configure_model()
    dtypes = {name: next(module.part(name).parameters()).dtype for name in module.part_names}
    assert dtypes == {"unet": torch.bfloat16, "text_encoder": torch.bfloat16, "vae": torch.float32}


@pytest.mark.parametrize(
    ("family", "part", "count"),
    [
        (StableDiffusion, "unet", 859_520_964),
        (StableDiffusion, "vae", 83_653_863),
        (StableDiffusion, "text_encoder", 123_060_480),
        (StableDiffusionXL, "unet", 2_567_463_684),
        (StableDiffusionXL, "text_encoder_2", 694_659_840),
    ],
)
def test_the_published_parameter_counts_on_the_meta_device(family, part, count):
    module = family("published/weights")
    module.build_skeleton()
    assert sum(p.numel() for p in module.part(part).parameters()) == count


def test_a_skeleton_of_a_folder_has_the_folder_s_own_shapes(sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    module.build_skeleton()
    config = json.loads((sd15_folder / "unet" / "config.json").read_text())
    assert module.part("unet").conv_in.weight.shape[0] == config["block_out_channels"][0]
    assert module.part("unet").conv_in.weight.device.type == "meta"
