"""Scenes on disk: opening, masks, windows, and the GeoTIFF that a map becomes.

A scene is read by windows, never whole. Prepare and inference read a tile through the same
`Scene.read`, so they see the same pixels.
"""

import contextlib
import functools
import logging
import struct
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rasterio
import tifffile
from rasterio._err import CPLE_BaseError  # what rasterio.warp raises; it has no public name
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.io import DatasetReader
from rasterio.transform import Affine
from rasterio.vrt import WarpedVRT
from rasterio.warp import reproject, transform, transform_geom
from rasterio.windows import Window
from shapely.geometry import Polygon, mapping, shape

from utils.formats import drivers_of, false_ending, is_tiff, too_large
from utils.tiling import Tile
from utils.vrt import VrtError, sources_of

DAMAGED = (  # what tifffile raises on a directory that makes no sense
    tifffile.TiffFileError, struct.error, ValueError, LookupError, OverflowError, TypeError,
    AttributeError, EOFError,
)  # fmt: skip
SIDECARS = (
    ".msk", ".ovr", ".aux.xml", ".tfw", ".wld", ".prj", ".tmp", ".dbf", ".shx", ".cpg", ".qix",
    ".sbn", ".sbx", ".qmd", ".qml", ".gpkg-wal", ".gpkg-shm",
)  # fmt: skip
BLOCK = 512  # rows and columns of a block of the written map
MAP = ("GTiff",)  # the driver of our own maps, which may have any name
FARTHEST = 1e12  # units from an origin: on the Earth there are some 10^7 metres
LEAST_AREA = 1e-24  # of a pixel in squared units: degrees are the largest
DEEPEST = 4  # VRTs within each other
NO_PLACE = (CPLE_BaseError, SystemError)  # what rasterio.warp raises for points beyond a CRS


class RasterError(Exception):
    """A raster that cannot be used, with the file, what was found and what is expected."""

    exit_code = 3


class RefusedError(RasterError):
    """A raster that is not to be opened: passed over nowhere, not even among others in a folder."""


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
        """Whether pixels have a place on the Earth: a transform, and a CRS that is no local one."""
        known = self.crs is not None and (self.crs.is_geographic or self.crs.is_projected)
        return known and not self.transform.is_identity

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


def is_raster(path: Path) -> bool:
    """Whether GDAL opens a file as a raster."""
    try:
        with open_raster(path):
            return True
    except RefusedError:
        raise
    except RasterError:
        return False


def warp_outline(outline: Polygon, source: CRS, target: CRS) -> Polygon:
    """A polygon in another CRS."""
    return shape(transform_geom(source, target, mapping(outline))).buffer(0)


def overlap(first: Grid, second: Grid) -> bool:
    """Whether two grids share ground, or may do so.

    Seen from both sides, as the outline of a large one may not warp right, or not at all.

    >>> utm = north_up("EPSG:32633", 412000, 5326000, 0.5, 1408, 1408)
    >>> overlap(utm, north_up("EPSG:4326", left=-180, top=90, gsd=1, height=180, width=360))
    True
    """
    seen = []
    for here, there in ((first, second), (second, first)):
        with contextlib.suppress(*NO_PLACE):
            outline = warp_outline(here.footprint(), here.crs, there.crs)
            seen.append(outline.intersects(there.footprint()))
    return any(seen) or not seen


@contextlib.contextmanager
def open_raster(path: Path, drivers: Sequence[str] = ()) -> Iterator[DatasetReader]:
    """A dataset of our own handle, by these drivers, or those of the file's ending.

    GDAL's complaints become a RasterError that names the file. What its header claims is bounded.
    """
    drivers = drivers or drivers_of(path)
    _admit(path, drivers)
    with _opened(path, drivers) as dataset:
        try:
            _check_claims(path, dataset)
            yield dataset
        except CPLE_BaseError as error:  # asked for a CRS, a mask or a colour that makes no sense
            said = told_by(error)
            raise RasterError(f"{path}: not a raster that can be used ({said})") from error


