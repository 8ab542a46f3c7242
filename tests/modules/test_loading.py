"""Where weights come from, and what is said when they are not there."""

import hashlib
import json
import os
import re
import shutil

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from otl.config import SettingsError
from otl.datamodules import files
from otl.datamodules.index import Index
from otl.formats.original import config_folder, sgm_unet_names
from otl.methods.finetune import Finetune
from otl.methods.injected import adapted
from otl.methods.lora import Lora
from otl.modules import loading
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_xl import StableDiffusionXL
from otl.types import Batch
from tests import tiny


def test_a_path_that_is_not_there_names_its_neighbour(tmp_path):
    (tmp_path / "dreamlike").mkdir()
    with pytest.raises(SettingsError, match=f"did you mean {tmp_path / 'dreamlike'}"):
        StableDiffusion(str(tmp_path / "dreamlke")).configure_model()


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


def test_what_trains_whole_is_loaded_without_rounding(sd15_folder):
    module = StableDiffusion(str(sd15_folder))
    module.method, module.autocast_dtype = Finetune(), torch.bfloat16
    module.configure_model()
    exact = StableDiffusion(str(sd15_folder))
    exact.configure_model()
    theirs = exact.part("unet").state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in module.part("unet").state_dict().items())
    assert module.part("text_encoder").dtype == torch.bfloat16


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


VAE_NAMES = [  # diffusers -> the original code, by regular expression
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0", lambda m: "mid.attn_1"),
    (r"group_norm", lambda m: "norm"),
    (r"to_out\.0", lambda m: "proj_out"),
    (r"to_([qkv])\b", lambda m: m[1]),
    (r"down_blocks\.(\d)\.resnets", lambda m: f"down.{m[1]}.block"),
    (r"down_blocks\.(\d)\.downsamplers\.0", lambda m: f"down.{m[1]}.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{1 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{1 - int(m[1])}.upsample"),
    (r"conv_norm_out", lambda m: "norm_out"),
    (r"conv_shortcut", lambda m: "nin_shortcut"),
]


def original(pipeline):
    """The weights of a tiny SD1.5 pipeline under the names of the original single-file checkpoints."""
    tensors = {}
    names = sgm_unet_names(dict(pipeline.unet.config), {n.rpartition(".")[0] for n in pipeline.unet.state_dict()})
    for name, tensor in pipeline.unet.state_dict().items():
        module, _, end = name.rpartition(".")
        tensors[f"model.diffusion_model.{names[module]}.{end}"] = tensor
    for name, tensor in pipeline.vae.state_dict().items():
        for pattern, spelled in VAE_NAMES:
            name = re.sub(pattern, spelled, name)
        convolved = "attn_1" in name and tensor.dim() == 2
        tensors[f"first_stage_model.{name}"] = tensor[..., None, None] if convolved else tensor
    for name, tensor in pipeline.text_encoder.state_dict().items():
        tensors[f"cond_stage_model.transformer.text_model.{name}"] = tensor
    return tensors


def test_a_single_file_is_read_offline_and_equals_the_folder(tmp_path):
    """With the configs that ship: here a tiny model's in their place, so that the file is small."""
    folder = tiny.sd15(tmp_path / "model", words=tiny.CLIP)
    config = config_folder("sd15", tmp_path / "config")
    for part in ("unet", "vae", "text_encoder"):
        shutil.copy(folder / part / "config.json", config / part / "config.json")

    class Tiny(StableDiffusion):
        config_name = str(config)
        file_keys = ("model.diffusion_model.input_blocks.0.0.weight",)

    from_folder = StableDiffusion(str(folder))
    from_folder.configure_model()
    file = tmp_path / "model.safetensors"
    save_file({name: t.contiguous().clone() for name, t in original(from_folder.pipeline).items()}, file)

    from_file = Tiny(str(file))
    from_file.configure_model()
    for part in from_folder.part_names:
        theirs = from_folder.part(part).state_dict()
        ours = from_file.part(part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), part
    torch.testing.assert_close(from_file.encode_prompt(["a cat"]), from_folder.encode_prompt(["a cat"]))


def test_a_file_of_another_family_is_refused(sd15_folder, tmp_path):
    save_file({"some.key": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(SettingsError, match="not a single-file checkpoint of StableDiffusionXL"):
        StableDiffusionXL(str(tmp_path / "model.safetensors")).configure_model()


@pytest.mark.parametrize("family", [StableDiffusion, StableDiffusionXL])
def test_gradient_checkpointing_gives_the_same_gradients(family, sd15_folder, sdxl_folder):
    folder = sd15_folder if family is StableDiffusion else sdxl_folder

    def gradients(*, checkpointing):
        module = family(str(folder), gradient_checkpointing=checkpointing)
        module.method = Lora(rank=4)
        module.configure_model()
        module.train()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.trained_parameters().values():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        calls = []
        for layer in adapted(module.part("unet")).values():
            layer.register_forward_hook(lambda *_: calls.append(1))
        module.losses(example(module), u=torch.tensor([0.5]), stream="noise").mean().backward()
        return {name: parameter.grad for name, parameter in module.trained_parameters().items()}, len(calls)

    (plain, once), (checkpointed, twice) = gradients(checkpointing=False), gradients(checkpointing=True)
    assert len(plain) > 10
    assert twice > 1.5 * once  # most a second time on the way back, instead of keeping what came of the first
    torch.testing.assert_close(plain, checkpointed)


def example(module):
    """One image of noise."""
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pair = torch.tensor([[32, 32]])
    return Batch(
        index=torch.tensor([0]),
        key=torch.tensor([1]),
        captions=["a cat"],
        original_size=pair,
        crop=torch.zeros_like(pair),
        target_size=pair,
        weight=torch.ones(1),
        pixels=pixels,
    )


@pytest.mark.parametrize(
    ("config", "channels", "text"),
    [
        ("sd15", 9, "9 input channels, not 4: it is an inpainting model"),
        ("sd15_inpaint", 4, "it is no inpainting model"),
    ],
)
def test_a_file_with_other_input_channels_than_the_settings_describe_is_refused(tmp_path, config, channels, text):
    first = "model.diffusion_model.input_blocks.0.0.weight"
    tensors = {key: torch.zeros(1) for key in StableDiffusion.file_keys} | {first: torch.zeros(2, channels, 3, 3)}
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(SettingsError, match=text):
        StableDiffusion(str(tmp_path / "m.safetensors"), config=config).configure_model()


def test_a_checkpoint_that_has_not_changed_is_not_read_again_to_know_it(tmp_path, monkeypatch):
    """Of one that has, the time may say that it has not."""
    monkeypatch.setattr(files, "tick", lambda _: -1)  # whatever is there is old enough to be known
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    family, changed = StableDiffusion(str(file)), os.stat(file).st_mtime_ns
    first = loading.identity(family, Index(tmp_path, "weights"))
    assert first == loading.identity(family)
    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", lambda *_: pytest.fail("read again"))
        assert loading.identity(family, Index(tmp_path, "weights")) == first
    file.write_bytes(b"two")
    os.utime(file, ns=(changed, changed))
    assert loading.identity(family, Index(tmp_path, "weights")) == loading.identity(family) != first
