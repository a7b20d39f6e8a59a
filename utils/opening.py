"""Rasters opened safely: by the driver of their ending, from this machine, within bounds.

What a file is and how it stands is told here, without its pixels, but for whether they can be read.
"""

import contextlib
import functools
import logging
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import rasterio
import tifffile
from rasterio._err import CPLE_BaseError  # what rasterio.warp raises; it has no public name
from rasterio.errors import NotGeoreferencedWarning, RasterioError, RasterioIOError
from rasterio.io import DatasetReader

from utils.formats import drivers_of, false_ending, is_tiff, too_large
from utils.grids import Grid
from utils.vrt import VrtError, sources_of

DAMAGED = (  # what tifffile raises on a directory that makes no sense
    tifffile.TiffFileError, struct.error, ValueError, LookupError, OverflowError, TypeError,
    AttributeError, EOFError,
)  # fmt: skip
MAP = ("GTiff",)  # the driver of our own maps, which may have any name
FARTHEST = 1e12  # units from an origin: on the Earth there are some 10^7 metres
LEAST_AREA = 1e-24  # of a pixel in squared units: degrees are the largest
DEEPEST = 4  # VRTs within each other


class RasterError(Exception):
    """A raster that cannot be used, with the file, what was found and what is expected."""

    exit_code = 3


class RefusedError(RasterError):
    """A raster that is not to be opened: passed over nowhere, not even among others in a folder."""


def is_raster(path: Path) -> bool:
    """Whether GDAL opens a file as a raster."""
    try:
        with open_raster(path):
            return True
    except RefusedError:
        raise
    except RasterError:
        return False


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


def read_tags(path: Path) -> dict[str, str]:
    """What a map of ours says of itself, whatever its name ends in."""
    with open_raster(path, MAP) as dataset:
        return dataset.tags()


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
