"""The registry of heads, by the names that `model.head` takes in the config."""

import torch

from models.base import SegmentationHead
from models.linear import LinearHead
from models.maskformer import MaskFormerHead
from models.unet import UNetHead
from models.unet_v2 import UNetV2Head

HEADS: dict[str, type[SegmentationHead]] = {
    "unet": UNetHead,
    "unet_v2": UNetV2Head,
    "maskformer": MaskFormerHead,
    "linear": LinearHead,
}


def build_head(
    name: str, channels: int, levels: int, num_classes: int, image_channels: int = 3
) -> SegmentationHead:
    """A new head for `levels` backbone maps of `channels` channels, its kernels channels_last.

    >>> build_head("linear", channels=64, levels=4, num_classes=5).classifier.in_channels
    256
    >>> build_head("unet_v3", channels=64, levels=4, num_classes=5)
    Traceback (most recent call last):
    ValueError: unknown head 'unet_v3': choose one of unet, unet_v2, maskformer, linear
    """
    if name not in HEADS:
        raise ValueError(f"unknown head {name!r}: choose one of {', '.join(HEADS)}")
    head = HEADS[name](channels, levels, num_classes, image_channels)
    return head.to(memory_format=torch.channels_last)
