"""Files in other programs' names go on with exactly what they state: families whose original code has other names."""

import pytest
import torch
from safetensors.torch import save_file

from otl.config import SettingsError
from otl.methods.injected import ADAPTER, adapted
from otl.methods.lora import Lora
from otl.modules.pixart_alpha import PixArtAlpha
from otl.modules.stable_cascade import StableCascade
from otl.modules.stable_diffusion_2 import StableDiffusion2
from otl.modules.wuerstchen import Wuerstchen
from tests import tiny, tiny_priors

BOTH = {"denoiser": {}, "text_encoder": {}}
KOHYA = (".lora_down.weight", ".lora_up.weight")
PEFT = (".lora_A.weight", ".lora_B.weight")
PIXART = {  # the original code's -> diffusers'
    "blocks.1.attn.qkv": [f"transformer_blocks.1.attn1.to_{letter}" for letter in "qkv"],
    "blocks.1.attn.proj": ["transformer_blocks.1.attn1.to_out.0"],
    "blocks.1.cross_attn.q_linear": ["transformer_blocks.1.attn2.to_q"],
    "blocks.1.cross_attn.kv_linear": [f"transformer_blocks.1.attn2.to_{letter}" for letter in "kv"],
    "blocks.1.cross_attn.proj": ["transformer_blocks.1.attn2.to_out.0"],
    "blocks.0.mlp.fc1": ["transformer_blocks.0.ff.net.0.proj"],
    "blocks.0.mlp.fc2": ["transformer_blocks.0.ff.net.2"],
    "x_embedder.proj": ["pos_embed.proj"],
    "t_embedder.mlp.2": ["adaln_single.emb.timestep_embedder.linear_2"],
    "csize_embedder.mlp.0": ["adaln_single.emb.resolution_embedder.linear_1"],
    "ar_embedder.mlp.2": ["adaln_single.emb.aspect_ratio_embedder.linear_2"],
    "t_block.1": ["adaln_single.linear"],
    "y_embedder.y_proj.fc1": ["caption_projection.linear_1"],
    "final_layer.linear": ["proj_out"],
}
CASCADE = {
    **{
        f"down_blocks.1.2.attention.attn.in_proj_{n}": [f"down_blocks.1.2.attention.to_{x}"]
        for n, x in enumerate("qkv")
    },
    "down_blocks.1.2.attention.attn.out_proj": ["down_blocks.1.2.attention.to_out.0"],
    "up_blocks.0.0.channelwise.4": ["up_blocks.0.0.channelwise.4"],
}
WUERSTCHEN = {
    **{f"blocks.2.attention.attn.in_proj_{n}": [f"blocks.2.attention.to_{x}"] for n, x in enumerate("qkv")},
    "blocks.2.attention.attn.out_proj": ["blocks.2.attention.to_out.0"],
    "blocks.0.channelwise.0": ["blocks.0.channelwise.0"],
}
DIFFUSERS_PRIOR = {path: [path] for paths in WUERSTCHEN.values() for path in paths}
SGM = {
    "input_blocks.1.1.transformer_blocks.0.attn1.to_q": ["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"],
    "middle_block.1.transformer_blocks.0.attn2.to_k": ["mid_block.attentions.0.transformer_blocks.0.attn2.to_k"],
    "middle_block.0.in_layers.2": ["mid_block.resnets.0.conv1"],
    "input_blocks.1.1.proj_in": ["down_blocks.0.attentions.0.proj_in"],
}
DIFFUSERS_UNET = {path: [path] for paths in SGM.values() for path in paths}
T5 = "encoder.block.1.layer.0.SelfAttention.k"
CLIP = "encoder.layers.1.self_attn.k_proj"
PROJECTED = f"text_model.{CLIP}"  # in a text encoder with projection


def kohya(names, prefix):
    return {f"{prefix}_{name.replace('.', '_')}": paths for name, paths in names.items()}, KOHYA


def dotted(names, prefix):
    return {f"{prefix}{name}": paths for name, paths in names.items()}, PEFT


