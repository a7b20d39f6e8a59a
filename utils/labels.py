"""Labels on disk, read on a scene's own pixel grid.

Rasters are read by `utils.label_rasters`, and polygons are burnt on the same windows. Where several
files cover a pixel, the first one listed counts.
"""

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch.nn.functional as F
from torch import from_numpy

from utils.burning import burn
from utils.grids import Grid, extent_of, extent_of_outline
from utils.label_rasters import raster_source
from utils.label_values import UNCOVERED, UNLISTED, LabelRules, class_of_shape
from utils.opening import RasterError, check_structure, file_identity, is_raster, stat_of
from utils.raster import Scene, clip, pad
from utils.scenes import files_of
from utils.tiling import Tile
from utils.vectors import Shapes, is_vector, outline_in, read_shapes, value_key

LARGEST_ID = 65536  # above every class id


def find_labels(sources: Path | Sequence[Path]) -> list[Path]:
    """The label files that files, folders and patterns name, in the order they are listed."""
    found: list[Path] = []
    for source in [sources] if isinstance(sources, Path) else sources:
        paths = [path for _, path in files_of(source, "paths.label_path")]
        usable = [path for path in paths if path == source or is_vector(path) or is_raster(path)]
        for path in set(paths) - set(usable):
            check_structure(path)  # a damaged TIFF is labels that are missing: not to be skipped
        if not usable:
            raise RasterError(f"{source}: holds no label file (paths.label_path)")
        found += [path for path in usable if path not in found]
    return found


def labels_identity(paths: Sequence[Path]) -> dict[str, dict[str, int]]:
    """What tells that the label files are still the ones that were read, in their order."""
    identity = {}
    for number, path in enumerate(paths):
        parts = sorted(path.parent.glob(f"{path.stem}.*")) if path.suffix == ".shp" else [path]
        found = stat_of(parts) if is_vector(path) else file_identity(path)
        identity[f"{number} {path.name}"] = found
    return identity


class Source(Protocol):
    """One label file on a scene's grid."""

    path: Path

    def read(self, tile: Tile) -> np.ndarray:
        """Class ids (rows, cols) int32 of the part of a tile inside the scene, or UNCOVERED."""


class VectorSource:
    """Polygons in the scene's CRS, burnt on demand."""

    def __init__(self, path: Path, grid: Grid, shapes: Shapes, rules: LabelRules) -> None:
        self.path, self.grid, self.rules, self.shapes = path, grid, rules, shapes
        self._ids = [class_of_shape(value, rules) for value in shapes.values]

    def met(self) -> Counter[str]:
        """How many polygons on the scene have each value."""
        here = self.shapes.tree.query(self.grid.footprint(), predicate="intersects")
        return Counter(value_key(self.shapes.values[number]) for number in here)

    def read(self, tile: Tile) -> np.ndarray:
        window = clip(tile, self.grid)
        inside = Tile(tile.row, tile.col, window.height, window.width)
        return burn(self.shapes, self._ids, self.grid, inside, UNCOVERED, self.rules.all_touched)


class Labels:
    """All label files that meet a scene: the same tile gives the same pixels.

    What no file covers is `ignore_index`, or the background where polygons are among the files.
    """

    def __init__(self, scene: Scene, sources: Sequence[Source], rules: LabelRules) -> None:
        self.grid = scene.grid
        self.sources = list(sources)
        self.rules = rules
        self.ignore_index = rules.ignore_index
        burnt = any(isinstance(source, VectorSource) for source in sources)
        self._rest = rules.background if burnt else None

    def read(self, tile: Tile) -> np.ndarray:
        """Class ids of a tile, (height, width) int32; ignore_index past the scene's border."""
        margin = self.rules.erode_borders
        row, col = max(0, tile.row - margin), max(0, tile.col - margin)
        below, right = tile.row + tile.height + margin, tile.col + tile.width + margin
        ids = self._merged(Tile(row, col, below - row, right - col))
        if margin:
            ids = without_borders(ids, margin, self.ignore_index)
        ids = ids[tile.row - row :, tile.col - col :][: tile.height, : tile.width]
        return pad(ids, tile, "constant", constant_values=self.ignore_index)

    def _merged(self, tile: Tile) -> np.ndarray:
        ids = self.sources[0].read(tile)
        for source in self.sources[1:]:
            open_pixels = ids == UNCOVERED
            if open_pixels.any():
                ids = np.where(open_pixels, source.read(tile), ids)
        if ids.min() >= 0:
            return ids
        if ids.min() == UNLISTED:
            raise RasterError(f"{self.sources[0].path}: values that are no class in {tile.name}")
        rest = self.ignore_index if self._rest is None else self._rest
        ids[ids == UNCOVERED] = rest
        return ids


