"""Original names: against diffusers' own readers of original files, and the layout that SDXL's authors published."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_unet_state_dict_to_peft
from safetensors.torch import save_file
from torch import nn

from otl.formats.original import config_folder, sgm_unet_names

PUBLISHED = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480},
    "sdxl": {
        "unet": 2_567_463_684,
        "vae": 83_653_863,
        "text_encoder": 123_060_480,
        "text_encoder_2": 694_659_840,
    },
}
# SDXL's sgm config: attention at two of three levels, transformer depths 2 and 10.
SDXL_DEPTHS = {
    **{f"input_blocks_{i}_1": 2 for i in (4, 5)},
    **{f"input_blocks_{i}_1": 10 for i in (7, 8)},
    "middle_block_1": 10,
    **{f"output_blocks_{i}_1": 10 for i in (0, 1, 2)},
    **{f"output_blocks_{i}_1": 2 for i in (3, 4, 5)},
}
IN_TRANSFORMER = [f"attn{i}_to_{x}" for i in (1, 2) for x in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]


def layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


@pytest.mark.parametrize("family", PUBLISHED)
def test_shipped_configs_have_the_published_number_of_parameters(meta, family):
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in vars(meta[family]).items()}
    assert counts == PUBLISHED[family]


@pytest.mark.parametrize(
    ("family", "attn_mlp", "attn_only", "full"), [("sd15", 192, 128, 282), ("sdxl", 722, 560, 794)]
)
def test_layers_that_a_lora_can_adapt(meta, family, attn_mlp, attn_only, full):
    names = layers(meta[family].unet)
    assert len(names) == full
    assert sum("attentions" in name for name in names) == attn_mlp
    assert sum("attn1" in name or "attn2" in name for name in names) == attn_only


def test_attention_names_of_sdxl_are_those_of_its_published_layout(meta):
    names = layers(meta["sdxl"].unet)
    spelled = sgm_unet_names(dict(meta["sdxl"].unet.config), names)
    expected = {
        f"{block}_{name}"
        for block, depth in SDXL_DEPTHS.items()
        for name in (
            "proj_in",
            "proj_out",
            *(f"transformer_blocks_{i}_{inner}" for i in range(depth) for inner in IN_TRANSFORMER),
        )
    }
    assert {spelled[name].replace(".", "_") for name in names if "attentions" in name} == expected
    assert len(expected) == 722


def test_every_name_of_sdxl_leads_diffusers_back_to_its_module(meta):
    names = layers(meta["sdxl"].unet)
    spelled = sgm_unet_names(dict(meta["sdxl"].unet.config), names)
    file = {}
    for number, name in enumerate(names):
        key = "lora_unet_" + spelled[name].replace(".", "_")
        file[f"{key}.lora_down.weight"] = torch.full((1, 1), float(number + 1))
        file[f"{key}.lora_up.weight"] = torch.full((1, 1), float(number + 1))
    read, _ = StableDiffusionXLPipeline.lora_state_dict(file, unet_config=meta["sdxl"].unet.config)
    read = convert_unet_state_dict_to_peft(read)
    expected = {f"unet.{name}.lora_A.weight": number + 1 for number, name in enumerate(names)}
    assert {key: tensor.item() for key, tensor in read.items() if "lora_A" in key} == expected


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("conv_in", "input_blocks.0.0"),
        ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"),
        ("down_blocks.0.resnets.0.time_emb_proj", "input_blocks.1.0.emb_layers.1"),
        ("down_blocks.0.resnets.0.conv2", "input_blocks.1.0.out_layers.3"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.3.0.op"),
        ("down_blocks.1.resnets.0.conv_shortcut", "input_blocks.4.0.skip_connection"),
        ("down_blocks.1.attentions.0.proj_in", "input_blocks.4.1.proj_in"),
        ("mid_block.attentions.0.proj_in", "middle_block.1.proj_in"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv"),
        ("time_embedding.linear_1", "time_embed.0"),
        ("add_embedding.linear_1", "label_emb.0.0"),
        ("conv_out", "out.2"),
    ],
)
def test_names_of_sdxl_that_other_trainers_write(meta, name, spelled):
    assert sgm_unet_names(dict(meta["sdxl"].unet.config), [name]) == {name: spelled}


@pytest.mark.parametrize(
    ("name", "spelled"),
    [
        ("down_blocks.2.downsamplers.0.conv", "input_blocks.9.0.op"),
        ("down_blocks.3.resnets.1.conv1", "input_blocks.11.0.in_layers.2"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv"),  # no attention in its block
        ("up_blocks.1.upsamplers.0.conv", "output_blocks.5.2.conv"),
        ("up_blocks.3.attentions.2.proj_out", "output_blocks.11.1.proj_out"),
    ],
)
def test_names_in_the_published_checkpoints_of_sd15(meta, name, spelled):
    assert sgm_unet_names(dict(meta["sd15"].unet.config), [name]) == {name: spelled}


def test_kinds_of_resnet_layers_in_sdxl(meta):
    names = sgm_unet_names(dict(meta["sdxl"].unet.config), layers(meta["sdxl"].unet)).values()
    ends = ("in_layers.2", "emb_layers.1", "out_layers.3", "skip_connection", "op")
    assert [sum(name.endswith(f".{end}") for name in names) for end in ends] == [17, 17, 17, 11, 2]


def test_names_are_unique(meta):
    for family in ("sd15", "sdxl"):
        names = layers(meta[family].unet)
        assert len(set(sgm_unet_names(dict(meta[family].unet.config), names).values())) == len(names)


def test_uneven_blocks_are_numbered_through():
    config = {
        "layers_per_block": [1, 3],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    }
    names = ["down_blocks.1.attentions.2.proj_in", "up_blocks.0.upsamplers.0.conv", "up_blocks.1.resnets.1.conv1"]
    # Inputs: conv, 1 resnet, downsampler, 3 resnets. Outputs: 4 groups, then 2.
    assert list(sgm_unet_names(config, names).values()) == [
        "input_blocks.5.1.proj_in",
        "output_blocks.3.2.conv",
        "output_blocks.5.0.in_layers.2",
    ]


@pytest.mark.parametrize(
    "name",
    [
        "down_blocks.7.resnets.0.conv1",
        "down_blocks.0.resnets.0.conv3",
        "down_blocks.3.downsamplers.0.conv",
        "up_blocks.3.upsamplers.0.conv",
        "encoder_hid_proj",
    ],
)
def test_a_module_without_a_counterpart_is_an_error(meta, name):
    with pytest.raises(ValueError, match=name):
        sgm_unet_names(dict(meta["sd15"].unet.config), [name])


def test_an_original_file_is_read_offline_with_the_shipped_folder(tiny, tmp_path):
    folder = config_folder("sd15", tmp_path / "config")
    pipeline = tiny("sd15")
    pipeline.unet.save_config(folder / "unet")
    pipeline.text_encoder.config.save_pretrained(folder / "text_encoder")
    weights = {name.rpartition(".")[::2]: tensor for name, tensor in pipeline.unet.state_dict().items()}
    names = sgm_unet_names(dict(pipeline.unet.config), {module for module, _ in weights})
    file = {f"model.diffusion_model.{names[module]}.{end}": tensor for (module, end), tensor in weights.items()}
    text = pipeline.text_encoder.state_dict()
    file |= {f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()}
    save_file(file, tmp_path / "original.safetensors")
    read = StableDiffusionPipeline.from_single_file(
        str(tmp_path / "original.safetensors"), config=str(folder), local_files_only=True, vae=pipeline.vae
    )
    assert len(read.tokenizer) == 49408 and read.scheduler.config.beta_end == 0.012
    for part in ("unet", "text_encoder"):
        back = getattr(read, part).state_dict()
        assert all(torch.equal(back[name], tensor) for name, tensor in getattr(pipeline, part).state_dict().items())
