"""The manifest of a tile cache: what it is, and what other settings differ from it in.

It says how the tiles were made; a cache made in another way is refused, not mixed. Its fingerprint
is of all that shapes a tile.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from utils.artefacts import plain_bytes, write_artefact
from utils.claims import FEATURE_DTYPES, contradicting, odd_scene
from utils.limits import MEBIBYTE
from utils.records import has_format, unfit
from utils.tiling import tiles

MANIFEST, COPY = "manifest.json", "manifest.copy.json"
FORMAT = 4
OVERHEAD = 1 << 13  # bytes of a tile's file beside its tensors: names, checksums, room to align
LARGEST_MANIFEST = 1024 * MEBIBYTE  # some millions of tiles
# what may differ between a cache and the run that goes on with it
PROGRESS = {
    "backbone", "scenes", "tiles", "complete", "auto_range", "ground_gsd", "class_names",
    "class_colors", "fingerprint",
}  # fmt: skip
NOT_SHAPING = PROGRESS | {"filters"}  # a tile that a filter lets through is the same tile
KEYS = {
    "backbone_hash": "model.backbone",
    "layers": "model.layers",
    "channels": "model.dino_channels",
    "image_mean": "model.image_mean",
    "image_std": "model.image_std",
    "precision": "resources.precision",
    "tile_size": "prepare.tile_size",
    "feature_dtype": "prepare.feature_dtype",
    "cache": "dataset.cache",
    "views": "train.augment_views",
    "num_classes": "model.num_classes",
    "ignore_index": "dataset.ignore_index",
    "bands": "dataset.bands",
    "rgb": "dataset.rgb",
    "rgb_bands": "dataset.rgb",
    "ranges": "dataset.input_range",
    "nodata": "dataset.nodata",
    "gsd": "dataset.gsd",
    "label_rules": "dataset.classes and dataset.labels",
    "filters": "prepare.min_valid, min_labeled, background_keep, resources.seed",
}


class CacheError(Exception):
    """A cache that is missing, unfinished, or made with other settings."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a cache is.

    cache is features, or tiles where features are left to training; either way the backbone's.
    ranges are the values that become 0 and 255 in each of the bands, auto_range whether `auto`
    found them; rgb the places among the bands that the backbone sees; views are the turns of a tile
    whose features are cached, the first none; scenes identify the files read, each scene's own and
    those of its labels (bytes, modification time); tiles holds each tile's labelled pixels per
    class, once prepare is done and `complete`; fingerprint is of all that shapes a tile's content.
    """

    backbone: str
    backbone_hash: str
    layers: list[int]
    norm: str
    channels: int
    patch_size: int
    image_mean: list[float]
    image_std: list[float]
    bands: list[int]
    rgb: list[int]
    ranges: list[list[float]]
    nodata: float | None
    gsd: float | None
    precision: str
    tile_size: int
    feature_dtype: str
    num_classes: int
    ignore_index: int
    label_rules: dict[str, Any]
    filters: dict[str, float]
    class_names: list[str]
    class_colors: list[list[int]]
    cache: str = "features"
    views: list[list[bool | int]] = field(default_factory=lambda: [[False, False, 0]])
    auto_range: bool = False
    ground_gsd: float | None = None
    scenes: dict[str, dict[str, Any]] = field(default_factory=dict)
    tiles: dict[str, list[int]] = field(default_factory=dict)
    complete: bool = False
    format: int = FORMAT
    fingerprint: str = field(init=False, default="")

    def __post_init__(self) -> None:
        shaping = [each.name for each in fields(self) if each.name not in NOT_SHAPING]
        values = {name: getattr(self, name) for name in shaping}
        object.__setattr__(self, "fingerprint", hash_of(values, 16))  # once, not for each tile

    def stamp_of(self, name: str) -> str:
        """What a tile's file carries: the cache, the tile, and the state of its sources."""
        return f"{self.fingerprint} {name} {hash_of(self.scenes.get(scene_of(name)), 8)}"

    @property
    def tile_bytes(self) -> int:
        """About how large a tile's file is."""
        size, cells = self.tile_size, self.tile_size // self.patch_size
        held = size**2 * (len(self.bands) + self.label_dtype.itemsize)
        if self.cache == "features":
            maps = len(self.views) * len(self.layers)
            each = cells**2 * FEATURE_DTYPES[self.feature_dtype].itemsize
            held += maps * self.channels * (each + 8 * (self.feature_dtype == "int8"))
        return held + OVERHEAD

    @property
    def parts(self) -> tuple[str, ...]:
        """What a tile's file holds."""
        if self.cache == "tiles":
            return ("image", "label")
        return ("image", "features", "label", *["scales"] * (self.feature_dtype == "int8"))

    @property
    def rgb_bands(self) -> list[int]:
        """The numbers of the bands that the backbone sees: three, or one."""
        return seen_bands(self.bands, self.rgb)

    @property
    def label_dtype(self) -> torch.dtype:
        """The smallest type that holds every class id and ignore_index."""
        return torch.uint8 if max(self.num_classes - 1, self.ignore_index) <= 255 else torch.int32


def seen_bands(bands: list[int], rgb: list[int]) -> list[int]:
    """The numbers of the bands in these places, which are three, or thrice the same.

    >>> seen_bands([4, 3, 2, 1], rgb=[1, 2, 3]), seen_bands([5, 7], rgb=[1, 1, 1])
    ([3, 2, 1], [7])
    """
    chosen = [bands[place] for place in rgb]
    return chosen[:1] if len(set(chosen)) == 1 else chosen


