"""Whole models in one file, read back by diffusers' own reader of original checkpoints."""

import shutil

import pytest
import torch
from safetensors import safe_open

from otl.config import CheckpointFormat, Output, SettingsError
from otl.formats.original import config_folder
from otl.methods.finetune import Finetune
from otl.modules.stable_diffusion import StableDiffusion
from otl.modules.stable_diffusion_2 import StableDiffusion2
from otl.modules.stable_diffusion_xl import StableDiffusionXL

FAMILIES = {"sd15": StableDiffusion, "sd21": StableDiffusion2, "sdxl": StableDiffusionXL}
PUBLISHED_KEYS = {  # of each family's files, with the shape of the full-size model
    "sd15": {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 768),
        "model.diffusion_model.output_blocks.11.0.skip_connection.weight": (320, 640, 1, 1),
        "first_stage_model.encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "first_stage_model.decoder.up.0.block.2.conv2.weight": (128, 128, 3, 3),
        "cond_stage_model.transformer.text_model.encoder.layers.11.self_attn.q_proj.weight": (768, 768),
    },
    "sd21": {
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024),
        "first_stage_model.decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        "cond_stage_model.model.positional_embedding": (77, 1024),
        "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        "cond_stage_model.model.ln_final.bias": (1024,),
    },
    "sdxl": {
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
        "model.diffusion_model.middle_block.1.transformer_blocks.9.attn1.to_q.weight": (1280, 1280),
        "first_stage_model.encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "conditioner.embedders.0.transformer.text_model.final_layer_norm.weight": (768,),
        "conditioner.embedders.1.model.text_projection": (1280, 1280),
        "conditioner.embedders.1.model.transformer.resblocks.31.mlp.c_fc.weight": (5120, 1280),
    },
}


@pytest.mark.parametrize(("name", "tensors"), [("sd15", 1130), ("sd21", 1214), ("sdxl", 2513)])
def test_the_full_size_model_has_the_published_keys_and_shapes(name, tensors):
    module = FAMILIES[name]("published/weights")
    module.build_skeleton()
    written = module.single_file()
    assert len(written) == tensors  # counted by writing the same models with another program
    assert {key: tuple(written[key].shape) for key in PUBLISHED_KEYS[name]} == PUBLISHED_KEYS[name]


@pytest.fixture
def tuned(request, sd15_folder, sd2_folder, sdxl_folder, tmp_path):
    """A fine-tuned tiny model, its file, and a module that reads the file."""
    name = request.param
    folder = {"sd15": sd15_folder, "sd21": sd2_folder, "sdxl": sdxl_folder}[name]
    module = FAMILIES[name](str(folder))
    module.method = Finetune()
    module.output_options = Output(checkpoint_format=CheckpointFormat.single_file, dtype="fp32")
    module.configure_model()
    with torch.no_grad():
        for parameter in module.trained_parameters().values():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    module.release(module.text_encoders)  # as after the cache was filled
    file = module.export(tmp_path / "final")

    config = config_folder(name, tmp_path / "config")
    for part in module.part_names:
        shutil.copy(folder / part / "config.json", config / part / "config.json")
    reader = type("Tiny", (FAMILIES[name],), {"file_keys": ()})(str(file), config=str(config))
    return module, file, reader


@pytest.mark.parametrize("tuned", FAMILIES, indirect=True)
def test_diffusers_reads_every_weight_back_bit_for_bit(tuned):
    module, _, reader = tuned
    reader.configure_model()
    module.recover()  # the export let the text encoders go again
    for part in module.part_names:
        ours, theirs = module.part(part).state_dict(), reader.part(part).state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), part


@pytest.mark.parametrize("tuned", ["sdxl"], indirect=True)
def test_the_header_says_what_it_is(tuned):
    _, file, _ = tuned
    with safe_open(file, "pt") as opened:
        header = opened.metadata()
    assert header["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert header["modelspec.prediction_type"] == "epsilon"
    assert header["modelspec.hash_sha256"].startswith("0x")


@pytest.mark.parametrize(
    ("options", "marked"),
    [
        ({}, set()),
        ({"prediction": "v_prediction"}, {"v_pred"}),
        ({"prediction": "v_prediction", "zero_terminal_snr": True}, {"v_pred", "ztsnr"}),
    ],
)
def test_an_sdxl_that_predicts_v_carries_comfyui_s_marks(options, marked, sdxl_folder):
    module = StableDiffusionXL(str(sdxl_folder), **options)
    module.configure_model()
    assert {key for key in module.single_file() if "." not in key} == marked


def test_a_family_without_such_files_refuses_before_it_loads(sd15_folder, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "writes_file", False)
    module = StableDiffusion(str(sd15_folder))
    module.method, module.output_options = Finetune(), Output(checkpoint_format=CheckpointFormat.single_file)
    with pytest.raises(SettingsError, match=r"output\.checkpoint_format=single_file.*leave it at diffusers"):
        module.build_skeleton()
