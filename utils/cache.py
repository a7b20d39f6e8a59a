"""The tiles of a cache on disk: one `.pt` file each, and what makes it sound.

A tile's file holds `{image, features, label}`: image (bands, S, S) uint8 as read and scaled,
features (maps, channels, S/16, S/16) in channels-last memory, level by level of one view after the
other, label (S, S) class ids; with int8 features also `scales` (maps, 2, channels) float32. A cache
of tiles holds image and label only, and training computes the features. Each file carries a stamp:
the cache, the tile and the state of its sources that it was made for; with another stamp it is not
used. What a cache is, its manifest says (`utils.manifest`).
"""

import errno
import io
import math
import mmap as mapping
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from utils.archives import DAMAGE, check_members, checked_zip, reason_of
from utils.artefacts import patiently, plain_bytes, write_artefact
from utils.claims import FEATURE_DTYPES
from utils.manifest import (
    MANIFEST,
    PROGRESS,
    CacheError,
    Manifest,
    known_names,
    read_manifest,
    same_in,
    scene_of,
    write_manifest,
)

STAMP = "stamp"
PLACE = re.compile(r"r[0-9]{6,}_c[0-9]{6,}")  # of a tile, as its name ends


class TileError(Exception):
    """A tile's file whose content is not what the manifest promises; making it again repairs it."""

    exit_code = 3


def claim(wanted: Manifest, folder: Path) -> Manifest:
    """The manifest found in a folder if it agrees with `wanted`; in an empty folder, `wanted`.

    A cache made with other settings is refused with each field that differs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MANIFEST).exists():
        if any(folder.glob("*.pt")):
            raise CacheError(f"{folder}: holds .pt files but no {MANIFEST}; use an empty folder")
        write_manifest(wanted, folder)
        return wanted
    found = read_manifest(folder)
    same_in(found, {name: each for name, each in asdict(wanted).items() if name not in PROGRESS},
            f"{folder}: this cache was made with",
            "set it back, delete the folder, or name another paths.processed_dir")  # fmt: skip
    return replace(found, class_names=wanted.class_names, class_colors=wanted.class_colors)


def stamp_in(path: Path) -> Any:
    """The stamp of a tile's file; None where it has none, or cannot be loaded."""
    if not path.is_file():
        return None
    try:
        content = load_tile(path, mmap=True)
    except TileError:
        return None
    return content.get(STAMP) if isinstance(content, dict) else None


def tile_path(folder: Path, name: str) -> Path:
    """Where a tile's file lies."""
    return folder / f"{name}.pt"


def tile_names(folder: Path, manifest: Manifest) -> list[str]:
    """The cached tiles of the manifest's scenes, sorted, the same on every rank."""
    with os.scandir(folder) as entries:
        files = {each.name for each in entries if each.is_file()}
    return sorted(name for name in known_names(manifest) if f"{name}.pt" in files)


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
    write_artefact(tile_path(folder, name), lambda file: torch.save(content, file), direct=True)


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


def load_tile(
    path: Path, mmap: bool = False, content: bytes | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """A tile's tensors; content that cannot be loaded is a TileError, a failing read an OSError.

    content: the file's bytes, where they were read and met their checksums already; device: "meta"
    for tensors without values, that know where in the file theirs are.
    """
    try:
        if content is not None:
            return torch.load(io.BytesIO(content), map_location=device, weights_only=True)
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


class Places(NamedTuple):
    """Where a tile's parts lie in its file, and which state of the file that is true of.

    offsets: bytes, of the manifest's parts in their order.
    """

    state: tuple[int, ...]
    offsets: tuple[int, ...]


def places_in(path: Path, manifest: Manifest) -> Places:
    """Where a tile's parts lie, once its bytes met their checksums and are what the manifest
    promises; TileError where they are not.
    """
    state = _state_of(patiently(path.stat, path))  # before its bytes: one written meanwhile differs
    stored = check_bytes(path, manifest)
    content = load_tile(path, content=stored, device="meta")
    check_shapes(path.name, content, manifest)
    offsets = []
    for part in manifest.parts:
        memory = content[part].untyped_storage()
        offsets.append(memory._checkpoint_offset)
        if memory.nbytes() != content[part].nbytes or offsets[-1] + memory.nbytes() > len(stored):
            raise TileError(f"{path.name}: {part} does not lie in memory as it is written")
    return Places(state, tuple(offsets))


def map_tile(path: Path, manifest: Manifest, places: Places) -> dict[str, Tensor] | None:
    """A tile's tensors as they lie on the disk: what is not looked at is not read. None where the
    file is no longer the one that `places` is true of.

    Nothing is unpickled, which would take fifteen times as long and keep other threads waiting.
    """
    memory = patiently(partial(_mapped, path, places.state), path)
    if memory is None:
        return None
    content, layout = {}, layout_of(manifest).items()
    for (part, (shape, dtype)), offset in zip(layout, places.offsets, strict=True):
        flat = torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=offset)
        if part == "features":
            maps, channels, rows, cols = shape
            content[part] = flat.view(maps, rows, cols, channels).permute(0, 3, 1, 2)
        else:
            content[part] = flat.view(shape)
    return content


