"""A plain U-Net decoder on the fused backbone map, with the raw image as its skip.

After U-Net (Ronneberger et al., arXiv 1505.04597) as TransUNet (Chen et al., arXiv 2102.04306) puts
it on a ViT: four up-blocks from H/16 to H. A ViT has no finer maps to skip from, so each block sees
the pixels themselves, brought to its scale by one strided convolution.
"""

from torch import Tensor, nn

from models.base import HeadOutput, SegmentationHead
from models.blocks import Classifier, LevelFusion, PixelBlock, UpBlock, decoder_width

STRIDES = (8, 4, 2, 1)  # the scales of the up-blocks, in pixels per cell
NARROWEST = 16  # channels at full resolution, where a channel costs most


class UNetHead(SegmentationHead):
    """Logits at the image's own size; in training one auxiliary output, at H/8.

    Any number of levels: each is projected and normalised, and they are summed at H/16.

    >>> import torch
    >>> head = UNetHead(channels=64, levels=4, num_classes=5)
    >>> features = [torch.zeros(1, 64, 16, 16)] * 4  # what a ViT gives for a 256-pixel tile
    >>> logits, aux = head(torch.zeros(1, 3, 256, 256), features)
    >>> logits.shape, len(aux)
    (torch.Size([1, 5, 256, 256]), 1)
    """

    def __init__(
        self, channels: int, levels: int, num_classes: int, image_channels: int = 3
    ) -> None:
        super().__init__(channels, levels, num_classes, image_channels)
        width = decoder_width(channels)
        widths = [width] + [max(NARROWEST, width * stride // 16 // 8 * 8) for stride in STRIDES]
        self.fusion = LevelFusion(channels, levels, width)
        self.pixels = nn.ModuleList(
            PixelBlock(image_channels, NARROWEST, stride) for stride in STRIDES
        )
        self.ups = nn.ModuleList(
            UpBlock(widths[step], (NARROWEST,), widths[step + 1], depth=2 if stride > 1 else 1)
            for step, stride in enumerate(STRIDES)
        )
        self.classifier = Classifier(widths[-1], num_classes)
        self.aux_classifier = Classifier(widths[1], num_classes)

    def decode(self, image: Tensor, features: list[Tensor]) -> HeadOutput:
        scales = [self.fusion(features)]
        for up, pixels in zip(self.ups, self.pixels, strict=True):
            scales.append(up(scales[-1], pixels(image)))
        aux = (self.aux_classifier(scales[1]),) if self.training else ()
        return HeadOutput(self.classifier(scales[-1]), aux)