def hash_of(value: Any, length: int) -> str:
    """The beginning of a hash over what JSON holds.

    >>> hash_of({"bytes": 1, "modified": 2}, 8) == hash_of({"modified": 2, "bytes": 1}, 8)
    True
    """
    text = json.dumps(value, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json, with the checksum of what it says; and a copy, which may restore it."""
    content = asdict(manifest)
    text = json.dumps(content | {"checksum": checksum_of(content)}, indent=2)
    for name in (MANIFEST, COPY):
        write_artefact(folder / name, f"{text}\n".encode())


def restored(folder: Path) -> str:
    """Write a manifest that is lost or damaged again from its copy; what to say of it, if so."""
    if not (folder / COPY).is_file():
        return ""
    try:
        read_manifest(folder)
        return ""
    except CacheError as error:
        reason = str(error).partition(";")[0]
    try:
        found = read_from(folder / COPY)
    except CacheError:
        return ""  # what is said of the manifest itself will do
    write_manifest(found, folder)
    return f"{reason}; it is written again from {COPY}"


def require_manifest(folder: Path) -> Path:
    """The path of a cache's manifest; CacheError where there is none."""
    path = folder / MANIFEST
    if path.exists() and not path.is_file():
        raise CacheError(f"{path}: is no plain file; remove it")
    if not path.exists():
        raise CacheError(f"{path}: no such file; run prepare first (prepare.enable: true)")
    return path


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache folder, or an error that says what to do."""
    return read_from(require_manifest(folder))


def read_from(path: Path) -> Manifest:
    """The manifest in a file, once all that it says is as prepare writes it."""
    try:
        content = json.loads(plain_bytes(path, LARGEST_MANIFEST))
        checksum = content.pop("checksum", None)
        if not has_format(content, FORMAT) or set(content) != {f.name for f in fields(Manifest)}:
            raise ValueError(f"format {content.get('format')!r}, expected {FORMAT}")
        if checksum != checksum_of(content):
            raise ValueError("damaged: it is not what its checksum is of")
        if odd := unfit(Manifest, content):
            raise ValueError(f"entries that prepare does not write: {', '.join(odd)}")
        del content["fingerprint"]  # which follows from the others
        manifest = Manifest(**content)
        if odd := contradicting(manifest) + untrue(manifest):
            raise ValueError(f"entries that mean nothing: {', '.join(odd)}")
        return manifest
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CacheError(f"{path}: not a manifest ({error}); delete {path.parent}") from error


def untrue(manifest: Manifest) -> list[str]:
    """The fields of a manifest's own whose values prepare does not write."""
    views, classes = manifest.views, manifest.num_classes
    turns = all([type(part) for part in view] == [bool, bool, int] for view in views)
    counts = manifest.tiles.values()
    sound = {
        "cache": manifest.cache in ("features", "tiles"),
        "views": turns and views[:1] == [[False, False, 0]],
        "scenes": not any(map(odd_scene, manifest.scenes.values())),
        "tiles": all(len(each) == classes and min(each) >= 0 for each in counts),
    }
    return [name for name, right in sound.items() if not right]


def checksum_of(content: dict[str, Any]) -> str:
    """SHA-256 of what a manifest says, however it is laid out.

    >>> checksum_of({"tile_size": 64})[:12]
    '2ee90093df66'
    """
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def same_in(found: Manifest, wanted: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise CacheError where a manifest has other values than `wanted`, with both of each field."""
    told = []
    for name, ours in wanted.items():
        theirs = getattr(found, name)
        if theirs != ours:
            made, given = differing(theirs, ours)
            if name == "views" and len(made) != len(given):
                made, given = len(made), len(given)
            key = KEYS.get(name, name)
            told.append(f"{name} {short(made)}, this run has {short(given)} ({key})")
    if told:
        raise CacheError(f"{what} {'; '.join(told)}; {remedy}")


def differing(first: Any, second: Any) -> tuple[Any, Any]:
    """Two values; of dicts only the entries that are not alike.

    >>> differing({"unlisted": "error", "nodata": "auto"}, {"unlisted": "ignore", "nodata": "auto"})
    ({'unlisted': 'error'}, {'unlisted': 'ignore'})
    """
    if not (isinstance(first, dict) and isinstance(second, dict)):
        return first, second
    odd = {key for key in first | second if first.get(key) != second.get(key)}
    return tuple({key: each[key] for key in each if key in odd} for each in (first, second))


def short(value: Any) -> str:
    """A value for a message: hashes and long texts cut.

    >>> short("0123456789abcdef0123"), short([2, 5, 8, 11])
    ('0123456789ab...', '[2, 5, 8, 11]')
    """
    text = str(value)
    is_hash = isinstance(value, str) and len(text) > 16
    most = 12 if is_hash else 200
    return f"{text[:most]}..." if len(text) > most else text


def scene_of(name: str) -> str:
    """The scene a tile belongs to.

    >>> scene_of("north__r000512_c000000")
    'north'
    """
    return name.rpartition("__")[0]


def known_names(manifest: Manifest) -> set[str]:
    """Every tile that the manifest's scenes may have."""
    return {
        f"{scene}__{tile.name}"
        for scene, about in manifest.scenes.items()
        for tile in tiles(about["height"], about["width"], manifest.tile_size)
    }
