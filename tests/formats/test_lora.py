"""LoRA files: every key is a module's, and readers apply exactly what the live adapter does."""

import re

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer as PeftLayer
from torch import nn

from otl.formats import lora
from otl.formats.deltas import compare, delta
from otl.formats.original import sgm_unet_names
from otl.types import LoraLayer

PREFIXES = {
    "sd15": {"unet": "lora_unet", "text_encoder": "lora_te"},
    "sdxl": {"unet": "lora_unet", "text_encoder": "lora_te1", "text_encoder_2": "lora_te2"},
}
IN_TEXT_LAYER = ["mlp_fc1", "mlp_fc2", *(f"self_attn_{x}_proj" for x in ("q", "k", "v", "out"))]


def layers(network: nn.Module) -> list[str]:
    return [name for name, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]


def parts(pipeline) -> dict[str, nn.Module]:
    return {
        part: getattr(pipeline, part) for part in ("unet", "text_encoder", "text_encoder_2") if hasattr(pipeline, part)
    }


def names_of(pipeline, family: str) -> dict[str, dict[str, str]]:
    """Before adapters are injected."""
    names = {part: lora.text_names(layers(network)) for part, network in parts(pipeline).items()}
    unet = layers(pipeline.unet)
    names["unet"] = sgm_unet_names(dict(pipeline.unet.config), unet) if family == "sdxl" else {n: n for n in unet}
    return names


def adapt(
    pipeline, *, rank: int, alpha: float, rank_pattern=None, alpha_pattern=None
) -> dict[str, dict[str, LoraLayer]]:
    """Put random adapters on every layer, and give their state."""
    state = {}
    for part, network in parts(pipeline).items():
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=layers(network),
            rank_pattern=rank_pattern or {},
            alpha_pattern=alpha_pattern or {},
        )
        inject_adapter_in_model(config, network)
        state[part] = {}
        for name, module in network.named_modules():
            if isinstance(module, PeftLayer):
                down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
                nn.init.normal_(up, std=0.05)
                state[part][name] = LoraLayer(down.detach(), up.detach(), module.lora_alpha["default"])
    return state


@torch.no_grad()
def outputs(pipeline) -> dict[str, torch.Tensor]:
    """What each part answers to one fixed input."""
    draw = torch.Generator().manual_seed(1)
    ids = pipeline.tokenizer("a photo of a cat", padding="max_length", return_tensors="pt").input_ids
    texts = {part: network(ids) for part, network in parts(pipeline).items() if part != "unet"}
    answers = {part: text.last_hidden_state for part, text in texts.items()}
    if "text_encoder_2" in texts:
        answers["pooled"] = texts["text_encoder_2"].text_embeds
    added = {"text_embeds": torch.randn(2, 32, generator=draw), "time_ids": torch.rand(2, 6, generator=draw) * 64}
    hidden = torch.randn(2, 5, pipeline.unet.config.cross_attention_dim, generator=draw)
    latents = torch.randn(2, 4, 8, 8, generator=draw)
    answers["unet"] = pipeline.unet(latents, 500, hidden, added_cond_kwargs=added).sample
    return answers


def random_layer(*shape: int, rank: int, alpha: float) -> LoraLayer:
    """Of a weight of this shape."""
    out, *rest = shape
    up = torch.randn(out, rank, *(1 for _ in rest[1:]))
    return LoraLayer(torch.randn(rank, *rest), up, alpha)


@pytest.fixture
def state():
    """Mixed ranks and alphas, linear and convolution."""
    torch.manual_seed(0)
    return {
        "unet": {
            "down_blocks.0.resnets.0.conv1": random_layer(6, 5, 3, 3, rank=3, alpha=1.5),
            "mid_block.attentions.0.proj_in": random_layer(7, 4, rank=2, alpha=2),
        },
        "text_encoder": {"encoder.layers.0.mlp.fc1": random_layer(8, 4, rank=4, alpha=0.3)},
        "text_encoder_2": {"text_projection": random_layer(4, 4, rank=1, alpha=16)},
    }


def weight_of(layer: LoraLayer) -> torch.Tensor:
    """A weight that the layer fits."""
    return torch.zeros(layer.up.shape[0], *layer.down.shape[1:])


