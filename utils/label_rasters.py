"""Label rasters on a scene's own pixel grid, nearest neighbour, window by window.

They may lie in any CRS, at any resolution, offset or rotation, and cover the scene in part.
"""

import contextlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
from rasterio.enums import MaskFlags, Resampling
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window
from shapely.geometry import Polygon, box

from utils.grids import NO_PLACE, Grid, extent_of, overlap, warp_outline
from utils.label_values import (
    HOLE,
    UNCOVERED,
    UNLISTED,
    LabelRules,
    hole_in,
    ids_by_table,
    value_table,
    whole_numbers,
)
from utils.opening import RasterError, check_structure, grid_of, open_raster, told_by
from utils.raster import Scene, clip
from utils.tiling import Tile, repeated
from utils.vectors import is_vector, value_key
from utils.warping import Overlay, Stored, gather

# pixels; GDAL's default of 0.125 makes a label depend on the window it is read by
WARP_TOLERANCE = 1e-6
STRIP = 256  # rows of a label raster looked at at once


class RasterSource:
    """A label raster under the scene's grid, nearest neighbour.

    dataset: the raster on its own grid; view: GDAL's warper on the scene's grid, for what the
    overlay cannot place; silent: values that say nothing.
    """

    def __init__(
        self,
        path: Path,
        overlay: Overlay,
        dataset: DatasetReader,
        view: WarpedVRT | None,
        rules: LabelRules,
        silent: Collection[float],
    ) -> None:
        self.path, self.rules = path, rules
        self._overlay, self._dataset, self._view = overlay, dataset, view
        self._masked = MaskFlags.per_dataset in dataset.mask_flag_enums[0]
        self._silent = silent
        self._table = value_table(rules, silent)

    def values(self, tile: Tile) -> np.ndarray:
        """Values as stored, int64; HOLE where the file says nothing."""
        return self._on_grid(tile, self._numbers, np.int64)

    def read(self, tile: Tile) -> np.ndarray:
        return self._on_grid(tile, self._ids, np.int32)

    def met(self, tiles: Sequence[Tile]) -> Counter[int]:
        """How many pixels of a scene have each value, from all of its tiles."""
        counts: Counter[int] = Counter()
        for tile in tiles:
            rows, cols = repeated(tile)
            found = np.unique(self.values(tile)[rows:, cols:], return_counts=True)
            counts.update(dict(zip(*(part.tolist() for part in found), strict=True)))
        del counts[HOLE]
        return counts

    def unlisted_around(self, target: Grid) -> set[int]:
        """Values that are no class in the part of the raster around a scene's grid, on its own.

        Cheap next to a look at every tile, and a superset of what the scene's grid can show.
        """
        left, top, right, bottom = _window_around(self._overlay.raster, target)
        found: set[int] = set()
        for row in range(top, bottom, STRIP):
            stored = self._stored(Window(left, row, right - left, min(STRIP, bottom - row)))
            if not self._all_listed(stored.values):
                unlisted = self._ids(*stored) == UNLISTED
                if unlisted.any():
                    found.update(np.unique(self._numbers(*stored)[unlisted]).tolist())
        return found

    def _all_listed(self, values: np.ndarray) -> bool:
        """Whether a look at the least and the greatest value shows that there is no other."""
        if values.dtype.kind == "f" or values.min() < 0 or values.max() >= len(self._table):
            return False
        return bool((self._table[values.min() : int(values.max()) + 1] != UNLISTED).all())

    def _on_grid(self, tile: Tile, convert: Callable, dtype: type) -> np.ndarray:
        """What `convert` makes of stored values, on the pixels of a tile inside the scene."""
        window = clip(tile, self._overlay.grid)
        whole = Tile(tile.row, tile.col, window.height, window.width)
        found = np.empty((window.height, window.width), dtype)
        for part, places in self._overlay.parts(whole):
            if places is None:
                stored = self._warped(part)
            else:
                stored = gather(places, self._overlay.raster, self._stored)
            if part == whole:
                return convert(*stored)
            row, col = part.row - tile.row, part.col - tile.col
            found[row : row + part.height, col : col + part.width] = convert(*stored)
        return found

    def _stored(self, window: Window) -> Stored:
        """A window of the raster itself."""
        with _naming(self.path):
            values = self._dataset.read(1, window=window)
            valid = self._dataset.read_masks(1, window=window) > 0 if self._masked else None
        return Stored(values, valid)

    def _warped(self, part: Tile) -> Stored:
        """A part of the scene's grid, by GDAL's warper."""
        with _naming(self.path):
            values = self._view.read(1, window=clip(part, self._overlay.grid))
        return Stored(values, (values != hole_in(self._dataset.dtypes[0])) & (values == values))

    def _ids(self, values: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        """Class ids, int32, of values as stored."""
        ids = None if values.dtype.kind == "f" else ids_by_table(values, self._table)
        if ids is None:
            values = self._numbers(values, valid)
            valid = values != HOLE
            ids = ids_by_table(np.where(valid, values, 0), self._table)
        if ids is None:
            found, places = np.unique(values, return_inverse=True)
            ids = [UNCOVERED if value == HOLE else self.rules.id_of(int(value)) for value in found]
            return np.array(ids, np.int32)[places].reshape(values.shape)
        if valid is not None:
            ids[~valid] = UNCOVERED
        return ids

    def _numbers(self, values: np.ndarray, valid: np.ndarray | None) -> np.ndarray:
        """Values as stored as int64, HOLE where they say nothing."""
        valid = values == values if valid is None else valid & (values == values)
        for value in self._silent:
            valid &= values != value
        return whole_numbers(values, valid, self.path)


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Let the errors of a read say which file it was."""
    try:
        yield
    except RasterioError as error:
        cause = told_by(error)
        raise RasterError(f"{path}: cannot read its pixels ({cause})") from error


@contextlib.contextmanager
def raster_source(
    path: Path, scene: Scene, rules: LabelRules
) -> Iterator[tuple[RasterSource | None, str]]:
    """A label raster on a scene's grid, or None and its extent where it lies elsewhere."""
    with _open_label_raster(path) as dataset:
        own = grid_of(dataset)
        _check_places(path, own, scene)
        if own.georeferenced and not overlap(own, scene.grid):
            yield None, extent_of(own)
            return
        overlay = Overlay(scene.grid, own)
        with _warper(dataset, overlay) as view:
            silent = silent_values(dataset, rules)
            yield RasterSource(path, overlay, dataset, view, rules, silent), ""


@contextlib.contextmanager
def _warper(dataset: DatasetReader, overlay: Overlay) -> Iterator[WarpedVRT | None]:
    """GDAL's warper on the scene's grid where the overlay may need it."""
    if overlay.complete:
        yield None
        return
    with WarpedVRT(
        dataset,
        crs=overlay.grid.crs,
        transform=overlay.grid.transform,
        height=overlay.grid.height,
        width=overlay.grid.width,
        resampling=Resampling.nearest,
        src_nodata=None,  # of the file's word only its mask; values are judged afterwards
        nodata=hole_in(dataset.dtypes[0]),
        tolerance=WARP_TOLERANCE,
    ) as view:
        yield view


def silent_values(dataset: DatasetReader, rules: LabelRules) -> list[float]:
    """Values of a label raster that mean no label, whatever else its file masks."""
    dtype = np.dtype(dataset.dtypes[0])
    silent = [] if dtype.kind == "u" else [hole_in(dtype.name)]
    if dataset.nodata is not None and not keeps_nodata(dataset, rules):
        silent.append(dataset.nodata)
    if not isinstance(rules.nodata, str):
        silent.append(rules.nodata)
    exact = [dtype.type(value) if dtype.kind == "f" else value for value in silent]
    return [value for value in exact if value == value]


@contextlib.contextmanager
def _open_label_raster(path: Path) -> Iterator[DatasetReader]:
    if not path.exists():
        raise RasterError(f"{path}: no such file (paths.label_path)")
    check_structure(path)
    with open_raster(path) as dataset:
        if dataset.count != 1:
            raise RasterError(f"{path}: has {dataset.count} bands, a label raster has one")
        if "complex" in dataset.dtypes[0]:
            raise RasterError(f"{path}: pixels are {dataset.dtypes[0]}, expected whole numbers")
        yield dataset


def keeps_nodata(dataset: DatasetReader, rules: LabelRules) -> bool:
    """Whether pixels with the value that a raster declares as nodata are labels all the same.

    With `auto` they are when that value is one of the classes.

    >>> from types import SimpleNamespace
    >>> rules = LabelRules(num_classes=2, ids={"0": 0, "1": 1})
    >>> [keeps_nodata(SimpleNamespace(nodata=value), rules) for value in (0, 255, None)]
    [True, False, False]
    """
    declared = dataset.nodata
    if rules.nodata == "auto":
        return declared is not None and value_key(declared) in rules.ids
    return rules.nodata != declared


def nodata_class(path: Path, rules: LabelRules) -> int | None:
    """The class that a label raster also declares as nodata and that stays a class, if any."""
    if is_vector(path):
        return None
    with _open_label_raster(path) as dataset:
        if dataset.nodata is None or not keeps_nodata(dataset, rules):
            return None
        return rules.ids.get(value_key(dataset.nodata))


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


def _window_around(own: Grid, target: Grid) -> tuple[int, int, int, int]:
    """Left, top, right, bottom pixel of a raster around another grid's footprint."""
    whole = box(0, 0, own.width, own.height)
    outline = None
    if own.georeferenced:
        with contextlib.suppress(*NO_PLACE):
            outline = warp_outline(target.footprint(), target.crs, own.crs)
    if isinstance(outline, Polygon):  # in parts where it crosses 180 degrees: then all is looked at
        inverse = ~own.transform
        outline = Polygon([inverse @ point for point in outline.exterior.coords])
        whole = outline.buffer(2).intersection(whole)
    if not whole.area:
        return 0, 0, 0, 0
    left, top, right, bottom = (int(bound) for bound in whole.bounds)
    return left, top, min(right + 1, own.width), min(bottom + 1, own.height)
