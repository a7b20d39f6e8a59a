"""A U-Net on a pyramid made from the backbone's maps, sharpened by a spatial prior on the pixels.

After Dino U-Net (Gao et al., arXiv 2508.20909): its fidelity-aware projection module brings wide
ViT maps down to a decoder's widths. What is ours, and why:
- the taps become an explicit H/4, H/8, H/16, H/32 pyramid by learned resizing, and the decoder ends
  at H/2, where the paper's skips reach H: a quarter of the work, with the pixels' own H/2, H/4 and
  H/8 maps for the borders;
- FiLM starts as the identity, m = (1 + gamma) · p + beta with a nearly zero G, so that early
  training sees the plain projection;
- a norm follows both projections, since ViT channels differ in scale by orders of magnitude;
- GroupNorm and ReLU instead of InstanceNorm and LeakyReLU; deep supervision at H/8 and H/16.
For 1024 channels a 512² tile takes about 17 GFLOP forward (2 per multiply-add); narrow backbones
get a narrow head.
"""

import torch
from torch import Tensor, nn

from models.base import HeadOutput, SegmentationHead
from models.blocks import Classifier, ConvBlock, SpatialPrior, UpBlock, double, group_norm

SCALES = 4  # H/4, H/8, H/16, H/32
RANK = 256  # channels of the projections' bottleneck, as in the paper
FILM_STD = 1e-3  # nearly the identity, yet the context gets a gradient from step one


