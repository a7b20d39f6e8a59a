"""Labels on disk, read on a scene's own pixel grid.

The label raster may lie in any CRS, at any resolution, offset or rotation, and cover the scene in
part: GDAL's warper reads it nearest-neighbour on the scene's grid, window by window.
"""

import contextlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np
from rasterio.crs import CRS
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window
from shapely.geometry import Polygon, box

from utils.raster import (
    BLOCK,
    Grid,
    RasterError,
    Scene,
    check_structure,
    clip,
    grid_of,
    open_raster,
    pad,
    warp_outline,
)
from utils.tiling import Tile

# pixels; GDAL's default of 0.125 makes a label depend on the window it is read by
WARP_TOLERANCE = 1e-6


class Labels:
    """A label raster on a scene's grid: the same tile gives the same pixels.

    Read nearest-neighbour and exact at every window; what the label raster does not cover is
    `ignore_index`.
    """

    def __init__(
        self,
        path: Path,
        scene: Scene,
        source: DatasetReader,
        ignore_index: int,
        masked: bool = False,
    ) -> None:
        self.path = path
        self.grid = scene.grid
        self.ignore_index = ignore_index
        self._source = source
        self._masked = masked  # whether the source's own mask is still to be applied

    def read(self, tile: Tile) -> np.ndarray:
        """Class ids of a tile, (height, width) int32; ignore_index past the scene's border."""
        window = clip(tile, self.grid)
        try:
            values = self._source.read(1, window=window)
            valid = self._source.read_masks(1, window=window) > 0 if self._masked else True
        except RasterioError as error:
            cause = error.__cause__ or error
            raise RasterError(f"{self.path}: cannot read tile {tile.name} ({cause})") from error
        ids = as_ids(values, self.ignore_index, self.path)
        ids = np.where(valid, ids, self.ignore_index)
        return pad(ids, tile, "constant", constant_values=self.ignore_index)


def as_ids(values: np.ndarray, ignore_index: int, path: Path) -> np.ndarray:
    """Label values as int32; NaN is ignore, any other broken number an error.

    >>> as_ids(np.array([[1.0, np.nan]]), 255, Path("label.tif")).tolist()
    [[1, 255]]
    """
    if values.dtype.kind == "f":
        values = np.where(np.isnan(values), ignore_index, values)
        if not np.array_equal(values, np.rint(values)):
            broken = values[values != np.rint(values)][0]
            raise RasterError(f"{path}: holds {broken:g}, labels are whole class numbers")
    return np.clip(values, -(2**31), 2**31 - 1).astype(np.int32)


@contextlib.contextmanager
def open_labels(path: Path, scene: Scene, num_classes: int, ignore_index: int) -> Iterator[Labels]:
    """Open a label raster on a scene's grid, whatever its own CRS, resolution or extent."""
    with _open_label_source(path) as dataset:
        own = grid_of(dataset)
        _check_places(path, own, scene)
        if not own.georeferenced:
            masked = not _mask_hides_a_class(dataset, num_classes)
            yield Labels(path, scene, dataset, ignore_index, masked)
            return
        options = {"src_nodata": None} if nodata_is_a_class(dataset, num_classes) else {}
        with WarpedVRT(
            dataset,
            crs=scene.grid.crs,
            transform=scene.grid.transform,
            height=scene.grid.height,
            width=scene.grid.width,
            resampling=Resampling.nearest,
            nodata=ignore_index,
            tolerance=WARP_TOLERANCE,
            **options,
        ) as twin:
            yield Labels(path, scene, twin, ignore_index)


@contextlib.contextmanager
def _open_label_source(path: Path) -> Iterator[DatasetReader]:
    if not path.exists():
        raise RasterError(f"{path}: no such file (paths.label_path)")
    check_structure(path)
    with open_raster(path) as dataset:
        if dataset.count != 1:
            raise RasterError(f"{path}: has {dataset.count} bands, a label raster has one")
        yield dataset


def nodata_is_a_class(dataset: DatasetReader, num_classes: int) -> bool:
    """Whether the value a label raster declares as nodata is one of the class numbers."""
    return dataset.nodata is not None and dataset.nodata in range(num_classes)


