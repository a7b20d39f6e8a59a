"""Scenes on disk: opening, masks, windows, and the GeoTIFF that a map becomes.

A scene is read by windows, never whole. Prepare and inference read a tile through the same
`Scene.read`, so they see the same pixels.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np
import rasterio
import tifffile
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.warp import reproject, transform_geom
from rasterio.windows import Window
from shapely.geometry import Polygon, mapping, shape

from utils.tiling import Tile

BANDS = (1, 2, 3)  # red, green, blue: what the backbone sees
TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the two byte orders, BigTIFF too
SIDECARS = (".msk", ".ovr", ".aux.xml", ".tfw", ".wld", ".prj", ".tmp")
BLOCK = 512  # rows and columns of a block of the written map


class RasterError(Exception):
    """A raster that cannot be used, with the file, what was found and what is expected."""

    exit_code = 3


class Pixels(NamedTuple):
    """One tile of a scene: image (bands, height, width) as stored, valid (height, width) bool."""

    image: np.ndarray
    valid: np.ndarray


class Grid(NamedTuple):
    """Where a raster's pixels lie: crs may be None, transform maps (col, row) to map units."""

    crs: CRS | None
    transform: Affine
    height: int
    width: int

    @property
    def georeferenced(self) -> bool:
        """Whether pixels have a place on the Earth: a CRS and a transform."""
        return self.crs is not None and not self.transform.is_identity

    def footprint(self) -> Polygon:
        """The outline in the raster's own CRS, with points along the edges for warping.

        >>> grid = Grid(CRS.from_epsg(32633), Affine(0.5, 0, 400000, 0, -0.5, 5000000), 1000, 2000)
        >>> grid.footprint().area
        500000.0
        """
        steps = np.linspace(0, 1, 22)[:-1]
        rim = [(s, 0) for s in steps] + [(1, s) for s in steps]
        rim += [(1 - s, 1) for s in steps] + [(0, 1 - s) for s in steps]
        return Polygon([self.transform @ (c * self.width, r * self.height) for c, r in rim])


def north_up(crs: str, left: float, top: float, gsd: float, height: int, width: int) -> Grid:
    """A grid of square pixels of `gsd` map units from its upper left corner.

    >>> north_up("EPSG:32633", 412000, 5326000, 0.5, 1408, 1408).footprint().bounds
    (412000.0, 5325296.0, 412704.0, 5326000.0)
    """
    return Grid(CRS.from_string(crs), Affine(gsd, 0, left, 0, -gsd, top), height, width)


def warp_outline(outline: Polygon, source: CRS, target: CRS) -> Polygon:
    """A polygon in another CRS."""
    return shape(transform_geom(source, target, mapping(outline))).buffer(0)


@contextlib.contextmanager
def open_raster(path: Path) -> Iterator[DatasetReader]:
    """A dataset of our own handle; GDAL's complaints become a RasterError that names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            dataset = rasterio.open(path, sharing=False)
    except RasterioIOError as error:
        raise RasterError(f"{path}: not a raster that GDAL can open ({error})") from error
    with dataset:
        yield dataset


def grid_of(dataset: DatasetReader) -> Grid:
    return Grid(dataset.crs, dataset.transform, dataset.height, dataset.width)


def check_structure(path: Path) -> None:
    """Refuse a TIFF whose directory points past the file's end, before any pixel is decoded."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        if not file.read(4).startswith(TIFF_STARTS):
            return
    size = path.stat().st_size
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # odd tags are no fault of structure
    try:
        with tifffile.TiffFile(path) as tiff:
            ends = [np.add(page.dataoffsets, page.databytecounts).max() for page in tiff.pages]
    except (tifffile.TiffFileError, ValueError, IndexError, OverflowError, TypeError) as error:
        raise RasterError(f"{path}: damaged TIFF directory ({error})") from error
    if not ends:
        raise RasterError(f"{path}: damaged TIFF directory (holds no image)")
    if max(ends) > size:
        raise RasterError(
            f"{path}: truncated: its pixels end at byte {max(ends)}, the file at byte {size}; "
            "copy it again from its source"
        )


class Scene:
    """One open raster, read tile by tile.

    Bands 1 to 3 are red, green and blue in 8 bits; a pixel is valid where GDAL's dataset mask
    (nodata, .msk file, internal mask, alpha band) says so.
    """

    def __init__(self, path: Path, dataset: DatasetReader) -> None:
        self.path = path
        self.grid = grid_of(dataset)
        self._dataset = dataset

    @property
    def name(self) -> str:
        """What split lists and cached tiles call this scene: the file name without its ending."""
        return self.path.stem

    @property
    def identity(self) -> dict[str, int]:
        """What tells that the file is still the one that was read: bytes, time, shape."""
        height, width = self.grid.height, self.grid.width
        return {**file_identity(self.path), "height": height, "width": width}

    def read(self, tile: Tile) -> Pixels:
        """The pixels of a tile; where it reaches past the scene they are mirrored and not valid."""
        window = clip(tile, self.grid)
        try:
            image = self._dataset.read(BANDS, window=window)
            valid = self._dataset.dataset_mask(window=window) > 0
        except RasterioError as error:
            cause = error.__cause__ or error
            raise RasterError(f"{self.path}: cannot read tile {tile.name} ({cause})") from error
        return Pixels(pad(image, tile, "reflect"), pad(valid, tile, "constant"))


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
def open_scene(path: Path) -> Iterator[Scene]:
    """Open a raster as a scene, or say in one line why it cannot be one."""
    if not path.exists():
        raise RasterError(f"{path}: no such file")
    check_structure(path)
    with open_raster(path) as dataset:
        _check_scene(path, dataset)
        yield Scene(path, dataset)


