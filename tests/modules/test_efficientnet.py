"""The image encoder against the published table of EfficientNetV2-S and torchvision's names for its weights."""

from __future__ import annotations

import pytest
import torch

from otl.modules.efficientnet import EfficientNetEncoder

# Table 4 of https://arxiv.org/abs/2104.00298 with torchvision's channels: kind, expansion, stride, in, out, layers.
TABLE = [
    ("fused", 1, 1, 24, 24, 2),
    ("fused", 4, 2, 24, 48, 4),
    ("fused", 4, 2, 48, 64, 4),
    ("mb", 4, 2, 64, 128, 6),
    ("mb", 6, 1, 128, 160, 9),
    ("mb", 6, 2, 160, 256, 15),
]
Shapes = dict[str, tuple[int, ...]]


def norm(name: str, channels: int) -> Shapes:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{vector}": (channels,) for vector in vectors} | {f"{name}.num_batches_tracked": ()}


def conv(name: str, channels: int, out: int, kernel: int) -> Shapes:
    return {f"{name}.0.weight": (out, channels, kernel, kernel)} | norm(f"{name}.1", out)


def squeezed(name: str, wide: int, narrow: int) -> Shapes:
    return {
        f"{name}.fc1.weight": (narrow, wide, 1, 1),
        f"{name}.fc1.bias": (narrow,),
        f"{name}.fc2.weight": (wide, narrow, 1, 1),
        f"{name}.fc2.bias": (wide,),
    }


def torchvision_s_features() -> Shapes:
    """Names and shapes of `efficientnet_v2_s().features`."""
    shapes = conv("0", 3, 24, 3)
    for stage, (kind, expansion, _, first, out, layers) in enumerate(TABLE, start=1):
        for layer in range(layers):
            channels = first if layer == 0 else out
            wide, name = channels * expansion, f"{stage}.{layer}.block"
            if kind == "fused" and expansion == 1:
                shapes |= conv(f"{name}.0", channels, out, 3)
            elif kind == "fused":
                shapes |= conv(f"{name}.0", channels, wide, 3) | conv(f"{name}.1", wide, out, 1)
            else:
                shapes |= conv(f"{name}.0", channels, wide, 1) | conv(f"{name}.1", 1, wide, 3)
                shapes |= squeezed(f"{name}.2", wide, channels // 4) | conv(f"{name}.3", wide, out, 1)
    return shapes | conv("7", 256, 1280, 1)


@pytest.fixture(scope="module")
def encoder() -> EfficientNetEncoder:
    with torch.device("meta"):
        return EfficientNetEncoder()


def test_the_weights_are_named_and_shaped_as_torchvision_s(encoder):
    own = {name: tuple(tensor.shape) for name, tensor in encoder.backbone.state_dict().items()}
    assert own == torchvision_s_features()


def test_it_has_the_published_number_of_parameters(encoder):
    published = 21_458_488 - (1280 * 1000 + 1000)  # without the classifier
    assert sum(p.numel() for p in encoder.backbone.parameters()) == published == 20_177_488


def test_the_mapper_is_named_as_in_the_published_files(encoder):
    published = {"0.weight": (16, 1280, 1, 1)} | norm("1", 16)
    assert {name: tuple(t.shape) for name, t in encoder.mapper.state_dict().items()} == published
    with torch.device("meta"):
        plain = EfficientNetEncoder(affine=False)
    assert set(published) - set(plain.mapper.state_dict()) == {"1.weight", "1.bias"}


def test_a_latent_stands_for_32_pixels_of_the_picture(encoder):
    assert encoder.eval()(torch.zeros(1, 3, 64, 96, device="meta")).shape == (1, 16, 2, 3)


def test_pixels_are_normalised_as_imagenet_s():
    encoder = EfficientNetEncoder(stages=((1, 1, 8, 1),)).eval()
    seen = []
    encoder.backbone.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    levels = torch.tensor([0.485, 0.456, 0.406]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)  # ImageNet's mean
    deviations = torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
    encoder((levels + deviations) * 2 - 1)
    torch.testing.assert_close(seen[0], torch.ones(1, 3, 8, 8), rtol=0, atol=1e-5)


def test_a_block_adds_its_input_where_the_shapes_agree():
    encoder = EfficientNetEncoder().eval()
    for name, inside in [("backbone.6.1", 2), ("backbone.2.1", 1)]:
        block = encoder.get_submodule(name)
        torch.nn.init.zeros_(block.block[-1][0].weight)  # the branch is nothing but its last norm's shift, 0
        pixels = torch.randn(1, {2: 256, 1: 48}[inside], 4, 4)
        torch.testing.assert_close(block(pixels), pixels)
    assert not encoder.get_submodule("backbone.6.0").adds
