"""Blocks that heads share: convolutions, level fusion, up-sampling and the spatial prior.

Three rules run through them. Normalisation is GroupNorm, so a sample's result does not depend on
its batch mates nor on how a batch is split among ranks. Strided convolutions have even kernels, so
that a cell stays at the centre of its pixels, where bilinear resizing (align_corners=False) and
flips expect it. ReLU is never in place, which on CPUs makes it slower in bfloat16.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PixelConv(nn.Conv2d):
    """A convolution on raw pixels: the network's first edge, kept away from Muon.

    >>> PixelConv(3, 16, 3, padding=1)(torch.zeros(1, 3, 256, 256)).shape
    torch.Size([1, 16, 256, 256])
    """


class Classifier(nn.Conv2d):
    """A 1×1 convolution to class logits: the network's last edge, kept away from Muon.

    >>> Classifier(64, 5)(torch.zeros(1, 64, 16, 16)).shape
    torch.Size([1, 5, 16, 16])
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes, kernel_size=1)


class TokenClassifier(nn.Linear):
    """One logit per token, (B, N, channels) → (B, N): a last edge too.

    >>> TokenClassifier(64)(torch.zeros(1, 5, 64)).shape
    torch.Size([1, 5])
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens).squeeze(-1)


EDGE_TYPES = (PixelConv, Classifier, TokenClassifier, nn.Embedding)


def group_norm(channels: int) -> nn.GroupNorm:
    """GroupNorm with about eight channels a group: even a 1×1 map has some to normalise over.

    >>> [group_norm(channels).num_groups for channels in (16, 64, 100, 512)]
    [2, 8, 4, 32]
    """
    return nn.GroupNorm(math.gcd(channels, min(32, max(1, channels // 8))), channels)


def decoder_width(channels: int) -> int:
    """Width of a decoder's H/16 map: half the backbone's, in steps of 32, from 64 to 256.

    >>> [decoder_width(channels) for channels in (64, 192, 384, 1024)]
    [64, 96, 192, 256]
    """
    return min(256, max(64, channels // 64 * 32))


class ConvBlock(nn.Sequential):
    """Convolution, GroupNorm, ReLU; (B, in, H, W) → (B, out, H, W).

    >>> ConvBlock(64, 32)(torch.zeros(1, 64, 16, 16)).shape
    torch.Size([1, 32, 16, 16])
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3) -> None:
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
            group_norm(out_channels),
            nn.ReLU(),
        )


class PixelBlock(nn.Sequential):
    """Raw pixels at 1/stride of their size: PixelConv, GroupNorm, ReLU.

    >>> PixelBlock(3, 16, stride=8)(torch.zeros(1, 3, 256, 256)).shape
    torch.Size([1, 16, 32, 32])
    """

    def __init__(self, image_channels: int, width: int, stride: int) -> None:
        kernel, padding = (2 * stride, stride // 2) if stride > 1 else (3, 1)
        super().__init__(
            PixelConv(image_channels, width, kernel, stride, padding, bias=False),
            group_norm(width),
            nn.ReLU(),
        )


class LevelFusion(nn.Module):
    """All levels to one H/16 map: a normed 1×1 projection of each, their sum, a 3×3 block.

    >>> fusion = LevelFusion(channels=64, levels=4, width=96)
    >>> fusion([torch.zeros(1, 64, 16, 16)] * 4).shape
    torch.Size([1, 96, 16, 16])
    """

    def __init__(self, channels: int, levels: int, width: int) -> None:
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), group_norm(width))
            for _ in range(levels)
        )
        self.mix = ConvBlock(width, width)

    def forward(self, features: list[Tensor]) -> Tensor:
        projected = sum(
            project(level) for project, level in zip(self.projections, features, strict=True)
        )
        return self.mix(torch.relu(projected))


class UpBlock(nn.Module):
    """One step up: the deeper map joined with the skips at their size, then refined.

    `depth` 3×3 blocks refine, beside an identity.

    The join is a 1×1 convolution over the concatenation of all maps. It is written as a sum of 1×1
    convolutions, the deeper one before its bilinear resizing, with which it commutes: the same
    function for less work and memory.

    >>> up = UpBlock(64, skips=(16,), width=32)
    >>> up(torch.zeros(1, 64, 16, 16), torch.zeros(1, 16, 32, 32)).shape
    torch.Size([1, 32, 32, 32])
    """

    def __init__(
        self, in_channels: int, skips: tuple[int, ...], width: int, depth: int = 2
    ) -> None:
        super().__init__()
        self.deeper = nn.Conv2d(in_channels, width, 1, bias=False)
        self.skips = nn.ModuleList(nn.Conv2d(skip, width, 1, bias=False) for skip in skips)
        self.norm = group_norm(width)
        self.refine = nn.Sequential(*(ConvBlock(width, width) for _ in range(depth)))

    def forward(self, deeper: Tensor, *skips: Tensor) -> Tensor:
        joined = F.interpolate(
            self.deeper(deeper), size=skips[0].shape[-2:], mode="bilinear", align_corners=False
        )
        for project, skip in zip(self.skips, skips, strict=True):
            joined = joined + project(skip)
        joined = torch.relu(self.norm(joined))
        return joined + self.refine(joined)


class SpatialPrior(nn.Module):
    """What the pixels alone show: maps at H/2, H/4 and H/8 of 1, 2 and 4 times `width` channels.

    After the spatial prior module of ViT-Adapter (Chen et al., arXiv 2205.08534) as DINOv3's own
    adapter and Dino U-Net use it: a stem of three convolutions, then strided ones. Here
    the first map is kept at H/2, and 2×2 convolutions stand in for max-pooling and strided 3×3
    ones: cells stay centred, for less work.

    >>> [tuple(scale.shape[1:]) for scale in SpatialPrior(3, width=16)(torch.zeros(1, 3, 256, 256))]
    [(16, 128, 128), (32, 64, 64), (64, 32, 32)]
    """

    def __init__(self, image_channels: int, width: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            PixelBlock(image_channels, width, stride=2),
            ConvBlock(width, width),
            ConvBlock(width, width),
        )
        self.quarter = halve(width, 2 * width)
        self.eighth = halve(2 * width, 4 * width)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = self.stem(image)
        quarter = self.quarter(half)
        return half, quarter, self.eighth(quarter)


def halve(in_channels: int, out_channels: int) -> nn.Sequential:
    """A map at half its size: 2×2 convolution with stride 2, GroupNorm, ReLU.

    >>> halve(16, 32)(torch.zeros(1, 16, 128, 128)).shape
    torch.Size([1, 32, 64, 64])
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 2, stride=2, bias=False),
        group_norm(out_channels),
        nn.ReLU(),
    )


def double(channels: int) -> nn.Sequential:
    """A map at twice its size: 2×2 transposed convolution with stride 2, GroupNorm, ReLU.

    >>> double(64)(torch.zeros(1, 64, 16, 16)).shape
    torch.Size([1, 64, 32, 32])
    """
    return nn.Sequential(
        nn.ConvTranspose2d(channels, channels, 2, stride=2, bias=False),
        group_norm(channels),
        nn.ReLU(),
    )
