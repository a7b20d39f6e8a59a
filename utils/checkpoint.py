"""Checkpoints: a head's weights with everything needed to use them again.

A file holds plain tensors, numbers, strings, lists and dicts only, and is read with
`weights_only=True`, so that loading one never runs code.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from config import Config, Dataset
from utils.artefacts import write_artefact
from utils.cache import Manifest, load_plain, same_in, seen_bands
from utils.claims import contradicting
from utils.distributed import has_bf16
from utils.logging import VerbosityLogger
from utils.records import has_format, unfit
from utils.turns import first_turns

FORMAT = 3


class CheckpointError(Exception):
    """A checkpoint that is missing, damaged, or made for something else."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What weights are.

    head, num_classes, channels and levels rebuild the network; backbone, backbone_hash, layers,
    norm, image_mean, image_std, patch_size, tile_size, precision and feature_dtype say which
    features it was trained on; bands, rgb, ranges, nodata and gsd how scenes are read; class_names
    and class_colors what a map shows; config is the run's resolved YAML, metrics the validation
    scores of `epoch`.
    """

    head: str
    num_classes: int
    channels: int
    levels: int
    backbone: str
    backbone_hash: str
    layers: list[int]
    norm: str
    image_mean: list[float]
    image_std: list[float]
    patch_size: int
    tile_size: int
    precision: str
    feature_dtype: str
    bands: list[int]
    rgb: list[int]
    ranges: list[list[float]]
    nodata: float | None
    gsd: float | None
    ground_gsd: float | None
    class_names: list[str]
    class_colors: list[list[int]]
    ignore_index: int
    epoch: int
    metrics: dict[str, Any]
    config: str
    state: dict[str, Tensor]

    @property
    def rgb_bands(self) -> list[int]:
        """The numbers of the bands that the backbone sees: three, or one."""
        return seen_bands(self.bands, self.rgb)


def save_checkpoint(checkpoint: Checkpoint, path: Path) -> None:
    """Write a checkpoint's file."""
    content = {field.name: getattr(checkpoint, field.name) for field in fields(Checkpoint)}
    write_artefact(path, lambda file: torch.save({"format": FORMAT, **content}, file))


def require_there(path: Path) -> None:
    """Raise CheckpointError where a checkpoint's file is missing.

    >>> require_there(Path("none.pth"))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    utils.checkpoint.CheckpointError: none.pth: no such checkpoint; train first, or ...
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such checkpoint; train first, or set inference.checkpoint to one"
        )


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint on the CPU; anything but a whole one is an error that says why."""
    require_there(path)
    try:
        content = load_plain(path)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged, or not a checkpoint ({error})") from error
    if not has_format(content, FORMAT):
        raise CheckpointError(f"{path}: not a DINOv3Seg checkpoint of format {FORMAT}")
    content = {key: value for key, value in content.items() if key != "format"}
    wanted = {field.name for field in fields(Checkpoint)}
    if set(content) != wanted:
        odd = ", ".join(sorted(wanted ^ set(content)))
        raise CheckpointError(f"{path}: missing or unknown entries: {odd}")
    if odd := unfit(Checkpoint, content) or contradicting(Checkpoint(**content)):
        raise CheckpointError(f"{path}: entries that no training writes: {', '.join(odd)}")
    return Checkpoint(**content)


def load_weights(head: nn.Module, checkpoint: Checkpoint, path: Path) -> None:
    """Fill a head with the checkpoint's weights, every name and shape matching."""
    try:
        head.load_state_dict(checkpoint.state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        text = f"{path}: weights do not fit head {checkpoint.head} ({reason})"
        raise CheckpointError(text) from error


def plain_state(module: nn.Module) -> dict[str, Tensor]:
    """A copy of a module's weights on the CPU, safe from the steps that follow.

    >>> sorted(plain_state(nn.Sequential(nn.Linear(2, 1))))
    ['0.bias', '0.weight']
    """
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


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
    stated = {
        "bands": data.bands and list(data.bands),
        "ranges": stated_ranges(data, len(checkpoint.bands)),
        "nodata": data.nodata,
        "gsd": data.gsd,
    }
    wanted |= {key: value for key, value in stated.items() if value is not None}
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


def stated_ranges(section: Dataset, bands: int) -> list[list[float]] | None:
    """The range of each band, where `dataset.input_range` has numbers.

    >>> stated_ranges(Dataset(input_range=(0, 3000)), bands=2), stated_ranges(Dataset(), bands=2)
    ([[0.0, 3000.0], [0.0, 3000.0]], None)
    """
    wanted = section.input_range
    if isinstance(wanted, str):
        return None
    pairs = wanted if isinstance(wanted[0], tuple) else (wanted,) * bands
    return [list(pair) for pair in pairs]


def require_cache(config: Config, manifest: Manifest) -> None:
    """Refuse a cache made with other settings than the configuration has by now."""
    folder, model, means = config.train.processed_dir, config.model, config.dataset.augmentations
    views = first_turns(config.train.augment_views, means.hflip, means.vflip, means.rotate90)
    if manifest.views != views:
        raise CheckpointError(
            f"{folder}: features of {len(manifest.views)} views of a tile are cached, "
            f"train.augment_views asks for {len(views)} by dataset.augmentations; run prepare into "
            "another folder, or set it back"
        )
    precision, kind = config.resources.precision, config.dataset.cache
    stated = {
        "cache": None if kind == "auto" else kind,
        "num_classes": model.num_classes,
        "feature_dtype": config.prepare.feature_dtype,
        "precision": None if precision == "auto" else precision,
        "ignore_index": config.dataset.ignore_index,
        "layers": None if model.layers is None else list(model.layers),
        "channels": model.dino_channels,
        "bands": None if config.dataset.bands is None else list(config.dataset.bands),
        "gsd": config.dataset.gsd,
        "nodata": config.dataset.nodata,
        "class_names": config.dataset.classes and [each.name for each in config.dataset.classes],
    }
    wanted = {key: value for key, value in stated.items() if value is not None}
    found = {key: getattr(manifest, key) for key in wanted}
    require_equal(folder, found, wanted)


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
    remedy = "set it back, or run prepare into another folder"
    same_in(manifest, ours, f"{folder}: its tiles are for a backbone with", remedy)


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
