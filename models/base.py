"""The contract of every head: pixels and backbone maps in, image-sized logits out.

A head is one file that implements `decode`. The base class checks what comes in and brings every
logits tensor to the image's size, so that no loss, metric or inference ever resizes a label. The
idea of a base class that owns the contract is that of segmentation_models.pytorch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.blocks import EDGE_TYPES

PATCH = 16  # pixels along one side of a DINOv3 ViT token
ROWS = 8  # of a map, which are converted at a time: of 1024 channels about 1 MB


class HeadOutput(NamedTuple):
    """Logits (B, K, H, W) and a tuple of auxiliary ones, each (B, K, H, W); none in eval mode.

    >>> output = HeadOutput(torch.zeros(1, 5, 256, 256), aux=())
    >>> logits, aux = output
    >>> logits.shape, aux
    (torch.Size([1, 5, 256, 256]), ())
    """

    logits: Tensor
    aux: tuple[Tensor, ...]


class SegmentationHead(nn.Module):
    """What all heads share; `decode` is theirs.

    `image` is (B, image_channels, H, W), normalised as for the backbone, with sides divisible by
    16; `features` are `levels` maps (B, channels, H/16, W/16), shallow to deep, in any float type.
    Both are cast once, to what the head computes in: autocast's type, or else the image's. The
    image's memory becomes channels_last, as a ViT's maps are, and what is made of it follows.

    >>> class FirstChannels(SegmentationHead):
    ...     def decode(self, image, features):
    ...         return HeadOutput(features[0][:, : self.num_classes], aux=())
    >>> head = FirstChannels(channels=64, levels=4, num_classes=5)
    >>> features = [torch.zeros(1, 64, 16, 16)] * 4
    >>> head(torch.zeros(1, 3, 256, 256), features).logits.shape
    torch.Size([1, 5, 256, 256])
    >>> head(torch.zeros(1, 3, 256, 256), features[:3])
    Traceback (most recent call last):
    ValueError: 3 feature maps given, this head was built for levels=4: tap as many blocks
    """

    def __init__(
        self, channels: int, levels: int, num_classes: int, image_channels: int = 3
    ) -> None:
        super().__init__()
        if min(channels, levels, num_classes, image_channels) < 1:
            raise ValueError(
                f"channels={channels}, levels={levels}, num_classes={num_classes}, "
                f"image_channels={image_channels}: each must be at least 1"
            )
        self.channels = channels
        self.levels = levels
        self.num_classes = num_classes
        self.image_channels = image_channels

    def forward(self, image: Tensor, features: Sequence[Tensor]) -> HeadOutput:
        """Decode, then bring the logits and every auxiliary one to the image's size."""
        self._check(image, features)
        size, dtype = image.shape[-2:], computed_in(image)
        image = image.to(dtype).contiguous(memory_format=torch.channels_last)
        logits, aux = self.decode(image, [cast(level, dtype) for level in features])
        return HeadOutput(enlarge(logits, size), tuple(enlarge(each, size) for each in aux))

    def decode(self, image: Tensor, features: list[Tensor]) -> HeadOutput:
        """Logits at any scale up to the image's own; auxiliary ones only while `self.training`."""
        raise NotImplementedError(f"{type(self).__name__} must implement decode(image, features)")

    def edge_parameters(self) -> list[nn.Parameter]:
        """First convolutions on pixels, classifiers and embeddings, which Muon leaves to AdamW.

        They are told by their modules' types: `models.blocks.EDGE_TYPES`.
        """
        edges = (module for module in self.modules() if isinstance(module, EDGE_TYPES))
        return [parameter for module in edges for parameter in module.parameters(recurse=False)]

    def _check(self, image: Tensor, features: Sequence[Tensor]) -> None:
        if len(features) != self.levels:
            raise ValueError(
                f"{len(features)} feature maps given, this head was built for "
                f"levels={self.levels}: tap as many blocks"
            )
        if image.shape[1] != self.image_channels:
            raise ValueError(
                f"the image has {image.shape[1]} channels, this head was built for "
                f"image_channels={self.image_channels}"
            )
        for index, level in enumerate(features):
            if level.shape[1] != self.channels:
                raise ValueError(
                    f"feature map {index} has {level.shape[1]} channels, this head was built for "
                    f"channels={self.channels}: use the backbone it was trained on"
                )
            covered = tuple(PATCH * length for length in level.shape[-2:])
            if tuple(image.shape[-2:]) != covered:
                raise ValueError(
                    f"the image is {tuple(image.shape[-2:])} and feature map {index} covers "
                    f"{covered}: a map has 1/{PATCH} of the image's height and width"
                )


def computed_in(image: Tensor) -> torch.dtype:
    """Autocast's type where it is on for the image's device, or else the image's.

    >>> with torch.autocast("cpu", torch.bfloat16):
    ...     computed_in(torch.zeros(1, 3, 256, 256))
    torch.bfloat16
    """
    device = image.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return image.dtype


def cast(level: Tensor, dtype: torch.dtype) -> Tensor:
    """A map (B, channels, h, w) in another type, laid out as it was.

    CPUs convert half precision to bfloat16 faster by way of single, some rows at a time, so that
    these stay in the processor's cache.

    >>> cast(torch.ones(1, 64, 16, 16, dtype=torch.half), torch.bfloat16).dtype
    torch.bfloat16
    """
    slow = (level.dtype, dtype, level.device.type) == (torch.half, torch.bfloat16, "cpu")
    if not slow or level.requires_grad or torch.compiler.is_compiling():
        return level.to(dtype)
    result = torch.empty_like(level, dtype=dtype)
    for tile, converted in zip(level, result, strict=True):
        for rows, target in zip(tile.split(ROWS, 1), converted.split(ROWS, 1), strict=True):
            target.copy_(rows.float())
    return result


def enlarge(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Logits in single precision at `size` (height, width), bilinear between cell centres.

    >>> enlarge(torch.tensor([[[[0.0, 4.0]]]]), (1, 4))
    tensor([[[[0., 1., 3., 4.]]]])
    """
    if logits.shape[-2:] == torch.Size(size):
        return logits.float()
    logits = logits.float().contiguous()  # few channels: planes resize faster than channels_last
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
