"""Which files are scenes, which of their bands are read, and what their values mean."""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.opening import RasterError, RefusedError, check_structure, open_raster
from utils.raster import Reading, is_alpha, open_scene

SIDECARS = (
    ".msk", ".ovr", ".aux.xml", ".tfw", ".wld", ".prj", ".tmp", ".dbf", ".shx", ".cpg", ".qix",
    ".sbn", ".sbx", ".qmd", ".qml", ".gpkg-wal", ".gpkg-shm",
)  # fmt: skip
SAMPLED = 2**22  # pixels of all scenes together from which value ranges are taken


def default_bands(path: Path) -> tuple[int, ...]:
    """The first three bands of a raster, or its only one; a band of opacity is none."""
    with open_raster(path) as dataset:
        bands = tuple(band for band in dataset.indexes if not is_alpha(dataset, band))
    if len(bands) not in (0, 2):
        return bands[:3]
    raise RasterError(f"{path}: has {len(bands)} bands; set dataset.bands and dataset.rgb")


def band_ranges(
    paths: Sequence[Path], bands: tuple[int, ...], wanted: Any, nodata: float | None
) -> tuple[tuple[float, float], ...]:
    """The value range of each band that becomes 0..255, for `dataset.input_range`.

    auto: 0..255 where every scene is uint8, else the 1st and 99th percentile of each band over the
    scenes' valid pixels, from strided reads. dtype: what the type can hold (floats: 0..1).
    """
    if not isinstance(wanted, str):
        pairs = pair_of_each(wanted, len(bands))
        if len(pairs) != len(bands):
            raise RasterError(
                f"dataset.input_range: {len(pairs)} pairs for {len(bands)} bands; give one pair or "
                "one for each"
            )
        return pairs
    kinds: set[np.dtype] = set()
    for path in paths:
        with open_scene(path, Reading(bands, (), nodata)) as scene:
            kinds |= scene.dtypes
    if wanted == "auto" and kinds != {np.dtype("uint8")}:
        return _percentiles(paths, bands, nodata)
    if len(kinds) > 1:
        names = ", ".join(sorted(str(kind) for kind in kinds))
        raise RasterError(f"dataset.input_range: dtype, but scenes are {names}; give numbers")
    return (type_range(kinds.pop()),) * len(bands)


def pair_of_each(wanted: Any, bands: int) -> tuple[tuple[float, float], ...]:
    """The pairs that `dataset.input_range` has, where there is one, as often as there are bands.

    >>> pair_of_each((0, 3000), 2) == pair_of_each(((0, 3000),), 2) == ((0, 3000), (0, 3000))
    True
    """
    pairs = wanted if isinstance(wanted[0], tuple) else (wanted,)
    return pairs * bands if len(pairs) == 1 else pairs


def type_range(kind: np.dtype) -> tuple[float, float]:
    """The smallest and largest value of an integer type; 0 and 1 for floats.

    >>> type_range(np.dtype("uint16")), type_range(np.dtype("float32"))
    ((0.0, 65535.0), (0.0, 1.0))
    """
    if kind.kind == "f":
        return 0.0, 1.0
    return float(np.iinfo(kind).min), float(np.iinfo(kind).max)


def _percentiles(
    paths: Sequence[Path], bands: tuple[int, ...], nodata: float | None
) -> tuple[tuple[float, float], ...]:
    side = min(512, max(32, int((SAMPLED / len(paths)) ** 0.5)))
    samples = []
    for path in paths:
        with open_scene(path, Reading(bands, (), nodata)) as scene:
            samples.append(scene.sample(side))
    values = np.concatenate(samples, axis=1)
    if values.shape[1] == 0:
        raise RasterError(f"{paths[0]}: no scene has a valid pixel; set dataset.input_range")
    low, high = np.percentile(values, (1, 99), axis=1)
    least = 1e-6 * np.maximum(np.abs(low), 1)  # a band of one value has a range too, in float32
    high = np.maximum(high, low + least)
    return tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))


class SceneFile(NamedTuple):
    """A scene's unique name, after which its tiles are called, and its file."""

    name: str
    path: Path


def find_scenes(
    sources: Path | Sequence[Path],
    key: str = "paths.raw_images_dir",
    except_in: Sequence[Path] = (),
) -> tuple[list[SceneFile], list[tuple[Path, str]]]:
    """The rasters that files, folders (searched in depth) and patterns name, sorted by name.

    Also the other files with the reason they are none; sidecar files (masks, overviews, world
    files) are passed over in silence. A scene is called after its file's stem, one in a subfolder
    after its path below the folder (`2021/north.tif` is 2021__north), and scenes of one name after
    as many folders more as tell them apart. What lies in the folders `except_in` is passed over.
    """
    depths: dict[Path, int] = {}
    skipped: list[tuple[Path, str]] = []
    for source in [sources] if isinstance(sources, Path) else sources:
        for depth, path in files_of(source, key):
            if path != source and any(path.is_relative_to(place) for place in except_in):
                continue
            try:
                with open_raster(path):
                    depths.setdefault(path, depth)
            except RefusedError:
                raise
            except RasterError as error:
                check_structure(path)  # a damaged TIFF is data that is missing: not to be skipped
                if path == source:
                    raise
                skipped.append((path, str(error).removeprefix(f"{path}: ")))
    return sorted(told_apart(depths)), skipped


def told_apart(depths: dict[Path, int]) -> list[SceneFile]:
    """Scenes called after so many last parts of their paths, and more where two names are one.

    >>> [scene.name for scene in told_apart({Path("may/north.tif"): 1, Path("june/north.tif"): 1})]
    ['may__north', 'june__north']
    """
    places: dict[str, list[Path]] = {}
    for path, depth in depths.items():
        places.setdefault("__".join(path.with_suffix("").parts[-depth:]), []).append(path)
    shared = {path for paths in places.values() for path in paths if len(paths) > 1}
    if not shared:
        return [SceneFile(name, path) for name, (path,) in places.items()]
    for path in shared:
        twins = [other for other in shared if other.with_suffix("") == path.with_suffix("")]
        if len(twins) > 1:
            first, second = sorted(twins)[:2]
            raise RasterError(f"{second}: named like {first}, as its tiles would be; rename it")
    return told_apart({path: depth + (path in shared) for path, depth in depths.items()})


def files_of(source: Path, key: str) -> Iterator[tuple[int, Path]]:
    """The files that one source stands for, and how many of their paths' last parts name them."""
    paths, root = [source], source if source.is_dir() else source.parent
    if not source.exists():
        root = Path(*takewhile(lambda part: not set(part) & set("*?["), source.parts))
        paths = sorted(root.glob(str(source.relative_to(root)))) if root.is_dir() else []
        if not paths:
            raise RasterError(f"{source}: no such file or folder ({key})")
    for path in paths:
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            parts = file.relative_to(root).parts
            hidden = any(part.startswith(".") for part in parts)
            if file.is_file() and not hidden and not file.name.lower().endswith(SIDECARS):
                yield len(parts), file