def _opened(path: Path, drivers: Sequence[str]) -> DatasetReader:
    """The dataset as the first of the drivers has it that knows it."""
    errors = []
    for driver in drivers:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", NotGeoreferencedWarning)
                return rasterio.open(path, driver=driver, sharing=False)
        except RasterioIOError as error:
            errors.append(error)
    if said := false_ending(path):
        raise RefusedError(f"{path}: {said}") from errors[0]
    said = told_by(errors[0])
    raise RasterError(f"{path}: not a raster that GDAL can open ({said})") from errors[0]


def _admit(path: Path, drivers: Sequence[str]) -> None:
    """Refuse what is not a file of this machine with a raster's ending, or a VRT of such files."""
    if not path.is_file():
        raise RasterError(f"{path}: no such file")
    if not drivers:
        said = false_ending(path) or f"no raster ends in {path.suffix or 'no ending'}"
        raise RasterError(f"{path}: not a raster that GDAL can open ({said})")
    if "VRT" in drivers and false_ending(path) is None:
        _check_sources(path)


def _check_sources(path: Path) -> None:
    """Refuse a VRT that names anything but rasters of this machine, at any depth."""
    within = {path}
    for _ in range(DEEPEST):
        found = set().union(*(_sources(path, part) for part in within))
        within = {source for source in found if "VRT" in drivers_of(source)}
        for source in found - within:
            _check_source(path, source, source.stat().st_mtime_ns)
        if not within:
            return
    raise RefusedError(
        f"{path}: its VRTs lie over {DEEPEST} deep within each other, or in a circle; build it of "
        "the rasters themselves with gdalbuildvrt"
    )


def _sources(path: Path, part: Path) -> tuple[Path, ...]:
    try:
        return sources_of(part)
    except VrtError as error:
        where = "" if part == path else f"{part.name} in it "
        said = f"{path}: {where}{error}; build it of rasters on this disk with gdalbuildvrt"
        raise RefusedError(said) from error


@functools.lru_cache(maxsize=65536)  # a mosaic is opened again in every phase and thread
def _check_source(path: Path, source: Path, modified: int) -> None:
    try:
        with open_raster(source):
            return
    except RasterError as error:
        raise RefusedError(f"{path}: a source of it cannot be used: {error}") from error


def _check_claims(path: Path, dataset: DatasetReader) -> None:
    """Refuse a header that claims what no memory could hold, or places that are no numbers."""
    rows, cols = dataset.block_shapes[0] if dataset.count else (0, 0)
    pixel = max((bytes_of(kind) for kind in dataset.dtypes), default=0)
    pixelwise = dataset.tags(ns="IMAGE_STRUCTURE").get("INTERLEAVE") == "PIXEL"
    together = dataset.count if pixelwise else 1
    said = too_large(dataset.height, dataset.width, dataset.count, rows * cols * pixel * together)
    if said:
        raise RefusedError(f"{path}: {said}")
    if not _has_place(grid_of(dataset)):
        raise RefusedError(
            f"{path}: by its transform {list(dataset.transform)[:6]} its pixels lie nowhere on "
            "Earth; set the right one with gdal_edit -a_ullr ULX ULY LRX LRY"
        )


def _has_place(grid: Grid) -> bool:
    """Whether pixels have an area and their corners numbers that a map may have."""
    ends = [(0, 0), (grid.width, 0), (0, grid.height), (grid.width, grid.height)]
    corners = np.abs([grid.transform @ end for end in ends])
    return bool((corners < FARTHEST).all()) and abs(grid.transform.determinant) > LEAST_AREA


def bytes_of(kind: str) -> int:
    """Bytes of a pixel of a type that rasterio names, NumPy's or not.

    >>> bytes_of("uint16"), bytes_of("complex_int16")
    (2, 16)
    """
    return np.dtype(kind).itemsize if kind in np.sctypeDict else 16


def told_by(error: BaseException) -> str:
    """What GDAL objected to, in one line; it ends some of its messages with a line break.

    >>> told_by(RasterioIOError("Illegal band\\n"))
    'Illegal band'
    """
    return " ".join(str(error.__cause__ or error).split())


def grid_of(dataset: DatasetReader) -> Grid:
    return Grid(dataset.crs, dataset.transform, dataset.height, dataset.width)


