"""Whether what a run is set to agrees with what a cache or a checkpoint was made with.

Both decide what the configuration leaves open; what it says is compared, and a difference is an
error with both values of each field.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from config import Config, Dataset, Model
from utils.checkpoint import Checkpoint, CheckpointError
from utils.devices import has_bf16
from utils.label_values import label_rules
from utils.logging import VerbosityLogger
from utils.manifest import Manifest, same_in, seen_bands
from utils.scenes import pair_of_each
from utils.turns import first_turns

SET_BACK = "set it back, or run prepare into another folder"
FILTERS = {"min_valid", "min_labeled", "background_keep"}


def require_cache(config: Config, manifest: Manifest) -> None:
    """Refuse a cache made with other settings than the configuration has by now."""
    means = config.dataset.augmentations
    views = first_turns(config.train.augment_views, means.hflip, means.vflip, means.rotate90)
    wanted = {"views": views} | {
        name: value for name, value in stated(config, manifest).items() if value is not None
    }
    folder = config.train.processed_dir
    same_in(manifest, wanted, f"{folder}: this cache was made with", SET_BACK)


def stated(config: Config, manifest: Manifest) -> dict[str, Any]:
    """What a configuration says of the fields of a cache's manifest; None where it says nothing.

    `cache`, `num_classes` and `ignore_index` always say something (as do the views); other keys
    with a value for a default only where they are written, and those of prepare only of the cache
    that they are for.
    """
    model, data, section = config.model, config.dataset, config.prepare
    ours = section.processed_dir in (None, config.train.processed_dir)
    written = section.model_dump(include=section.model_fields_set) if ours else {}
    filters = {name: value for name, value in written.items() if name in FILTERS}
    return {
        "cache": None if data.cache == "auto" else data.cache,
        "num_classes": model.num_classes,
        "feature_dtype": written.get("feature_dtype"),
        "tile_size": written.get("tile_size"),
        "precision": None if config.resources.precision == "auto" else config.resources.precision,
        "ignore_index": data.ignore_index,
        "layers": None if model.layers is None else list(model.layers),
        "channels": model.dino_channels,
        **stated_statistics(model, manifest),
        "bands": data.bands and list(data.bands),
        "rgb_bands": data.rgb and seen_bands(list(data.rgb), list(range(len(data.rgb)))),
        "ranges": stated_ranges(data, len(manifest.bands)),
        "gsd": data.gsd,
        "nodata": data.nodata,
        "class_names": data.classes and [each.name for each in data.classes],
        "label_rules": manifest.label_rules | stated_rules(data, model.num_classes),
        "filters": manifest.filters | filters,
    }


def stated_rules(section: Dataset, num_classes: int) -> dict[str, Any]:
    """The rules of labels that are written down.

    >>> stated_rules(Dataset(labels={"unlisted": "ignore"}), num_classes=3)
    {'unlisted': 'ignore'}
    """
    rules, written = asdict(label_rules(section, num_classes)), set(section.labels.model_fields_set)
    if any(each.values for each in section.classes or ()):
        written.add("ids")
    return {name: value for name, value in rules.items() if name in written}


def stated_statistics(section: Model, manifest: Manifest) -> dict[str, list[float]]:
    """A manifest's mean and std of each band, with those in place that the configuration has."""
    found = {}
    for name in ("image_mean", "image_std"):
        if (given := getattr(section, name)) is not None:
            values, alike = list(getattr(manifest, name)), len(set(manifest.rgb)) == 1
            seen = [sum(given) / len(given)] * len(given) if alike else given
            for place, value in zip(manifest.rgb, seen, strict=True):
                values[place] = round(value, 6)
            found[name] = values
    return found


def stated_ranges(section: Dataset, bands: int) -> list[list[float]] | None:
    """The range of each band, where `dataset.input_range` has numbers.

    >>> stated_ranges(Dataset(input_range=(0, 3000)), bands=2), stated_ranges(Dataset(), bands=2)
    ([[0.0, 3000.0], [0.0, 3000.0]], None)
    """
    wanted = section.input_range
    if isinstance(wanted, str):
        return None
    return [list(pair) for pair in pair_of_each(wanted, bands)]


def require_fit(path: Path, checkpoint: Checkpoint, config: Config, backbone: Any) -> None:
    """Refuse a checkpoint that was made for other features or another head than this run has."""
    spec, data = backbone.spec, config.dataset
    wanted = {
        "head": config.model.head,
        "num_classes": config.model.num_classes,
        "rgb": list(spec.rgb),
        "layers": list(spec.layers),
        "levels": len(spec.layers),
        "channels": spec.channels,
        "norm": spec.norm,
        "image_mean": list(spec.image_mean),
        "image_std": list(spec.image_std),
        "backbone_hash": backbone.weights_hash,
    }
    told = {
        "bands": data.bands and list(data.bands),
        "ranges": stated_ranges(data, len(checkpoint.bands)),
        "nodata": data.nodata,
        "gsd": data.gsd,
    }
    wanted |= {key: value for key, value in told.items() if value is not None}
    if data.classes is not None:
        wanted["class_names"] = [each.name for each in data.classes]
    require_equal(path, {key: getattr(checkpoint, key) for key in wanted}, wanted)


def precision_as_trained(
    path: Path, checkpoint: Checkpoint, wanted: str, device: torch.device, log: VerbosityLogger
) -> str:
    """The precision to infer in: the training's, unless resources.precision names another."""
    trained = checkpoint.precision
    if wanted not in ("auto", trained):
        log.warning(
            f"{path}: trained in {trained}, resources.precision is {wanted}; maps may differ "
            "slightly"
        )
        return wanted
    if trained == "bf16" and not has_bf16(device):
        log.warning(
            f"{path}: trained in bf16, which this processor emulates; resources.precision: fp32 "
            "may be quicker"
        )
    return trained


def require_backbone(folder: Path, manifest: Manifest, backbone: Any) -> None:
    """Refuse a backbone that is not the one a cache of tiles was made for, to the last weight."""
    spec = backbone.spec
    ours = {
        "backbone_hash": backbone.weights_hash,
        "layers": list(spec.layers),
        "image_mean": list(spec.image_mean),
        "image_std": list(spec.image_std),
        "rgb": list(spec.rgb),
        "norm": spec.norm,
    }
    same_in(manifest, ours, f"{folder}: its tiles are for a backbone with", SET_BACK)


def require_equal(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse a checkpoint that was made for something else, naming each field with both values.

    >>> require_equal(Path("best.pth"), {"head": "unet"}, {"head": "linear"})
    Traceback (most recent call last):
    utils.checkpoint.CheckpointError: best.pth: head is 'unet', this run has 'linear'
    """
    differing = [
        f"{key} is {found[key]!r}, this run has {value!r}"
        for key, value in wanted.items()
        if found[key] != value
    ]
    if differing:
        raise CheckpointError(f"{path}: {'; '.join(differing)}")