def _mask_hides_a_class(dataset: DatasetReader, num_classes: int) -> bool:
    by_nodata = MaskFlags.nodata in dataset.mask_flag_enums[0]
    return by_nodata and nodata_is_a_class(dataset, num_classes)


def _check_places(path: Path, own: Grid, scene: Scene) -> None:
    """Refuse a label raster that cannot be laid over the scene."""
    theirs = scene.grid
    if own.georeferenced != theirs.georeferenced:
        without, has = (scene.path, path) if own.georeferenced else (path, scene.path)
        raise RasterError(
            f"{without}: has no CRS or transform, while {has} has both; georeference it with "
            "gdal_translate -a_srs EPSG:CODE -a_ullr ULX ULY LRX LRY"
        )
    if not own.georeferenced and (own.height, own.width) != (theirs.height, theirs.width):
        raise RasterError(
            f"{path}: {own.height}×{own.width} pixels without georeference, the scene "
            f"{scene.path.name} has {theirs.height}×{theirs.width}; both must have the same"
        )


def covered_share(path: Path, scene: Scene) -> float:
    """The share of the scene that the label raster's outline covers; nothing is an error."""
    with _open_label_source(path) as dataset:
        own = grid_of(dataset)
        _check_places(path, own, scene)
        if not own.georeferenced:
            return 1.0
        footprint = warp_outline(scene.grid.footprint(), scene.grid.crs, own.crs)
        share = footprint.intersection(own.footprint()).area / footprint.area
    if share <= 0:
        raise RasterError(
            f"{path}: no overlap with {scene.path}: the labels cover {_extent(own)}, "
            f"the scene {_extent(scene.grid)}"
        )
    return min(1.0, share)


def _extent(grid: Grid) -> str:
    """Bounds in degrees, so that two CRSs can be compared at a glance."""
    west, south, east, north = warp_outline(grid.footprint(), grid.crs, CRS.from_epsg(4326)).bounds
    return f"{west:.5f}..{east:.5f} E, {south:.5f}..{north:.5f} N"


def label_histogram(labels: Labels) -> dict[int, int]:
    """How many pixels of the scene have which label value."""
    counts: dict[int, int] = {}
    height, width = labels.grid.height, labels.grid.width
    for row, col in product(range(0, height, BLOCK), range(0, width, BLOCK)):
        window = clip(Tile(row, col, BLOCK, BLOCK), labels.grid)
        tile = Tile(row, col, window.height, window.width)
        for value, count in zip(*np.unique(labels.read(tile), return_counts=True), strict=True):
            counts[int(value)] = counts.get(int(value), 0) + int(count)
    return counts


def label_nodata_class(path: Path, num_classes: int) -> int | None:
    """The class number that the label raster also declares as nodata, if there is one."""
    with _open_label_source(path) as dataset:
        return int(dataset.nodata) if nodata_is_a_class(dataset, num_classes) else None


def source_values(path: Path, scene: Scene) -> set[int]:
    """Label values in the part of the label raster around the scene, read on its own grid.

    Cheap next to warping, and a superset of what the scene's grid can show.
    """
    with _open_label_source(path) as dataset:
        own = grid_of(dataset)
        whole = box(0, 0, own.width, own.height)
        if own.georeferenced:
            outline = warp_outline(scene.grid.footprint(), scene.grid.crs, own.crs)
            inverse = ~own.transform
            outline = Polygon([inverse @ point for point in outline.exterior.coords])
            whole = outline.buffer(2).intersection(whole)
        if whole.is_empty:
            return set()
        left, top, right, bottom = (int(bound) for bound in whole.bounds)
        values: set[int] = set()
        for row in range(top, bottom + 1, BLOCK):
            rows = min(BLOCK, min(bottom + 1, own.height) - row)
            window = Window(left, row, min(right + 1, own.width) - left, rows)
            if rows > 0 and window.width > 0:
                block = as_ids(dataset.read(1, window=window), -1, path)
                values.update(int(value) for value in np.unique(block))
        nodata = dataset.nodata
    return values - ({int(nodata)} if nodata is not None and np.isfinite(nodata) else set())
