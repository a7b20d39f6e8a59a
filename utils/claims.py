"""Whether what a manifest or a checkpoint says of itself can be: beyond its types, which `records`
checks, numbers that go with each other and mean something.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from utils.formats import too_large
from utils.records import fits

SCENE = {  # what a manifest says of a scene
    "height": int,
    "width": int,
    "crs": str | None,
    "transform": list[float],
    "bytes": int,
    "modified": int,
    "labels": dict[str, dict[str, int]],
}
MOST_CHANNELS = 2**15  # of a feature map; the largest DINOv3 has 4096
LARGEST_LABEL = 2**31  # label values lie below
FEATURE_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.int8}


def contradicting(made: Any) -> list[str]:
    """The fields of a manifest or checkpoint that do not go with others, or mean nothing."""
    bands, classes = len(made.bands), made.num_classes
    pairs = all(len(pair) == 2 and _rise(pair) and _finite(pair) for pair in made.ranges)
    sound = {
        "bands": bands > 0 and min(made.bands) > 0,
        "ranges": len(made.ranges) == bands and pairs,
        "rgb": len(made.rgb) == 3 and all(0 <= place < bands for place in made.rgb),
        "image_mean": len(made.image_mean) == bands and _finite(made.image_mean),
        "image_std": len(made.image_std) == bands and all(map(_size, made.image_std)),
        "gsd": made.gsd is None or _size(made.gsd),
        "ground_gsd": made.ground_gsd is None or _size(made.ground_gsd),
        "layers": bool(made.layers) and made.layers[0] >= 0 and _rise(made.layers),
        "channels": 0 < made.channels <= MOST_CHANNELS,
        "tile_size and patch_size": made.tile_size > 0 < made.patch_size
        and made.tile_size % made.patch_size == 0,
        "ignore_index and num_classes": 0 < classes <= made.ignore_index < LARGEST_LABEL,
        "class_names and num_classes": len(made.class_names) == classes,
        "class_colors and num_classes": len(made.class_colors) == classes
        and all(map(_color, made.class_colors)),
        "feature_dtype": made.feature_dtype in FEATURE_DTYPES,
        "precision": made.precision in ("fp32", "bf16"),
    }
    return [name for name, right in sound.items() if not right]


def odd_scene(about: Mapping[str, Any]) -> bool:
    """Whether a manifest's account of a scene is none that prepare gives.

    >>> scene = {"height": 1000, "width": 700, "crs": None, "transform": [1, 0, 0, 0, 1, 0]}
    >>> odd_scene(scene), odd_scene(scene | {"width": -1}), odd_scene({"height": 1000})
    (False, True, True)
    """
    if not {"height", "width"} <= set(about) <= set(SCENE):
        return True
    if not all(fits(value, SCENE[name]) for name, value in about.items()):
        return True
    place = about.get("transform", [1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    height, width = about["height"], about["width"]
    return min(height, width) < 1 or bool(too_large(height, width)) or not _affine(place)


def _affine(place: Sequence[float]) -> bool:
    """Whether numbers are a transform that can be turned round."""
    return len(place) == 6 and _finite(place) and place[0] * place[4] != place[1] * place[3]


def _finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _size(value: float) -> bool:
    return 0 < value < math.inf


def _rise(values: Sequence[float]) -> bool:
    return all(first < second for first, second in zip(values, values[1:], strict=False))


def _color(color: Sequence[int]) -> bool:
    return len(color) == 3 and all(0 <= value <= 255 for value in color)