FILES = [  # family, its folder, names of the denoiser's layers and how their keys end, those of a text encoder's layer
    ("pixart", kohya(PIXART, "lora_unet"), "lora_te1_encoder_block_1_layer_0_SelfAttention_k", T5),
    ("pixart", kohya(PIXART, "lora_transformer"), "lora_te_encoder_block_1_layer_0_SelfAttention_k", T5),
    ("pixart", dotted(PIXART, "diffusion_model."), f"text_encoders.t5xxl.transformer.{T5}", T5),
    ("pixart", dotted(PIXART, "base_model.model."), f"text_encoder.{T5}", T5),
    ("cascade", kohya(CASCADE, "lora_unet"), "lora_te_text_model_encoder_layers_1_self_attn_k_proj", PROJECTED),
    (
        "cascade",
        kohya(CASCADE, "lora_prior_unet"),
        "lora_prior_te_text_model_encoder_layers_1_self_attn_k_proj",
        PROJECTED,
    ),
    ("cascade", dotted(CASCADE, "diffusion_model."), f"text_encoders.clip_g.transformer.{PROJECTED}", PROJECTED),
    ("wuerstchen", kohya(WUERSTCHEN, "lora_unet"), "lora_te_text_model_encoder_layers_1_self_attn_k_proj", CLIP),
    ("wuerstchen", kohya(DIFFUSERS_PRIOR, "lora_prior_unet"), f"text_encoder.text_model.{CLIP}", CLIP),
    ("wuerstchen", dotted(DIFFUSERS_PRIOR, "prior."), f"text_encoder.{CLIP}", CLIP),
    ("sd2", kohya(DIFFUSERS_UNET, "lora_unet"), "lora_te_text_model_encoder_layers_1_self_attn_k_proj", CLIP),
    ("sd2", kohya(SGM, "lora_unet"), "lora_te1_text_model_encoder_layers_1_self_attn_k_proj", CLIP),
    ("sd2", dotted(SGM, "diffusion_model."), f"text_encoders.clip_h.transformer.text_model.{CLIP}", CLIP),
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, sd2_folder):
    """family -> how it is made of its small checkpoint."""
    pixart = tiny.pixart_alpha(tmp_path_factory.mktemp("pixart"))
    cascade = tiny_priors.stable_cascade(tmp_path_factory.mktemp("cascade"))
    wuerstchen = tiny_priors.wuerstchen(tmp_path_factory.mktemp("wuerstchen"))
    return {
        "pixart": lambda: PixArtAlpha(str(pixart)),
        "cascade": lambda: StableCascade(str(cascade), **tiny_priors.options(cascade)),
        "wuerstchen": lambda: Wuerstchen(str(wuerstchen), **tiny_priors.options(wuerstchen)),
        "sd2": lambda: StableDiffusion2(str(sd2_folder)),
    }


def configured(module, method):
    module.method = method
    module.configure_model()
    return module


def made(module, part, layers, ends):
    """Tensors of a file with a layer of some rank for each name, and path -> what it adds to the layer's weight.

    Args:
        layers: name in the file -> paths of the layers whose outputs it has, in their order.
    """
    generator = torch.Generator().manual_seed(4)
    tensors, deltas = {}, {}
    for number, (name, paths) in enumerate(layers.items()):
        weights = [module.part(part).get_submodule(path).weight for path in paths]
        rank, kernel = 2 + number % 3, weights[0].shape[2:]
        down = torch.randn(rank, *weights[0].shape[1:], generator=generator)
        up = torch.randn(sum(map(len, weights)), rank, *[1] * len(kernel), generator=generator)
        tensors |= {name + ends[0]: down, name + ends[1]: up, f"{name}.alpha": torch.tensor(1.5)}
        start = 0
        for path, weight in zip(paths, weights):
            rows = up[start : start + len(weight)].flatten(1).double()
            deltas[path] = (1.5 / rank * rows @ down.flatten(1).double()).view_as(weight)
            start += len(weight)
    return tensors, deltas


@pytest.mark.parametrize(("family", "denoiser", "text_name", "text_path"), FILES)
def test_every_layer_goes_on_with_exactly_what_the_file_adds_to_it(
    folders, tmp_path, family, denoiser, text_name, text_path
):
    plain = configured(folders[family](), Lora(rank=1, targets=[text_path], parts={"text_encoder": {}}))
    names, ends = denoiser
    (file_of_denoiser, wanted), (file_of_text, wanted_of_text) = (
        made(plain, plain.denoiser, names, ends),
        made(plain, "text_encoder", {text_name: [text_path]}, ends),
    )
    save_file(file_of_denoiser | file_of_text, tmp_path / "other.safetensors")
    method = Lora(from_file=str(tmp_path / "other.safetensors"), targets="file", parts=BOTH)
    module = configured(folders[family](), method)
    for part, deltas in ((module.denoiser, wanted), ("text_encoder", wanted_of_text)):
        live = adapted(module.part(part))
        assert live.keys() == deltas.keys()
        for path, layer in live.items():
            before = plain.part(part).get_submodule(path).weight.double()
            after = layer.get_base_layer().weight.double() + layer.get_delta_weight(ADAPTER).double()
            torch.testing.assert_close(after, before + deltas[path], rtol=1e-5, atol=1e-5, msg=path)


def test_a_layer_named_alone_and_with_others_is_refused(folders, tmp_path):
    plain = configured(folders["pixart"](), Lora(rank=1))
    fused, _ = made(plain, "transformer", {"lora_unet_blocks_0_attn_qkv": PIXART["blocks.1.attn.qkv"]}, KOHYA)
    alone, _ = made(
        plain, "transformer", {"transformer.transformer_blocks.0.attn1.to_k": ["transformer_blocks.0.attn1.to_k"]}, PEFT
    )
    save_file(fused | alone, tmp_path / "both.safetensors")
    with pytest.raises(SettingsError, match=r"from_file=.*both.*attn1\.to_k: adapted twice"):
        configured(folders["pixart"](), Lora(from_file=str(tmp_path / "both.safetensors"), targets="file"))