def names_in(state) -> dict[str, dict[str, str]]:
    return {part: lora.text_names(paths) for part, paths in state.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for part in a:
        assert a[part].keys() == b[part].keys()
        for path, layer in a[part].items():
            assert torch.equal(layer.down, b[part][path].down) and torch.equal(layer.up, b[part][path].up)
            assert layer.alpha == pytest.approx(b[part][path].alpha, rel=1e-6)


def test_kohya_and_back_is_the_same(state):
    tensors = lora.to_kohya(state, prefixes=PREFIXES["sdxl"], names=names_in(state))
    assert_same(lora.from_kohya(tensors, prefixes=PREFIXES["sdxl"], names=names_in(state)), state)


def test_peft_and_back_has_the_same_deltas(state):
    back = lora.from_peft(lora.to_peft(state), modules=state)
    assert compare(state, back) < 1e-6
    assert all(layer.alpha == layer.down.shape[0] for part in back.values() for layer in part.values())


def test_keys_of_both_styles(state):
    kohya = lora.to_kohya(state, prefixes=PREFIXES["sdxl"], names=names_in(state))
    peft = lora.to_peft(state)
    assert {key for key in kohya if key.endswith("alpha")} == {
        "lora_unet_down_blocks_0_resnets_0_conv1.alpha",
        "lora_unet_mid_block_attentions_0_proj_in.alpha",
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha",
        "lora_te2_text_projection.alpha",
    }
    assert len(kohya) == 12 and len(peft) == 8
    assert "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_A.weight" in peft
    assert "text_encoder_2.text_projection.lora_B.weight" in peft


def test_alpha_is_a_float_without_dimensions(state):
    tensors = lora.cast(lora.to_kohya(state, prefixes=PREFIXES["sdxl"], names=names_in(state)), torch.float16)
    alpha = tensors["lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha"]
    assert alpha.shape == () and alpha.dtype == torch.float32 and alpha.item() == pytest.approx(0.3)
    assert tensors["lora_te2_text_projection.lora_up.weight"].dtype == torch.float16


def test_without_alpha_it_is_the_rank(state):
    tensors = lora.to_kohya(state, prefixes=PREFIXES["sdxl"], names=names_in(state))
    tensors = {key: tensor for key, tensor in tensors.items() if not key.endswith(".alpha")}
    back = lora.from_kohya(tensors, prefixes=PREFIXES["sdxl"], names=names_in(state))
    assert back["unet"]["down_blocks.0.resnets.0.conv1"].alpha == 3


@pytest.mark.parametrize(
    "key",
    ["lora_unet_conv_nowhere.lora_up.weight", "lora_unet_mid_block_attentions_0_proj_in.lora_mid.weight", "v_pred"],
)
def test_an_unknown_key_is_an_error(state, key):
    tensors = lora.to_kohya(state, prefixes=PREFIXES["sdxl"], names=names_in(state)) | {key: torch.zeros(1)}
    with pytest.raises(ValueError, match=re.escape(key)):
        lora.from_kohya(tensors, prefixes=PREFIXES["sdxl"], names=names_in(state))


def test_an_unknown_peft_key_is_an_error(state):
    with pytest.raises(ValueError, match=r"vae\.conv_in"):
        lora.from_peft(lora.to_peft(state) | {"vae.conv_in.lora_A.weight": torch.zeros(1, 1)}, modules=state)


def test_half_a_layer_is_an_error(state):
    tensors = lora.to_peft(state)
    del tensors["text_encoder_2.text_projection.lora_B.weight"]
    with pytest.raises(ValueError, match=r"text_encoder_2.text_projection has no up"):
        lora.from_peft(tensors, modules=state)


def test_two_ranks_in_one_layer_are_an_error(state):
    tensors = lora.to_peft(state)
    tensors["text_encoder_2.text_projection.lora_B.weight"] = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"do not fit each other: down \[1, \d+\], up \[4, 2\]"):
        lora.from_peft(tensors, modules=state)


def test_two_modules_with_one_key_are_an_error():
    layer = random_layer(4, 4, rank=1, alpha=1)
    with pytest.raises(ValueError, match="lora_unet_a_b_c"):
        lora.to_kohya({"unet": {"a.b_c": layer, "a_b.c": layer}}, prefixes={"unet": "lora_unet"}, names={})


def test_text_names_are_those_of_sd_scripts(meta):
    """12 and 32 layers of 6 each, and the projection of the second."""
    for network, depth, more in [
        (meta["sd15"].text_encoder, 12, set()),
        (meta["sdxl"].text_encoder, 12, set()),
        (meta["sdxl"].text_encoder_2, 32, {"text_projection"}),
    ]:
        expected = {f"text_model_encoder_layers_{i}_{name}" for i in range(depth) for name in IN_TEXT_LAYER} | more
        assert {name.replace(".", "_") for name in lora.text_names(layers(network)).values()} == expected


def test_a_layer_outside_clip_keeps_its_path():
    assert (
        lora.portable_text_path("encoder.block.0.layer.0.SelfAttention.q") == "encoder.block.0.layer.0.SelfAttention.q"
    )
    assert lora.portable_text_path("text_model.encoder.layers.0.mlp.fc1") == "text_model.encoder.layers.0.mlp.fc1"