def check_structure(path: Path) -> None:
    """Refuse a TIFF whose directory points past the file's end, before any pixel is decoded."""
    if not path.is_file():
        return
    if not is_tiff(path):
        return
    size = path.stat().st_size
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # odd tags are no fault of structure
    try:
        with tifffile.TiffFile(path) as tiff:
            ends = [np.add(page.dataoffsets, page.databytecounts).max() for page in tiff.pages]
    except DAMAGED as error:
        raise RasterError(f"{path}: damaged TIFF directory ({error})") from error
    if not ends:
        raise RasterError(f"{path}: damaged TIFF directory (holds no image)")
    if max(ends) > size:
        raise RasterError(
            f"{path}: truncated: its pixels end at byte {max(ends)}, the file at byte {size}; "
            "copy it again from its source"
        )


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


def resized(grid: Grid, factor: float) -> Grid:
    """The same ground in pixels `factor` times as large, in whole numbers.

    >>> resized(north_up("EPSG:32633", 412000, 5326000, 0.5, 1408, 1408), 2.0)[2:]
    (704, 704)
    """
    height, width = (max(1, round(length / factor)) for length in (grid.height, grid.width))
    scale = Affine.scale(grid.width / width, grid.height / height)
    return Grid(grid.crs, grid.transform @ scale, height, width)


def ground_gsd(grid: Grid) -> float:
    """Metres on the ground per pixel at the grid's centre, whatever the CRS's unit and distortion.

    >>> round(ground_gsd(north_up("EPSG:3857", 9500000, 3200000, 0.1493, 4096, 3072)), 3)
    0.132
    """
    col, row = grid.width / 2, grid.height / 2
    points = [grid.transform @ point for point in ((col, row), (col + 1, row), (col, row + 1))]
    lon, lat = transform(grid.crs, CRS.from_epsg(4326), *zip(*points, strict=True))
    local = CRS.from_string(f"+proj=laea +lat_0={lat[0]} +lon_0={lon[0]} +datum=WGS84 +units=m")
    east, north = transform(grid.crs, local, *zip(*points, strict=True))
    sides = np.hypot(np.subtract(east[1:], east[0]), np.subtract(north[1:], north[0]))
    return float(np.sqrt(sides.prod()))


def file_identity(path: Path) -> dict[str, int]:
    """Bytes and latest modification time (ns) of a raster and of the masks and VRT sources it uses.

    Overviews and statistics do not count: viewers add them, and the pixels stay what they were.
    """
    with open_raster(path) as dataset:
        parts = [Path(name) for name in dataset.files if not name.endswith((".ovr", ".aux.xml"))]
    return stat_of([part for part in parts if part.is_file()])


def stat_of(parts: Sequence[Path]) -> dict[str, int]:
    """Bytes in all and latest modification time (ns) of some files."""
    stats = [part.stat() for part in parts]
    return {
        "bytes": sum(stat.st_size for stat in stats),
        "modified": max(stat.st_mtime_ns for stat in stats),
    }


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


def read_tags(path: Path) -> dict[str, str]:
    """What a map of ours says of itself, whatever its name ends in."""
    with open_raster(path, MAP) as dataset:
        return dataset.tags()


def is_whole(path: Path) -> bool:
    """Whether every block of a map of ours can be decoded, which checks what deflate says of it."""
    check_structure(path)
    with open_raster(path, MAP) as dataset:
        try:
            for _, window in dataset.block_windows(1):
                dataset.read(window=window)
        except RasterioError:
            return False
    return True


def rows_on(path: Path, grid: Grid, rows: int = BLOCK) -> Iterator[np.ndarray]:
    """All of a map of ours (bands, n, width) on another grid, nearest neighbour, from the top."""
    with open_raster(path, MAP) as dataset, WarpedVRT(
        dataset, crs=grid.crs, transform=grid.transform, height=grid.height, width=grid.width,
        resampling=Resampling.nearest, tolerance=1e-6,
    ) as view:  # fmt: skip
        for row in range(0, grid.height, rows):
            count = min(rows, grid.height - row)
            yield view.read(window=Window(0, row, grid.width, count))
