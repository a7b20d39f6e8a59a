"""Backbone and head as one network, for inference: pixels in, class probabilities out."""

from torch import Tensor, nn

from models.backbone import DinoBackbone
from models.base import SegmentationHead


class Segmenter(nn.Module):
    """A frozen backbone with a trained head.

    (B, 3, H, W) pixels in 0..255 to (B, num_classes, H, W) probabilities in float32 that sum to 1.
    The head gets the features in the precision in which prepare caches them.
    """

    def __init__(self, backbone: DinoBackbone, head: SegmentationHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities of a batch of tiles."""
        image = self.backbone.normalize(pixels)
        output = self.head(image, self.backbone.encode(image))
        return output.logits.float().softmax(dim=1)
