"""The tile cache on disk: what it is (manifest.json) and one `.pt` file per tile.

A tile's file holds `{image, features, label}`: image (bands, S, S) uint8 as read and scaled,
features (maps, channels, S/16, S/16) in channels-last memory, level by level of one view after the
other, label (S, S) class ids; with int8 features also `scales` (maps, 2, channels) float32. A cache
of tiles holds image and label only, and training computes the features. The manifest says how they
were made; a cache made in another way is refused, not mixed. Each file carries a stamp: the cache,
the tile and the state of its sources that it was made for; with another stamp it is not used.
"""

import errno
import hashlib
import io
import json
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.artefacts import (
    check_members,
    checked_zip,
    patiently,
    write_artefact,
)
from utils.claims import FEATURE_DTYPES, contradicting, odd_scene
from utils.limits import MEBIBYTE, limited_bytes
from utils.records import has_format, unfit
from utils.tiling import tiles

MANIFEST = "manifest.json"
FORMAT = 4
STAMP = "stamp"
PLACE = re.compile(r"r[0-9]{6,}_c[0-9]{6,}")  # of a tile, as its name ends
OVERHEAD = 1 << 13  # bytes of a tile's file beside its tensors: names, checksums, room to align
LARGEST = 4096 * MEBIBYTE  # of a file of weights
LARGEST_MANIFEST = 1024 * MEBIBYTE  # some millions of tiles
# what torch and zipfile raise on bytes that are not what torch.save wrote
DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, LookupError,
    ValueError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
)  # fmt: skip


class CacheError(Exception):
    """A cache that is missing, unfinished, or made with other settings."""

    exit_code = 3


class TileError(Exception):
    """A tile's file whose content is not what the manifest promises; making it again repairs it."""

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


def write_manifest(manifest: Manifest, folder: Path) -> None:
    """Write manifest.json, with the checksum of what it says."""
    content = asdict(manifest)
    text = json.dumps(content | {"checksum": checksum_of(content)}, indent=2)
    write_artefact(folder / MANIFEST, f"{text}\n".encode())


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
    path = require_manifest(folder)
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
        raise CacheError(
            f"{path}: not a manifest ({error}); delete it and run prepare, which keeps tiles that "
            "were made with the settings it has then"
        ) from error


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


def claim(wanted: Manifest, folder: Path) -> Manifest:
    """The manifest found in a folder if it agrees with `wanted`; in an empty folder, `wanted`.

    A cache made with other settings is refused with each field that differs. Where the manifest is
    lost, tiles of a cache like `wanted` are this one's; with another file the folder is refused.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        others = [path for path in folder.glob("*.pt") if not may_be_of(path, wanted)]
        if others:
            raise CacheError(
                f"{folder}: holds no {MANIFEST}, but {others[0].name}, which is no tile of a cache "
                "with these settings; use an empty folder"
            )
        write_manifest(wanted, folder)
        return wanted
    found = read_manifest(folder)
    same_in(found, {name: each for name, each in asdict(wanted).items() if name not in PROGRESS},
            f"{folder}: this cache was made with",
            "set it back, delete the folder, or name another paths.processed_dir")  # fmt: skip
    return replace(found, class_names=wanted.class_names, class_colors=wanted.class_colors)


def may_be_of(path: Path, wanted: Manifest) -> bool:
    """Whether a file is a tile of a cache like this, of any scene, as far as it can be read."""
    if not PLACE.fullmatch(path.stem.rpartition("__")[2]):
        return False
    stamp = stamp_in(path)
    return stamp is None or stamp.partition(" ")[0] == wanted.fingerprint


def stamp_in(path: Path) -> str | None:
    """The stamp of a tile's file; None where it cannot be loaded."""
    if not path.is_file():
        return None
    try:
        content = load_tile(path, mmap=True)
    except TileError:
        return None
    found = content.get(STAMP, "") if isinstance(content, dict) else ""
    return found if isinstance(found, str) else ""


def same_in(found: Manifest, wanted: Mapping[str, Any], what: str, remedy: str) -> None:
    """Raise CacheError where a manifest has other values than `wanted`, with both of each field."""
    told = []
    for name, ours in wanted.items():
        theirs = getattr(found, name)
        if theirs != ours:
            made, given = differing(theirs, ours)
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


def tile_path(folder: Path, name: str) -> Path:
    """Where a tile's file lies."""
    return folder / f"{name}.pt"


