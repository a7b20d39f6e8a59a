"""Scenes on disk: bands, masks, windows; and small rasters as a whole.

A scene is read by windows, never whole. Prepare and inference read a tile through the same
`Scene.read`, so they see the same pixels.
"""

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject
from rasterio.windows import Window

from utils.formats import too_large
from utils.grids import NO_PLACE, Grid, ground_gsd, resized
from utils.opening import (
    MAP,
    RasterError,
    RefusedError,
    check_structure,
    file_identity,
    grid_of,
    open_raster,
    told_by,
)
from utils.tiling import Tile

BLOCK = 512  # rows and columns of a block of the written map


class Pixels(NamedTuple):
    """One tile of a scene: image (bands, height, width) as stored, valid (height, width) bool."""

    image: np.ndarray
    valid: np.ndarray


@dataclass(frozen=True, slots=True)
class Reading:
    """How the pixels of every scene are read: the same in prepare, training and inference.

    bands: numbers from 1; ranges: for each band the two values that become 0 and 255; nodata: a
    value without data beside what a scene declares itself; gsd: metres per pixel, None for each
    scene's own.
    """

    bands: tuple[int, ...] = (1, 2, 3)
    ranges: tuple[tuple[float, float], ...] = ((0.0, 255.0),) * 3
    nodata: float | None = None
    gsd: float | None = None

    def line(self) -> str:
        """The reading in words, for the log.

        >>> Reading(bands=(1,), ranges=((5000.0, 20000.0),)).line()
        'bands [1], values 5000..20000 become 0..255'
        """
        ranges = ", ".join(f"{low:g}..{high:g}" for low, high in dict.fromkeys(self.ranges))
        at = f", at {self.gsd:g} m per pixel" if self.gsd else ""
        return f"bands {list(self.bands)}, values {ranges} become 0..255{at}"


RGB = Reading()


def scaled(values: np.ndarray, ranges: Sequence[tuple[float, float]]) -> np.ndarray:
    """Bands (bands, height, width) as uint8: each range's ends become 0 and 255, the rest is cut.

    >>> scaled(np.array([[[5000, 12500, 40000]]], np.uint16), [(5000, 20000)]).tolist()
    [[[0, 128, 255]]]
    """
    if values.dtype == np.uint8 and all(tuple(pair) == (0, 255) for pair in ranges):
        return values
    low, high = np.array(ranges, np.float32).T[:, :, None, None]
    with np.errstate(over="ignore", invalid="ignore"):  # nodata such as -1.8e308
        shares = np.nan_to_num((values.astype(np.float32) - low) / (high - low), nan=0.0)
    return np.rint(shares.clip(0, 1) * 255).astype(np.uint8)


class Scene:
    """One open raster, read tile by tile on `grid`, which is its own or one of another gsd.

    A pixel is valid where GDAL's dataset mask says so (nodata, .msk file, internal mask, alpha
    band), all its bands are finite, and they are not all `reading.nodata`. An alpha band that is
    among the bands to read is data and no mask.
    """

    def __init__(self, path: Path, name: str, dataset: Any, own: Grid, reading: Reading) -> None:
        self.path, self.name, self.reading = path, name, reading
        self.grid, self.own_grid = grid_of(dataset), own
        self._dataset = dataset
        opacity = any(is_alpha(dataset, band) for band in reading.bands)
        data_only = opacity and MaskFlags.alpha in dataset.mask_flag_enums[0]
        self._masked = hides_pixels(dataset) and not data_only

    @property
    def identity(self) -> dict[str, Any]:
        """What tells that the file is still the one that was read, and where its pixels lie."""
        grid = self.grid
        place = {
            "height": grid.height,
            "width": grid.width,
            "crs": grid.crs.to_wkt() if grid.georeferenced else None,
            "transform": list(grid.transform)[:6],
        }
        return file_identity(self.path) | place

    @property
    def dtypes(self) -> set[np.dtype]:
        """The types of the bands that are read."""
        return {np.dtype(self._dataset.dtypes[band - 1]) for band in self.reading.bands}

    def sample(self, side: int = 512) -> np.ndarray:
        """Values (bands, n) of valid pixels, read with strides, at most `side` along each axis."""
        shape = tuple(min(side, length) for length in (self.grid.height, self.grid.width))
        bands = self.reading.bands
        try:
            values = self._dataset.read(bands, out_shape=(len(bands), *shape))
            valid = np.ones(shape, bool)
            if self._masked:
                valid = self._dataset.dataset_mask(out_shape=shape) > 0
        except RasterioError as error:
            cause = told_by(error)
            raise RasterError(f"{self.path}: cannot read its pixels ({cause})") from error
        return values[:, valid & has_data(values, self.reading.nodata)].astype(np.float64)

    def read(self, tile: Tile) -> Pixels:
        """The pixels of a tile; where it reaches past the scene they are mirrored and not valid."""
        window = clip(tile, self.grid)
        try:
            valid = np.ones((window.height, window.width), bool)
            if self._masked:
                valid = self._dataset.dataset_mask(window=window) > 0
            if not valid.any():  # the mask alone was read, where it is a file or band of its own
                blank = np.zeros((len(self.reading.bands), tile.height, tile.width), np.uint8)
                return Pixels(blank, np.zeros(blank.shape[1:], bool))
            values = self._dataset.read(self.reading.bands, window=window)
        except RasterioError as error:
            cause = told_by(error)
            raise RasterError(f"{self.path}: cannot read tile {tile.name} ({cause})") from error
        valid &= has_data(values, self.reading.nodata)
        image = scaled(values, self.reading.ranges)
        return Pixels(pad(image, tile, "reflect"), pad(valid, tile, "constant"))