class SqueezeExcite(nn.Module):
    """Channel gates from the tile's mean (Hu et al., arXiv 1709.01507), reduction 16.

    The shape stays as it is.

    >>> SqueezeExcite(64)(torch.zeros(1, 64, 16, 16)).shape
    torch.Size([1, 64, 16, 16])
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(8, channels // 16)
        self.gate = nn.Sequential(
            nn.Conv2d(channels, hidden, 1), nn.SiLU(), nn.Conv2d(hidden, channels, 1), nn.Sigmoid()
        )

    def forward(self, features: Tensor) -> Tensor:
        return features * self.gate(features.mean(dim=(2, 3), keepdim=True))


class FidelityProjection(nn.Module):
    """One level (B, channels, h, w) and its shared context (B, rank, h, w) → (B, width, h, w).

    The level's own content p is modulated at every position by the context, m = (1 + gamma) · p +
    beta, then refined by a depthwise-separable block with squeeze-excitation, beside a 1×1 residual
    of m.

    >>> project = FidelityProjection(channels=64, rank=64, width=32)
    >>> project(torch.zeros(1, 64, 16, 16), context=torch.zeros(1, 64, 16, 16)).shape
    torch.Size([1, 32, 16, 16])
    """

    def __init__(self, channels: int, rank: int, width: int) -> None:
        super().__init__()
        self.specific = nn.Sequential(nn.Conv2d(channels, rank, 1, bias=False), group_norm(rank))
        self.context_norm = group_norm(rank)
        self.film = nn.Conv2d(rank, 2 * rank, 1)
        nn.init.normal_(self.film.weight, std=FILM_STD)
        nn.init.zeros_(self.film.bias)
        self.refine = nn.Sequential(
            ConvBlock(rank, width, kernel=1),
            nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
            ConvBlock(width, width, kernel=1),
            nn.Conv2d(width, width, 1),
            SqueezeExcite(width),
        )
        self.residual = nn.Identity() if rank == width else nn.Conv2d(rank, width, 1, bias=False)

    def forward(self, level: Tensor, context: Tensor) -> Tensor:
        gamma, beta = self.film(self.context_norm(context)).chunk(2, dim=1)
        modulated = torch.addcmul(beta, 1 + gamma, self.specific(level))
        return self.refine(modulated) + self.residual(modulated)


class UNetV2Head(SegmentationHead):
    """Logits at H/2, enlarged by the base class.

    In training two auxiliary outputs, from the decoder's maps at H/8 and H/16, in this order. Any
    number of levels: see `routes`.

    >>> head = UNetV2Head(channels=64, levels=4, num_classes=5)
    >>> features = [torch.zeros(1, 64, 16, 16)] * 4  # what a ViT gives for a 256-pixel tile
    >>> logits, aux = head(torch.zeros(1, 3, 256, 256), features)
    >>> logits.shape, len(aux)
    (torch.Size([1, 5, 256, 256]), 2)
    >>> [tuple(scale.shape[-2:]) for scale in head.pyramid(features)]
    [(64, 64), (32, 32), (16, 16), (8, 8)]
    """

    def __init__(
        self, channels: int, levels: int, num_classes: int, image_channels: int = 3
    ) -> None:
        super().__init__(channels, levels, num_classes, image_channels)
        base = base_width(channels)
        half, *widths = (base * factor for factor in (1, 2, 3, 6, 8))
        quarter, eighth, sixteenth, deepest = widths
        rank = min(RANK, max(32, channels // 8 * 8))
        self.context = nn.Conv2d(channels, rank, 1, bias=False)
        self.branches = nn.ModuleList(
            FidelityProjection(channels, rank, widths[scale]) for _, scale in routes(levels)
        )
        self.resizers = nn.ModuleList(
            [
                nn.Sequential(double(quarter), double(quarter)),
                double(eighth),
                nn.Identity(),
                # the pooling rounds odd grids up, so that a 1×1 map stays one
                nn.Sequential(nn.AvgPool2d(2, ceil_mode=True), ConvBlock(deepest, deepest)),
            ]
        )
        self.prior = SpatialPrior(image_channels, base)
        self.to_sixteenth = UpBlock(deepest, (sixteenth,), sixteenth)
        self.to_eighth = UpBlock(sixteenth, (eighth, 4 * base), eighth)
        self.to_quarter = UpBlock(eighth, (quarter, 2 * base), quarter)
        self.to_half = UpBlock(quarter, (base,), half, depth=1)
        self.classifier = Classifier(half, num_classes)
        self.aux_classifiers = nn.ModuleList(
            [Classifier(eighth, num_classes), Classifier(sixteenth, num_classes)]
        )

    def decode(self, image: Tensor, features: list[Tensor]) -> HeadOutput:
        pixels_half, pixels_quarter, pixels_eighth = self.prior(image)
        quarter, eighth, sixteenth, deepest = self.pyramid(features)
        sixteenth = self.to_sixteenth(deepest, sixteenth)
        eighth = self.to_eighth(sixteenth, eighth, pixels_eighth)
        quarter = self.to_quarter(eighth, quarter, pixels_quarter)
        logits = self.classifier(self.to_half(quarter, pixels_half))
        if not self.training:
            return HeadOutput(logits, aux=())
        deep = zip(self.aux_classifiers, (eighth, sixteenth), strict=True)
        return HeadOutput(logits, tuple(classify(scale) for classify, scale in deep))

    def pyramid(self, features: list[Tensor]) -> list[Tensor]:
        """The levels as maps at H/4, H/8, H/16 and H/32 (odd grids rounded up)."""
        contexts = [self.context(level) for level in features]
        scales = [0] * SCALES
        for project, (level, scale) in zip(self.branches, routes(self.levels), strict=True):
            scales[scale] = scales[scale] + project(features[level], contexts[level])
        return [resize(scale) for resize, scale in zip(self.resizers, scales, strict=True)]


def routes(levels: int) -> list[tuple[int, int]]:
    """Which level feeds which scale of the pyramid, as (level, scale), shallow to fine.

    Four levels map one to one; of fewer, some feed several scales; of more, several feed one and
    are summed.

    >>> routes(4)
    [(0, 0), (1, 1), (2, 2), (3, 3)]
    >>> routes(2), routes(5)[:2]
    ([(0, 0), (0, 1), (1, 2), (1, 3)], [(0, 0), (1, 0)])
    """
    branches = max(levels, SCALES)
    return [
        (branch * levels // branches, branch * SCALES // branches) for branch in range(branches)
    ]


def base_width(channels: int) -> int:
    """Channels at H/2: 32 for the released backbones, less for tiny ones.

    >>> [base_width(channels) for channels in (64, 192, 384, 1024)]
    [16, 24, 32, 32]
    """
    return min(32, max(16, channels // 64 * 8))