def tile_names(folder: Path, manifest: Manifest) -> list[str]:
    """The cached tiles of the manifest's scenes, sorted, the same on every rank."""
    with os.scandir(folder) as entries:
        files = {each.name for each in entries if each.is_file()}
    return sorted(name for name in known_names(manifest) if f"{name}.pt" in files)


def known_names(manifest: Manifest) -> set[str]:
    """Every tile that the manifest's scenes may have."""
    return {
        f"{scene}__{tile.name}"
        for scene, about in manifest.scenes.items()
        for tile in tiles(about["height"], about["width"], manifest.tile_size)
    }


def write_tile(
    folder: Path,
    name: str,
    image: Tensor,
    label: Tensor,
    features: Tensor | Sequence[Tensor] = (),
    scales: Tensor | Sequence[Tensor] = (),
    stamp: str = "",
) -> None:
    """Write one tile's file; features and scales as one tensor or a list of levels.

    stamp: the manifest's, without which no reader takes the tile for one of its cache.
    """
    content = {STAMP: stamp, "image": alone(image), "label": alone(label)}
    if len(features):
        content["features"] = stored_maps(features)
    if len(scales):
        whole = scales if isinstance(scales, Tensor) else torch.stack(list(scales))
        content["scales"] = alone(whole)
    write_artefact(tile_path(folder, name), lambda file: torch.save(content, file))


def alone(tensor: Tensor) -> Tensor:
    """A tensor's values on the CPU, with a storage of their own: torch.save writes all of one.

    Nothing is copied where they lie one after another, as those of a tile of a batch do.

    >>> alone(torch.zeros(9, 512)[3]).untyped_storage().nbytes()
    2048
    """
    whole = tensor.cpu().contiguous()
    stored = whole.flatten().view(torch.uint8).numpy()  # NumPy has no bfloat16
    return torch.from_numpy(stored).view(whole.dtype).view(whole.shape)