def test_delta_of_a_convolution_is_what_both_convolutions_do():
    torch.manual_seed(0)
    layer, image = random_layer(6, 5, 3, 3, rank=2, alpha=1), torch.randn(1, 5, 8, 8)
    both = nn.functional.conv2d(nn.functional.conv2d(image, layer.down, padding=1), layer.up) / 2
    torch.testing.assert_close(
        nn.functional.conv2d(image, delta(layer, torch.empty(6, 5, 3, 3)), padding=1), both, atol=1e-5, rtol=1e-4
    )


def test_delta_of_a_linear_layer():
    layer = LoraLayer(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]]), alpha=0.5)
    assert torch.equal(delta(layer, torch.empty(2, 2)), torch.tensor([[1.5, 3.0], [2.0, 4.0]]))


def test_compare_is_the_relative_difference_of_the_deltas(state):
    torch.manual_seed(1)
    other = {
        part: {path: LoraLayer(x.down + 0.1, x.up - 0.1, x.alpha) for path, x in layers.items()}
        for part, layers in state.items()
    }
    deltas = [
        (delta(state[part][path], weight_of(state[part][path])), delta(other[part][path], weight_of(other[part][path])))
        for part, layers in state.items()
        for path in layers
    ]
    expected = max(((b - a).norm() / a.norm()).item() for a, b in deltas)
    assert compare(state, other) == pytest.approx(expected, rel=1e-5)


def test_compare_sees_a_changed_alpha_and_a_nan(state):
    assert compare(state, state) < 1e-7
    layer = state["text_encoder_2"]["text_projection"]
    doubled = state | {"text_encoder_2": {"text_projection": LoraLayer(layer.down, layer.up, layer.alpha * 2)}}
    assert compare(state, doubled) == pytest.approx(1)
    broken = state | {
        "text_encoder_2": {"text_projection": LoraLayer(layer.down * float("nan"), layer.up, layer.alpha)}
    }
    assert compare(state, broken) == float("inf")


def test_compare_of_untrained_layers():
    zero, one = LoraLayer(torch.ones(1, 2), torch.zeros(2, 1), 1.0), LoraLayer(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    assert compare({"unet": {"a": zero}}, {"unet": {"a": zero}}) == 0
    assert compare({"unet": {"a": zero}}, {"unet": {"a": one}}) == float("inf")


def test_compare_of_different_modules_is_an_error(state):
    with pytest.raises(ValueError, match=r"text_encoder_2.text_projection"):
        compare(state, {part: layers for part, layers in state.items() if part != "text_encoder_2"})


@pytest.mark.parametrize("family", PREFIXES)
def test_diffusers_applies_a_kohya_file_as_the_live_adapter_does(family, tiny, tmp_path):
    live, loaded = tiny(family), tiny(family)
    names, before = names_of(live, family), outputs(live)
    state = adapt(live, rank=4, alpha=3)
    tensors = lora.to_kohya(state, prefixes=PREFIXES[family], names=names)
    lora.write(tmp_path / "lora.safetensors", tensors, {"ss_network_dim": "4"})
    assert_same(
        lora.from_kohya(lora.read(tmp_path / "lora.safetensors")[0], prefixes=PREFIXES[family], names=names), state
    )
    loaded.load_lora_weights(tmp_path / "lora.safetensors")
    assert_applied(before, outputs(live), outputs(loaded))


@pytest.mark.parametrize("family", PREFIXES)
def test_diffusers_applies_a_peft_file_of_mixed_ranks_as_the_live_adapter_does(family, tiny, tmp_path):
    live, loaded = tiny(family), tiny(family)
    before = outputs(live)
    patterns = {"rank_pattern": {r".*(to_k|fc1|conv2)": 2}, "alpha_pattern": {r".*(to_q|fc2|proj_in)": 8}}
    state = adapt(live, rank=4, alpha=3, **patterns)
    assert len({(layer.down.shape[0], layer.alpha) for layer in state["unet"].values()}) == 3
    lora.write(tmp_path / "lora.safetensors", lora.to_peft(state), {})
    loaded.load_lora_weights(tmp_path / "lora.safetensors")
    assert_applied(before, outputs(live), outputs(loaded))


def assert_applied(before, live, loaded):
    assert before.keys() == live.keys() == loaded.keys()
    for part in before:
        assert (live[part] - before[part]).abs().mean() > 1e-3, f"the adapter does nothing to {part}"
        torch.testing.assert_close(loaded[part], live[part], atol=1e-5, rtol=1e-4, msg=part)


def test_fp16_loses_less_than_a_thousandth(tiny):
    pipeline = tiny("sd15")
    names = names_of(pipeline, "sd15")
    state = adapt(pipeline, rank=4, alpha=3)
    tensors = lora.cast(lora.to_kohya(state, prefixes=PREFIXES["sd15"], names=names), torch.float16)
    difference = compare(state, lora.from_kohya(tensors, prefixes=PREFIXES["sd15"], names=names))
    assert 1e-5 < difference < 1e-3
