"""What config keys must be to each other: values that clash, and keys that others ask for.

Each fault comes with the keys that take part, the one to blame first.
"""

from collections.abc import Iterator, Sequence
from typing import Any

SHARED = ("raw_images_dir", "label_path", "processed_dir")
NEEDED_PATHS = {
    "prepare": ("raw_images_dir", "label_path", "processed_dir"),
    "verify": ("processed_dir",),
    "train": ("processed_dir",),
    "inference": ("input_tif", "output_tif"),
}


def doubled(values: Sequence[str]) -> list[str]:
    """Those that are there more than once.

    >>> doubled(["wood", "road", "wood"])
    ['wood']
    """
    return sorted({value for value in values if list(values).count(value) > 1})


def class_clashes(config: Any) -> Iterator[tuple[str, ...]]:
    """What does not go together about classes; told like a clash."""
    classes, count = config.dataset.classes or (), config.model.num_classes
    for what, values in (
        ("name", [each.name for each in classes]),
        ("value", [str(value) for each in classes for value in each.values]),
    ):
        if twice := doubled(values):
            yield f"dataset.classes: {what} {twice[0]} is given twice", "dataset.classes"
    background = config.dataset.labels.background
    if background != "ignore" and background >= count:
        fault = f"dataset.labels.background: found {background}, expected a class below {count}"
        yield fault, "dataset.labels.background", "model.num_classes", "dataset.classes"
    weights = config.train.loss.class_weights
    if not isinstance(weights, str) and len(weights) != count:
        fault = f"train.loss.class_weights: {len(weights)} numbers, expected {count}"
        yield fault, "train.loss.class_weights", "model.num_classes", "dataset.classes"


def imagery_clashes(data: Any) -> Iterator[tuple[str, ...]]:
    """What does not go together about bands; told like a clash."""
    inside = set(data.rgb or ()) <= set(data.bands or data.rgb or ())
    if data.rgb and (len(data.rgb) not in (1, 3) or not inside):
        fault = f"dataset.rgb: found {list(data.rgb)}, expected one or three of dataset.bands"
        yield fault, "dataset.rgb", "dataset.bands"
    if data.bands and not isinstance(data.input_range, str):
        pairs = len(data.input_range) if isinstance(data.input_range[0], tuple) else 1
        if pairs not in (1, len(data.bands)):
            fault = f"dataset.input_range: {pairs} pairs, expected one or {len(data.bands)}"
            yield f"{fault}, as many as dataset.bands", "dataset.input_range", "dataset.bands"


def cache_clashes(config: Any) -> Iterator[tuple[str, ...]]:
    """What does not go together about the cache; told like a clash."""
    views, means = config.train.augment_views, config.dataset.augmentations
    flips = (1 + means.hflip) * (1 + means.vflip)
    most = flips if not means.rotate90 else 8 if flips > 1 else 4
    if not means.enable:
        most = 1
    if views > most:
        fault = f"train.augment_views: found {views}, dataset.augmentations makes {most} of a tile"
        keys = ("enable", "hflip", "vflip", "rotate90")
        yield fault, "train.augment_views", *(f"dataset.augmentations.{key}" for key in keys)
    if views > 1 and config.dataset.cache != "features":
        fault = f"train.augment_views: {views} needs dataset.cache: features"
        yield fault, "train.augment_views", "dataset.cache"


def clashes(config: Any) -> Iterator[tuple[str, ...]]:
    """Values that do not go together: the fault, then the keys that take part, to blame first."""
    ignore, classes = config.dataset.ignore_index, config.model.num_classes
    if ignore < classes:
        fault = f"dataset.ignore_index: {ignore} is a class id, expected model.num_classes or more"
        yield f"{fault} (at least {classes})", "dataset.ignore_index", "model.num_classes"
    if config.train.loss.ce_weight + config.train.loss.dice_weight == 0:
        fault = "train.loss: ce_weight and dice_weight are both 0, expected one above 0"
        yield fault, "train.loss.ce_weight", "train.loss.dice_weight"
    yield from imagery_clashes(config.dataset)
    yield from cache_clashes(config)
    scene, result = config.inference.input_tif, config.inference.output_tif
    if result and result in (scene if isinstance(scene, tuple) else (scene,)):
        fault = "inference.output_tif: found the path of inference.input_tif, expected another file"
        yield fault, "inference.output_tif", "inference.input_tif"
    polygons = config.inference.polygons
    if polygons and polygons.suffix not in ("", ".gpkg", ".geojson"):
        fault = f"inference.polygons: found {polygons.suffix}, expected .gpkg or .geojson"
        yield fault, "inference.polygons"
    splits = config.dataset.splits
    if splits.regions and splits.train_list:
        fault = "dataset.splits: regions and train_list are given, expected one of them"
        yield fault, "dataset.splits.regions", "dataset.splits.train_list"


def gaps(config: Any) -> Iterator[tuple[str, ...]]:
    """What other keys ask for and nobody gave; told like a clash."""
    splits, model = config.dataset.splits, config.model
    for above, section, *names in (
        ("dataset.splits", splits, "train_list", "val_list"),
        ("model", model, "image_mean", "image_std"),
    ):
        absent = [name for name in names if getattr(section, name) is None]
        if len(absent) == 1:
            given = next(name for name in names if name not in absent)
            fault = f"{above}.{given}: {absent[0]} is missing, expected both or neither"
            yield fault, f"{above}.{given}", f"{above}.{absent[0]}"
    for phase, names in NEEDED_PATHS.items():
        section = getattr(config, phase)
        for name in names if section.enable else ():
            if getattr(section, name) is None:
                keys = [f"paths.{name}"] * (name in SHARED) + [f"{phase}.{name}"]
                fault = f"{phase} needs {name}: set {' or '.join(keys)}"
                yield fault, phase, f"{phase}.enable", *keys