def stored_maps(levels: Tensor | Sequence[Tensor]) -> Tensor:
    """Maps as files hold them: one tensor on the CPU, with a cell's channels side by side.

    >>> stored_maps([torch.zeros(384, 32, 32)] * 4).stride()
    (393216, 1, 12288, 384)
    """
    whole = levels if isinstance(levels, Tensor) else torch.stack(list(levels))
    return alone(whole.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def load_tile(path: Path, mmap: bool = False, content: bytes | None = None) -> dict[str, Any]:
    """A tile's tensors; content that cannot be loaded is a TileError, a failing read an OSError.

    content: the file's bytes, where they were read already.
    """
    try:
        if content is not None:
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return patiently(partial(_load_stored, path, mmap), path)
    except OSError as error:
        if error.errno != errno.EINVAL:  # torch seeks for the directory that a cut file lacks
            raise
        raise TileError(f"{path.name}: cannot be loaded (cut short)") from error
    except DAMAGE as error:
        raise TileError(f"{path.name}: cannot be loaded ({reason_of(error, path)})") from error


def _load_stored(path: Path, mmap: bool) -> dict[str, Any]:
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        check_members(archive, os.fstat(file.fileno()).st_size)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def plain_bytes(path: Path, most: int) -> bytes:
    """A file's bytes, read patiently; ValueError where it is no plain file, or larger than that."""
    return patiently(partial(limited_bytes, path, most), path)


def load_plain(path: Path) -> Any:
    """What torch.save wrote to a file of weights, once every byte met its checksum.

    Raises ValueError with the reason where it cannot be had, OSError where the read fails.
    """
    try:
        stored = plain_bytes(path, LARGEST)  # what fails from here on is the content's fault
        content = torch.load(checked_zip(stored), map_location="cpu", weights_only=True)
        check_whole(content)
    except DAMAGE as error:
        raise ValueError(reason_of(error, path)) from error
    return content


def reason_of(error: Exception, path: Path) -> str:
    """Why content cannot be loaded, in a line; torch tells a want of memory in words only.

    >>> reason_of(ValueError("checksum of data/0 is wrong"), Path("tile.pt"))
    'checksum of data/0 is wrong'
    """
    reason = str(error).partition("\n")[0]
    if "allocate memory" in reason:
        raise MemoryError(f"{path}: {reason}") from error
    return reason[:120]


def check_whole(content: Any) -> None:
    """Raise ValueError where a tensor has more values than its memory, as an expanded one has.

    >>> check_whole({"weight": [torch.zeros(1).expand(9, 9)]})
    Traceback (most recent call last):
    ValueError: a tensor of 81 values is stored as 1
    """
    if isinstance(content, Tensor):
        stored = content.untyped_storage().nbytes() // content.element_size()
        if content.numel() > stored:
            raise ValueError(f"a tensor of {content.numel()} values is stored as {stored}")
    elif isinstance(content, Mapping):
        check_whole(list(content.values()))
    elif isinstance(content, list | tuple):
        for each in content:
            check_whole(each)


def check_bytes(path: Path, manifest: Manifest) -> bytes:
    """A tile's bytes, once they met their checksums; TileError where they do not."""
    try:
        stored = plain_bytes(path, 2 * manifest.tile_bytes + (1 << 20))
        checked_zip(stored)  # what fails from here on is the content's fault, not the disk's
    except ValueError as error:
        raise TileError(f"{path.name}: {error}") from error
    except DAMAGE as error:
        raise TileError(f"{path.name}: not a whole file ({error})") from error
    return stored


def check_tile(path: Path, manifest: Manifest) -> None:
    """Raise TileError where a tile's file is not exactly what the manifest promises."""
    stored = check_bytes(path, manifest)
    content = load_tile(path, content=stored)
    check_layout(path.name, content, manifest)
    for part in ("features", "scales"):
        for number, level in enumerate(content.get(part, ())):
            if not torch.isfinite(level).all():
                raise TileError(f"{path.name}: {part}[{number}] are not finite")


def check_layout(name: str, content: Any, manifest: Manifest) -> None:
    """Raise TileError where keys, shapes, dtypes or label values are not the manifest's."""
    check_shapes(name, content, manifest)
    label = content["label"][content["label"] != manifest.ignore_index]
    if label.numel() and not 0 <= int(label.min()) <= int(label.max()) < manifest.num_classes:
        raise TileError(f"{name}: label values outside 0..{manifest.num_classes - 1}")


def check_shapes(name: str, content: Any, manifest: Manifest) -> None:
    """Raise TileError where keys, shapes, dtypes, layout in memory or stamp are not the manifest's;
    values are not read.
    """
    if not isinstance(content, dict) or set(content) - {STAMP} != set(manifest.parts):
        raise TileError(f"{name}: keys are not {', '.join(manifest.parts)}")
    size, cells = manifest.tile_size, manifest.tile_size // manifest.patch_size
    _check_tensor(name, "image", content["image"], (len(manifest.bands), size, size), torch.uint8)
    _check_tensor(name, "label", content["label"], (size, size), manifest.label_dtype)
    maps = len(manifest.views) * len(manifest.layers)
    kinds = {
        "features": ((manifest.channels, cells, cells), FEATURE_DTYPES[manifest.feature_dtype]),
        "scales": ((2, manifest.channels), torch.float32),
    }
    for part, (shape, dtype) in kinds.items():
        if part in content:
            _check_tensor(name, part, content[part], (maps, *shape), dtype)
    found, wanted = content.get(STAMP), manifest.stamp_of(name.removesuffix(".pt"))
    if found != wanted:
        raise TileError(f"{name}: of another cache or place: stamp {found!r}, expected {wanted!r}")


def _check_tensor(
    name: str, part: str, found: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if not isinstance(found, Tensor) or tuple(found.shape) != shape or found.dtype != dtype:
        what = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found)
        raise TileError(f"{name}: {part} is {what}, expected {shape} {dtype}")
    laid = found.permute(0, 2, 3, 1) if part == "features" else found
    if found.layout != torch.strided or not laid.is_contiguous():
        raise TileError(f"{name}: {part} does not lie in memory as it is written")


def drop_changed(found: Manifest, scenes: dict[str, dict[str, Any]], folder: Path) -> list[str]:
    """Delete the tiles of scenes that changed since they were cached; return those scenes.

    A scene that the manifest does not know may have tiles too: it was taken away and came back. As
    it was, they are kept.
    """
    now = replace(found, scenes=scenes, complete=False)
    changed = {name for name in scenes if found.scenes.get(name) != scenes[name]}
    stale = [
        path
        for path in folder.glob("*.pt")
        if scene_of(path.stem) in changed
        and PLACE.fullmatch(path.stem.rpartition("__")[2])
        and stamp_in(path) != now.stamp_of(path.stem)
    ]
    for path in stale:
        path.unlink()
    write_manifest(now, folder)
    return sorted({scene_of(path.stem) for path in stale})
