"""Whatever the layers, names and numbers: what is written is what is read; by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from otl.config import SettingsError
from otl.formats import embedding
from otl.formats.deltas import delta
from otl.formats.lora import from_kohya, from_peft, kohya_key, to_kohya, to_peft
from otl.types import AdapterLayer, AdapterState, LohaLayer, LokrLayer, LoraLayer, OftLayer

PREFIXES = {"unet": "lora_unet", "text_encoder": "lora_te"}
QUICK = settings(max_examples=60, deadline=None)

sizes = st.integers(1, 6)
alphas = st.floats(0.0625, 64, width=32)
paths = st.lists(st.sampled_from(["down_blocks", "0", "attn", "to_q", "proj_in", "ff"]), min_size=1, max_size=5)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape)


@st.composite
def layers(draw: st.DrawFn) -> tuple[AdapterLayer, torch.Size]:
    """A layer of any kind, and the shape of the weight that it fits."""
    a, b, c, d, rank, alpha = *(draw(sizes) for _ in range(5)), draw(alphas)
    kernel = draw(st.sampled_from([(), (1, 1), (3, 3)]))
    ones = (1, 1)[: len(kernel)]
    match draw(st.sampled_from(["lora", "dora", "loha", "lokr", "oft"])):
        case "lora":
            return LoraLayer(random(rank, a, *kernel), random(b, rank, *ones), alpha), torch.Size([b, a, *kernel])
        case "dora":
            layer = LoraLayer(random(rank, a, *kernel), random(b, rank, *ones), alpha, random(b).abs() + 0.1)
            return layer, torch.Size([b, a, *kernel])
        case "loha":
            inputs = a * (9 if kernel == (3, 3) else 1)
            factors = random(b, rank), random(rank, inputs), random(b, rank), random(rank, inputs)
            return LohaLayer(*factors, alpha), torch.Size([b, a, *kernel])
        case "lokr":
            first = {"w1": random(a, c)} if draw(st.booleans()) else {"w1_a": random(a, rank), "w1_b": random(rank, c)}
            second = {"w2": random(b, d)} if draw(st.booleans()) else {"w2_a": random(b, rank), "w2_b": random(rank, d)}
            return LokrLayer(alpha, **first, **second), torch.Size([a * b, c * d])
        case _:
            return OftLayer(random(a, b, b) * 0.1), torch.Size([a * b, c])


@st.composite
def states(draw: st.DrawFn) -> tuple[AdapterState, dict[str, dict[str, torch.Size]]]:
    """Parts with layers under distinct names, and the weights' shapes."""
    state: AdapterState = {}
    shapes: dict[str, dict[str, torch.Size]] = {}
    for part in draw(st.lists(st.sampled_from(list(PREFIXES)), min_size=1, unique=True)):
        names = draw(
            st.lists(paths.map(".".join), min_size=1, max_size=4, unique_by=lambda name: name.replace(".", "_"))
        )
        made = {name: draw(layers()) for name in names}
        state[part] = {name: layer for name, (layer, _) in made.items()}
        shapes[part] = {name: shape for name, (_, shape) in made.items()}
    return state, shapes


def names_of(state: AdapterState) -> dict[str, dict[str, str]]:
    return {part: {name: name for name in of_part} for part, of_part in state.items()}


def through_a_file(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return load(save({key: tensor.contiguous() for key, tensor in tensors.items()}))


@QUICK
@given(states())
def test_a_kohya_file_holds_every_layer_bit_for_bit(made):
    state, _ = made
    read = from_kohya(
        through_a_file(to_kohya(state, prefixes=PREFIXES, names={})), prefixes=PREFIXES, names=names_of(state)
    )
    assert {part: set(of_part) for part, of_part in read.items()} == {part: set(of) for part, of in state.items()}
    for part, of_part in state.items():
        for name, layer in of_part.items():
            other = read[part][name]
            assert type(other) is type(layer)
            for field, value in vars(layer).items():
                same = torch.equal(value, getattr(other, field)) if torch.is_tensor(value) else True
                assert same, f"{part}.{name}.{field}"
            assert isinstance(layer, OftLayer) or other.alpha == layer.alpha


@QUICK
@given(states())
def test_a_peft_file_has_the_same_deltas_with_alpha_folded_in(made):
    state, shapes = made
    state = {part: {n: x for n, x in of.items() if type(x) is LoraLayer} for part, of in state.items()}
    read = from_peft(through_a_file(to_peft(state)), modules=state)
    for part, of_part in state.items():
        for name, layer in of_part.items():
            weight = torch.randn(shapes[part][name])
            torch.testing.assert_close(delta(read[part][name], weight), delta(layer, weight), rtol=1e-4, atol=1e-4)


@QUICK
@given(states(), st.data())
def test_a_file_that_lacks_a_tensor_is_refused(made, data):
    state, _ = made
    tensors = to_kohya(state, prefixes=PREFIXES, names={})
    needed = sorted(key for key in tensors if not key.endswith((".alpha", ".dora_scale", "oft_blocks", "oft_diag")))
    if not needed:
        return
    del tensors[data.draw(st.sampled_from(needed))]
    with pytest.raises(SettingsError):
        from_kohya(tensors, prefixes=PREFIXES, names=names_of(state))


@QUICK
@given(paths.map(".".join), st.text("abc_.0", min_size=1))
def test_a_file_of_another_model_is_refused(name, other):
    layer = LoraLayer(random(2, 3), random(4, 2), 1.0)
    tensors = to_kohya({"unet": {name: layer}}, prefixes=PREFIXES, names={})
    if kohya_key("lora_unet", other) == kohya_key("lora_unet", name):
        return
    with pytest.raises(SettingsError):
        from_kohya(tensors, prefixes=PREFIXES, names={"unet": {other: other}})


@QUICK
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_an_embedding_file_holds_the_vectors_bit_for_bit(count, small, large, output):
    keys = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
    vectors = {"text_encoder": random(count, small), "text_encoder_2": random(count, large)}
    tensors = through_a_file(embedding.to_file(vectors, keys=keys, output=output))
    widths = {"text_encoder": small, "text_encoder_2": large}
    read = embedding.from_file(tensors, keys=keys, widths=widths, output=output)
    assert all(torch.equal(read[part], each) for part, each in vectors.items())
