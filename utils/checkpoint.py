"""Checkpoints: a head's weights with everything needed to use them again.

A file holds plain tensors, numbers, strings, lists and dicts only, and is read with
`weights_only=True`, so that loading one never runs code.
"""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from utils.archives import load_plain
from utils.artefacts import write_artefact
from utils.claims import contradicting
from utils.manifest import seen_bands
from utils.records import has_format, unfit

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
