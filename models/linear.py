"""The linear probe: what the frozen features know without any decoder.

BatchNorm on each level, then one 1×1 convolution, as in DINOv3's own segmentation probe (Siméoni et
al., arXiv 2508.10104; `dinov3/eval/segmentation/models/heads/linear_head.py`, without its dropout).
It is the baseline that every paper reports, and the only head with BatchNorm and without a look at
the pixels.
"""

import torch
from torch import Tensor, nn

from models.base import HeadOutput, SegmentationHead
from models.blocks import Classifier


class LinearHead(SegmentationHead):
    """`levels` maps (B, channels, H/16, W/16) → logits at H/16, enlarged by the base class.

    Never an auxiliary output. Any number of levels: they are concatenated.

    >>> head = LinearHead(channels=64, levels=4, num_classes=5).eval()
    >>> features = [torch.zeros(1, 64, 16, 16)] * 4  # what a ViT gives for a 256-pixel tile
    >>> head(torch.zeros(1, 3, 256, 256), features).logits.shape
    torch.Size([1, 5, 256, 256])
    """

    def __init__(
        self, channels: int, levels: int, num_classes: int, image_channels: int = 3
    ) -> None:
        super().__init__(channels, levels, num_classes, image_channels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(levels))
        self.classifier = Classifier(levels * channels, num_classes)

    def decode(self, image: Tensor, features: list[Tensor]) -> HeadOutput:
        levels = [norm(level) for norm, level in zip(self.norms, features, strict=True)]
        return HeadOutput(self.classifier(torch.cat(levels, dim=1)), aux=())