def without_borders(ids: np.ndarray, pixels: int, ignore_index: int) -> np.ndarray:
    """Class ids with `ignore_index` within some pixels of where two classes meet.

    >>> without_borders(np.array([[0, 0, 0, 1, 1, 1]]), 1, 255).tolist()
    [[0, 0, 255, 255, 1, 1]]
    """
    known = ids != ignore_index
    size = 2 * pixels + 1

    def highest(values: np.ndarray) -> np.ndarray:
        grown = from_numpy(values)[None].float()
        for kernel, padding in (((size, 1), (pixels, 0)), ((1, size), (0, pixels))):
            grown = F.max_pool2d(grown, kernel, stride=1, padding=padding)
        return grown[0].numpy()

    top = highest(np.where(known, ids, -1))
    bottom = -highest(np.where(known, -ids, -LARGEST_ID))
    return np.where(known & (top != bottom), ignore_index, ids).astype(np.int32)


@contextlib.contextmanager
def open_labels(paths: Sequence[Path], scene: Scene, rules: LabelRules) -> Iterator[Labels]:
    """Open every label file that meets the scene, on the scene's grid; none at all is an error."""
    with contextlib.ExitStack() as stack:
        sources, elsewhere = [], []
        for path in paths:
            opener = vector_source if is_vector(path) else raster_source
            source, extent = stack.enter_context(opener(path, scene, rules))
            if source is None:
                elsewhere.append(f"{path} covers {extent}")
            else:
                sources.append(source)
        if not sources:
            raise RasterError(
                f"{scene.path}: no overlap with the labels: the scene covers "
                f"{extent_of(scene.grid)}; {'; '.join(elsewhere)}"
            )
        yield Labels(scene, sources, rules)


@contextlib.contextmanager
def vector_source(
    path: Path, scene: Scene, rules: LabelRules
) -> Iterator[tuple[VectorSource | None, str]]:
    """Polygons on a scene's grid, or None and their extent where they lie elsewhere."""
    if not scene.grid.georeferenced:
        raise RasterError(f"{scene.path}: has no CRS or transform, which labels in {path} need")
    shapes = read_shapes(path, rules.attribute, rules.layer)
    here = shapes.to(scene.grid.crs, scene.grid)
    if len(here) and here.tree.query(scene.grid.footprint()).size:
        yield VectorSource(path, scene.grid, here, rules), ""
    else:
        yield None, extent_of_outline(outline_in(shapes), shapes.crs)


def check_values(labels: Labels, scene: Scene, tiles: Sequence[Tile]) -> None:
    """Refuse values on the scene that are no class, with a histogram of what was met."""
    for source in labels.sources:
        if isinstance(source, VectorSource):
            met, unit = source.met(), "polygons"
            unlisted = [v for v in met if class_of_shape(v, labels.rules) == UNLISTED]
        else:
            unit, unlisted = "pixels", source.unlisted_around(scene.grid)
            met = source.met(tiles) if unlisted else Counter()
            unlisted = [v for v in met if labels.rules.id_of(v) == UNLISTED]
        if unlisted:
            raise RasterError(_unlisted(source.path, scene, unlisted, met, unit))


def _unlisted(path: Path, scene: Scene, unlisted: list, met: Counter, unit: str) -> str:
    pairs = sorted(met.items(), key=lambda pair: (-pair[1], str(pair[0])))[:20]
    histogram = ", ".join(f"{json.dumps(v, ensure_ascii=False)}: {count}" for v, count in pairs)
    first = json.dumps(max(unlisted, key=met.__getitem__), ensure_ascii=False)
    return (
        f"{path}: {len(unlisted)} value(s) on scene {scene.name} are no class, first {first}; "
        f"{unit} per value: {{{histogram}}}; add - {{name: NAME, values: [{first}]}} to "
        "dataset.classes, correct model.num_classes, or set dataset.labels.unlisted: ignore"
    )