def has_data(values: np.ndarray, nodata: float | None) -> np.ndarray:
    """Where all bands (bands, height, width) are finite and not all of them are `nodata`.

    >>> has_data(np.array([[[1, np.nan, 0]], [[0, 1, 0]]]), nodata=0).tolist()
    [[True, False, False]]
    """
    if values.dtype.kind == "f":
        found = np.isfinite(values).all(0)
    else:
        found = np.ones(values.shape[1:], bool)
    return found if nodata is None else found & (values != nodata).any(0)


def hides_pixels(dataset: DatasetReader) -> bool:
    """Whether a dataset may have pixels that are not valid: to look for them costs a read."""
    return any(flags != [MaskFlags.all_valid] for flags in dataset.mask_flag_enums)


def is_alpha(dataset: DatasetReader, band: int) -> bool:
    """Whether a band is flagged as opacity."""
    return dataset.colorinterp[band - 1] == ColorInterp.alpha


def clip(tile: Tile, grid: Grid) -> Window:
    height = min(tile.height, grid.height - tile.row)
    return Window(tile.col, tile.row, min(tile.width, grid.width - tile.col), height)


def pad(array: np.ndarray, tile: Tile, mode: str, **options: int) -> np.ndarray:
    """Fill an array of a clipped window up to the tile's size, at the bottom and on the right."""
    rows, cols = tile.height - array.shape[-2], tile.width - array.shape[-1]
    if rows == 0 and cols == 0:
        return array
    sides = [(0, 0)] * (array.ndim - 2) + [(0, rows), (0, cols)]
    return np.pad(array, sides, mode, **options)


@contextlib.contextmanager
def open_scene(path: Path, reading: Reading = RGB, name: str | None = None) -> Iterator[Scene]:
    """Open a raster as a scene, or say in one line why it cannot be one."""
    if not path.exists():
        raise RasterError(f"{path}: no such file")
    check_structure(path)
    with open_raster(path) as dataset:
        _check_scene(path, dataset, reading)
        own = grid_of(dataset)
        with _at_gsd(path, dataset, reading) as view:
            yield Scene(path, name or path.stem, view, own, reading)


def _check_scene(path: Path, dataset: DatasetReader, reading: Reading) -> None:
    if max(reading.bands) > dataset.count:
        raise RasterError(
            f"{path}: has {dataset.count} band(s), but bands {list(reading.bands)} are to be read "
            "(dataset.bands)"
        )
    kinds = {dataset.dtypes[band - 1] for band in reading.bands}
    if any("complex" in kind for kind in kinds):
        raise RasterError(f"{path}: pixels are {', '.join(sorted(kinds))}, expected real numbers")
    if dataset.gcps[0] and dataset.transform.is_identity:
        raise RasterError(
            f"{path}: has ground control points but no transform; warp it with "
            f"gdalwarp -t_srs EPSG:CODE {path.name} warped.tif"
        )