def _check_scene(path: Path, dataset: DatasetReader) -> None:
    if dataset.count < len(BANDS):
        raise RasterError(f"{path}: has {dataset.count} band(s), a scene needs {len(BANDS)} (RGB)")
    kinds = {dataset.dtypes[band - 1] for band in BANDS}
    if kinds != {"uint8"}:
        raise RasterError(
            f"{path}: pixels are {', '.join(sorted(kinds))}, a scene has uint8; scale it with "
            "gdal_translate -ot Byte -scale LOW HIGH"
        )
    if dataset.gcps[0] and dataset.transform.is_identity:
        raise RasterError(
            f"{path}: has ground control points but no transform; warp it with gdalwarp IN OUT.tif"
        )


def find_scenes(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The rasters in a folder, sorted, and the other files with the reason they are none.

    Sidecar files (masks, overviews, world files) are passed over in silence. Two rasters whose
    names differ only in their ending are an error: tiles and split lists are named after the stem.
    """
    if not folder.is_dir():
        raise RasterError(f"{folder}: no such folder (paths.raw_images_dir)")
    found: list[Path] = []
    skipped: list[tuple[Path, str]] = []
    for path in sorted(folder.iterdir()):
        if path.is_dir() or path.name.startswith(".") or path.name.lower().endswith(SIDECARS):
            continue
        try:
            with open_raster(path):
                found.append(path)
        except RasterError as error:
            if path.is_file():
                check_structure(path)  # a damaged TIFF is data that is missing: not to be skipped
            skipped.append((path, f"not a raster that GDAL can open ({error.__cause__})"))
    stems = [path.stem for path in found]
    for path in found:
        if stems.count(path.stem) > 1:
            raise RasterError(f"{path}: another scene in {folder} has the name '{path.stem}' too")
    return found, skipped


def file_identity(path: Path) -> dict[str, int]:
    """Bytes and latest modification time (ns) of a raster and of the masks and VRT sources it uses.

    Overviews and statistics do not count: viewers add them, and the pixels stay what they were.
    """
    with open_raster(path) as dataset:
        parts = {Path(name) for name in dataset.files if not name.endswith((".ovr", ".aux.xml"))}
    parts.add(path)
    stats = [part.stat() for part in parts if part.is_file()]
    return {
        "bytes": sum(stat.st_size for stat in stats),
        "modified": max(stat.st_mtime_ns for stat in stats),
    }


def map_nodata(num_classes: int) -> int:
    """The value of unmapped pixels: 255 in a uint8 map, 65535 above 254 classes (uint16).

    >>> map_nodata(6), map_nodata(254), map_nodata(255)
    (255, 255, 65535)
    """
    return 255 if num_classes <= 254 else 65535


class MapWriter:
    """A class map that grows downwards and gets its name when it is whole.

    Single band, uint8 (uint16 above 254 classes), deflate, 512-pixel blocks, BigTIFF where needed,
    CRS and transform of the scene. Rows come in any number; they are written in whole blocks.
    """

    def __init__(self, path: Path, grid: Grid, num_classes: int) -> None:
        self.path = path
        self.nodata = map_nodata(num_classes)
        self.dtype = np.dtype("uint8" if self.nodata == 255 else "uint16")
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._grid = grid
        self._rows = np.empty((0, grid.width), self.dtype)
        self._written = 0

    def __enter__(self) -> "MapWriter":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._dataset = rasterio.open(
            self._temporary,
            "w",
            driver="GTiff",
            height=self._grid.height,
            width=self._grid.width,
            count=1,
            dtype=self.dtype,
            crs=self._grid.crs,
            transform=self._grid.transform,
            nodata=self.nodata,
            tiled=True,
            blockxsize=BLOCK,
            blockysize=BLOCK,
            compress="deflate",
            bigtiff="IF_SAFER",
        )
        return self

    def write(self, rows: np.ndarray) -> None:
        """Append finished rows, (n, width)."""
        self._rows = np.concatenate([self._rows, rows.astype(self.dtype)])
        whole = len(self._rows) // BLOCK * BLOCK
        if self._written + len(self._rows) == self._grid.height:
            whole = len(self._rows)
        if whole:
            window = Window(0, self._written, self._grid.width, whole)
            self._dataset.write(self._rows[:whole], 1, window=window)
            self._written += whole
            self._rows = self._rows[whole:]

    def _check_whole(self) -> None:
        """GDAL closes a file on a full disk without a word."""
        if self._written != self._grid.height:
            raise ValueError(f"{self.path}: {self._written} rows of {self._grid.height} written")
        try:
            check_structure(self._temporary)
        except RasterError as error:
            raise OSError(f"{self.path}: not written whole; is the disk full?") from error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self._dataset.close()
            if error is None:
                self._check_whole()
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)


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
