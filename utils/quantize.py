"""Features rounded to what a cache holds of them: half precision, or bytes with a scale each.

int8: every channel of every map has its own scale and offset, from its least and greatest value, so
that 255 steps span what it takes in this tile. The mathematics as pure functions; inference rounds
by the same ones, so that a head sees the features that it was trained on.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# what a backbone's features are before they are cached, and again when a head gets them
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16}
STEPS, LOWEST = 255, -128
Maps = Tensor | Sequence[Tensor]


def quantize(level: Tensor) -> tuple[Tensor, Tensor]:
    """A map (..., C, h, w) as int8, and (..., 2, C) float32: the scale and offset of each channel.

    A value that is no number makes its channel's scale none either, so that it is found there.

    >>> codes, scales = quantize(torch.tensor([[[0.0, 1.0], [2.0, 5.1]]]))
    >>> codes.tolist(), scales.tolist()
    ([[[-128, -78], [-28, 127]]], [[0.019999999552965164], [0.0]])
    """
    values = level.float()
    low, high = values.amin((-2, -1), keepdim=True), values.amax((-2, -1), keepdim=True)
    scale = (high - low) / STEPS
    steps = ((values - low) / scale).nan_to_num(0)  # 0 / 0 where a channel is constant: its offset
    codes = steps.round().clamp(0, STEPS) + LOWEST
    return codes.to(torch.int8), torch.stack([scale, low], -4)[..., 0, 0]


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """The map in half precision that `quantize` made these of, but for its rounding.

    >>> dequantize(*quantize(torch.tensor([[[3.0, 3.0]], [[-1.0, 1.0]]]))).tolist()
    [[[3.0, 3.0]], [[-1.0, 1.0]]]
    """
    scale, offset = scales[..., None, None].unbind(-4)
    return ((codes.float() - LOWEST) * scale + offset).to(HALF["int8"])


def as_cached(levels: Maps, feature_dtype: str) -> dict[str, Maps]:
    """What a cache holds of maps that come in their half precision, one by one or in one tensor.

    >>> list(as_cached([torch.zeros(2, 384, 4, 4).half()], "int8"))
    ['features', 'scales']
    """
    if feature_dtype != "int8":
        return {"features": levels}
    if isinstance(levels, Tensor):
        codes, scales = quantize(levels)
    else:
        codes, scales = zip(*map(quantize, levels), strict=True)
    return {"features": codes, "scales": scales}


def restored(features: Sequence[Tensor], scales: Sequence[Tensor] = ()) -> list[Tensor]:
    """Cached maps as a head gets them; without scales they are so already."""
    if len(scales) == 0:
        return list(features)
    return [dequantize(*pair) for pair in zip(features, scales, strict=True)]


def rounding(feature_dtype: str) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """What the way into a cache and out of it does to maps.

    >>> level = torch.tensor([[[1.0, 2.0, 4.0]]]).half()
    >>> rounding("fp16")([level])[0] is level, rounding("int8")([level])[0].tolist()
    (True, [[[1.0, 2.0, 4.0]]])
    """
    return lambda levels: restored(**as_cached(levels, feature_dtype))
