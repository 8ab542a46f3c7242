"""The image encoder of Wuerstchen and Stable Cascade: EfficientNetV2-S, and a convolution down to 16 channels."""

from __future__ import annotations

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

# Of each stage: expansion, stride, channels, blocks. Table 4 of https://arxiv.org/abs/2104.00298, with the channels
# of the published weights; the first three stages are fused.
STAGES = ((1, 1, 24, 2), (4, 2, 48, 4), (4, 2, 64, 4), (4, 2, 128, 6), (6, 1, 160, 9), (6, 2, 256, 15))
FUSED = 3
STEM, HEAD, LATENTS = 24, 1280, 16  # channels
FACTOR = 32  # pixels for each latent
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in 0..1


def conv(
    channels: int, out: int, kernel: int, *, stride: int = 1, groups: int = 1, activation: bool = True
) -> nn.Sequential:
    """Convolution, batch norm and SiLU, as torchvision numbers them."""
    layers = [
        nn.Conv2d(channels, out, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out, eps=1e-3),
    ]
    return nn.Sequential(*layers, nn.SiLU()) if activation else nn.Sequential(*layers)


class SqueezeExcitation(nn.Module):
    """Each channel times a number of 0..1 that depends on all channels' means (https://arxiv.org/abs/1709.01507)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(channels, squeezed, 1), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = nn.functional.silu(self.fc1(x.mean((2, 3), keepdim=True)))
        return x * self.fc2(scale).sigmoid()


class Block(nn.Module):
    """An inverted bottleneck: wider, 3 x 3, narrower; with its input added where the shapes agree.

    Args:
        expansion: how many times wider inside.
        fused: the first convolution is the 3 x 3 one, and nothing is squeezed.
    """

    def __init__(self, channels: int, out: int, *, expansion: int, stride: int, fused: bool) -> None:
        super().__init__()
        wide = channels * expansion
        if fused and expansion == 1:
            layers = [conv(channels, out, 3, stride=stride)]
        elif fused:
            layers = [conv(channels, wide, 3, stride=stride), conv(wide, out, 1, activation=False)]
        else:
            layers = [
                conv(channels, wide, 1),
                conv(wide, wide, 3, stride=stride, groups=wide),
                SqueezeExcitation(wide, max(1, channels // 4)),
                conv(wide, out, 1, activation=False),
            ]
        self.block = nn.Sequential(*layers)
        self.adds = stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x) if self.adds else self.block(x)


class EfficientNetEncoder(ModelMixin, ConfigMixin):
    """EfficientNetV2-S without its classifier, then 1 x 1 down to the latents, normalised.

    Its weights are named as in the published files: `backbone` as torchvision's `efficientnet_v2_s().features`,
    `mapper`. torchvision itself cannot be imported beside a CPU build of torch.

    Args:
        c_latent: channels of the latents.
        affine: whether the last norm has a scale and a shift: Wuerstchen's has, Stable Cascade's has not.
        stages: of each stage (expansion, stride, channels, blocks).
        head: channels of the last layer of the backbone.
    """

    @register_to_config
    def __init__(
        self,
        c_latent: int = LATENTS,
        affine: bool = True,
        stages: tuple[tuple[int, int, int, int], ...] = STAGES,
        head: int = HEAD,
    ) -> None:
        super().__init__()
        layers = [conv(3, STEM, 3, stride=2)]
        channels = STEM
        for number, (expansion, stride, out, count) in enumerate(stages):
            blocks = []
            for index in range(count):
                first = index == 0
                blocks.append(
                    Block(
                        channels if first else out,
                        out,
                        expansion=expansion,
                        stride=stride if first else 1,
                        fused=number < FUSED,
                    )
                )
            layers.append(nn.Sequential(*blocks))
            channels = out
        layers.append(conv(channels, head, 1))
        self.backbone = nn.Sequential(*layers)
        self.mapper = nn.Sequential(nn.Conv2d(head, c_latent, 1, bias=False), nn.BatchNorm2d(c_latent, affine=affine))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B, 3, H, W] in -1..1 -> [B, c_latent, H/32, W/32]."""
        mean, std = (torch.tensor(values).to(pixels.device, non_blocking=True)[:, None, None] for values in (MEAN, STD))
        normal = ((pixels.float() + 1) / 2 - mean) / std
        return self.mapper(self.backbone(normal.to(self.mapper[0].weight.dtype)))
