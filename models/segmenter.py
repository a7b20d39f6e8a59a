"""Backbone and head as one network, for inference: pixels in, class probabilities out."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from models.backbone import DinoBackbone
from models.base import SegmentationHead

PRODUCTS = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)  # what autocast computes in bf16


def round_once(head: nn.Module) -> nn.Module:
    """A head whose weights are in bf16 where autocast would round them in each forward.

    >>> [each.dtype for each in round_once(nn.Sequential(nn.Conv2d(2, 2, 1), nn.GroupNorm(1, 2)))
    ...  .state_dict().values()][1:3]
    [torch.bfloat16, torch.float32]
    """
    for module in head.modules():
        if isinstance(module, PRODUCTS):
            module.to(torch.bfloat16)
    return head


class Segmenter(nn.Module):
    """A frozen backbone with a trained head.

    (B, bands, H, W) pixels in 0..255 to (B, num_classes, H, W) probabilities in float32, which sum
    to 1. The head gets the features in the precision in which prepare caches them: as the backbone
    gives them and `rounding`, if any, leaves them.

    >>> import torch
    >>> from types import SimpleNamespace                       # stands in for a backbone
    >>> grey = SimpleNamespace(normalize=lambda p: p / 255, encode=lambda i: [i[:, :1, ::16, ::16]])
    >>> head = lambda image, features: SimpleNamespace(logits=image[:, :2])
    >>> pixels = torch.zeros(1, 3, 64, 64)
    >>> parts = SimpleNamespace(backbone=grey, head=head, rounding=list)
    >>> Segmenter.forward(parts, pixels).unique()
    tensor([0.5000])
    """

    def __init__(
        self,
        backbone: DinoBackbone,
        head: SegmentationHead,
        rounding: Callable[[list[Tensor]], list[Tensor]] = list,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.rounding = rounding

    def compute_in(self, precision: str) -> "Segmenter":
        """Compute in fp32, or bf16: the head's weights are rounded once, not by each autocast."""
        self.backbone.compute_in(precision)
        if precision == "bf16":
            round_once(self.head)
        return self

    def forward(self, pixels: Tensor) -> Tensor:
        """Probabilities of a batch of tiles."""
        image = self.backbone.normalize(pixels)
        output = self.head(image, self.rounding(self.backbone.encode(image)))
        return output.logits.float().softmax(dim=1)