def _mapped(path: Path, state: tuple[int, ...]) -> mapping.mmap | None:
    with path.open("rb") as file:
        if _state_of(os.fstat(file.fileno())) != state:
            return None
        return mapping.mmap(file.fileno(), 0, access=mapping.ACCESS_COPY)  # or torch warns


def _state_of(found: os.stat_result) -> tuple[int, ...]:
    return found.st_ino, found.st_size, found.st_mtime_ns


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
    for part, (shape, dtype) in layout_of(manifest).items():
        _check_tensor(name, part, content[part], shape, dtype)
    found, wanted = content.get(STAMP), manifest.stamp_of(name.removesuffix(".pt"))
    if found != wanted:
        raise TileError(f"{name}: of another cache or place: stamp {found!r}, expected {wanted!r}")


def layout_of(manifest: Manifest) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """The shape and type of each part of a tile's file."""
    size, cells = manifest.tile_size, manifest.tile_size // manifest.patch_size
    maps, channels = len(manifest.views) * len(manifest.layers), manifest.channels
    every = {
        "image": ((len(manifest.bands), size, size), torch.uint8),
        "features": ((maps, channels, cells, cells), FEATURE_DTYPES[manifest.feature_dtype]),
        "label": ((size, size), manifest.label_dtype),
        "scales": ((maps, 2, channels), torch.float32),
    }
    return {part: every[part] for part in manifest.parts}


def _check_tensor(
    name: str, part: str, found: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if not isinstance(found, Tensor) or tuple(found.shape) != shape or found.dtype != dtype:
        what = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found)
        raise TileError(f"{name}: {part} is {what}, expected {shape} {dtype}")
    if found.is_meta and found.untyped_storage()._checkpoint_offset is None:
        raise TileError(f"{name}: {part} has no values")
    laid = found.permute(0, 2, 3, 1) if part == "features" else found
    if found.layout != torch.strided or not laid.is_contiguous():
        raise TileError(f"{name}: {part} does not lie in memory as it is written")


def drop_changed(
    found: Manifest, scenes: dict[str, dict[str, Any]], folder: Path,
    beating: Callable[[list[Path]], Iterable[Path]] = iter,
) -> list[str]:  # fmt: skip
    """Delete the tiles of scenes that changed since they were cached; return those scenes.

    A scene that the manifest does not know may have tiles too: it was taken away and came back. As
    it was, they are kept. beating: gives signs of life while these are looked at.
    """
    now = replace(found, scenes=scenes, complete=False)
    changed = {name for name in scenes if found.scenes.get(name) != scenes[name]}
    theirs = [
        path
        for path in folder.glob("*.pt")
        if scene_of(path.stem) in changed and PLACE.fullmatch(path.stem.rpartition("__")[2])
    ]
    stale = [
        path
        for path in beating(theirs)
        if scene_of(path.stem) in found.scenes or stamp_in(path) != now.stamp_of(path.stem)
    ]
    for path in stale:
        path.unlink()
    write_manifest(now, folder)
    return sorted({scene_of(path.stem) for path in stale})