@contextlib.contextmanager
def _at_gsd(path: Path, dataset: DatasetReader, reading: Reading) -> Iterator[Any]:
    """The dataset itself, or a view of it with `reading.gsd` metres per pixel."""
    if reading.gsd is None:
        yield dataset
        return
    own = grid_of(dataset)
    if not own.georeferenced:
        raise RasterError(f"{path}: has no CRS or transform, which dataset.gsd needs")
    if reading.nodata is not None and dataset.nodata not in (None, reading.nodata):
        raise RasterError(
            f"{path}: declares nodata {dataset.nodata:g}, dataset.nodata is {reading.nodata:g}; "
            "resampling to dataset.gsd knows one such value only"
        )
    if any(is_alpha(dataset, band) for band in reading.bands):
        raise RasterError(
            f"{path}: an alpha band is among dataset.bands, by which resampling to dataset.gsd "
            "would weigh the others; clear the flag with gdal_translate -colorinterp"
        )
    with _sized(path):
        target = resized(own, reading.gsd / ground_gsd(own))
    if said := too_large(target.height, target.width):
        raise RefusedError(f"{path}: at dataset.gsd {reading.gsd:g}, {said}")
    hidden = dataset.nodata is None and not any(is_alpha(dataset, i) for i in dataset.indexes)
    options = {} if reading.nodata is None else {"src_nodata": reading.nodata}
    with WarpedVRT(
        dataset, crs=own.crs, transform=target.transform, height=target.height,
        width=target.width, resampling=Resampling.average, add_alpha=hidden and not options,
        **options,
    ) as view:  # fmt: skip
        yield view


@contextlib.contextmanager
def _sized(path: Path) -> Iterator[None]:
    """What a transform makes of a size that is none becomes an error that names the file."""
    try:
        yield
    except (*NO_PLACE, ArithmeticError, ValueError) as error:
        raise RefusedError(
            f"{path}: its pixels have no size on the ground, which dataset.gsd needs ({error}); "
            "correct its transform or CRS with gdal_edit"
        ) from error


def write_raster(path: Path, bands: np.ndarray, grid: Grid, nodata: int | None = None) -> None:
    """Write an array (bands, height, width) as a tiled, deflated GeoTIFF."""
    profile = {"driver": "GTiff", "tiled": True, "compress": "deflate", "nodata": nodata}
    profile |= {"crs": grid.crs, "transform": grid.transform, "dtype": bands.dtype}
    profile |= {"count": len(bands), "height": grid.height, "width": grid.width}
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(bands)


def mosaic(parts: Sequence[tuple[np.ndarray, Grid]], target: Grid, nodata: int) -> np.ndarray:
    """Class maps laid on one grid of any CRS, nearest neighbour; nodata where none has a class."""
    whole = np.full((target.height, target.width), nodata, np.uint8)
    for classes, grid in parts:
        layer = np.full_like(whole, nodata)
        reproject(
            classes, layer, src_transform=grid.transform, src_crs=grid.crs, src_nodata=nodata,
            dst_transform=target.transform, dst_crs=target.crs, dst_nodata=nodata,
            resampling=Resampling.nearest,
        )  # fmt: skip
        whole = np.where(layer != nodata, layer, whole)
    return whole


def write_png(path: Path, image: np.ndarray) -> None:
    """Write an 8-bit RGB array (3, height, width) as a picture to look at."""
    _, height, width = image.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        profile = {"driver": "PNG", "count": 3, "height": height, "width": width, "dtype": "uint8"}
        with rasterio.open(path, "w", **profile) as picture:
            picture.write(image)


def read_whole(path: Path) -> np.ndarray:
    """All bands of a small raster, (bands, height, width): for reports, not for scenes."""
    with open_raster(path) as dataset:
        return dataset.read()


def rows_on(path: Path, grid: Grid, rows: int = BLOCK) -> Iterator[np.ndarray]:
    """All of a map of ours (bands, n, width) on another grid, nearest neighbour, from the top."""
    with open_raster(path, MAP) as dataset, WarpedVRT(
        dataset, crs=grid.crs, transform=grid.transform, height=grid.height, width=grid.width,
        resampling=Resampling.nearest, tolerance=1e-6,
    ) as view:  # fmt: skip
        for row in range(0, grid.height, rows):
            count = min(rows, grid.height - row)
            yield view.read(window=Window(0, row, grid.width, count))
