"""Maps on disk: what a finished prediction looks like to whoever opens it.

A map is written as a tiled temporary GeoTIFF, which GDAL's COG driver copies, so that memory does
not grow with the map. Its colours are in the file, its names where gdalinfo and QGIS look for them,
in an `.aux.xml` beside it. Until a map is whole, and after a failure, an older one stays as it was.
"""

import contextlib
import itertools
import math
import re
import shutil
import warnings
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree.ElementTree import Element, SubElement, tostring

import numpy as np
import rasterio
import rasterio.shutil
from rasterio._err import CPLE_BaseError
from rasterio.errors import NotGeoreferencedWarning, RasterioError
from rasterio.windows import Window

from utils.artefacts import publish, temporary_of
from utils.grids import Grid
from utils.opening import RasterError, check_structure

Color = tuple[int, int, int]

FORMATS = ("cog", "gtiff")
BLOCK = 512  # rows and columns of a block of the written map
SHARE_MAX = 250  # the byte that stands for a share of 1; 255 is nodata
MAX_CLASSES = 65535  # ids 0..65534 and nodata in 16 bits
OKABE_ITO: tuple[Color, ...] = (  # told apart with any kind of colour vision
    (0, 0, 0), (230, 159, 0), (86, 180, 233), (0, 158, 115),
    (240, 228, 66), (0, 114, 178), (213, 94, 0), (204, 121, 167),
)  # fmt: skip
UNWRITABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")  # not text in XML
# of the attribute table: name, GDAL's number of the type, of the usage
FIELDS = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8))
STALE = (".ovr", ".msk", ".aux.xml")  # beside a map that is replaced: no longer true of it


class MapError(Exception):
    """A map that cannot be written, with the file, what was found and what is expected."""

    exit_code = 3


class UnwrittenError(MapError):
    """The disk, or GDAL over it, did not take a map."""

    exit_code = 4


@dataclass(frozen=True, slots=True)
class Legend:
    """Names and colours (red, green, blue) of the classes, in the order of their ids."""

    names: tuple[str, ...]
    colors: tuple[Color, ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.colors):
            raise MapError(f"a legend of {len(self.names)} names and {len(self.colors)} colours")
        if not 1 <= len(self.names) <= MAX_CLASSES:
            raise MapError(f"a map of {len(self.names)} classes; it can hold 1 to {MAX_CLASSES}")
        for number, (name, color) in enumerate(zip(self.names, self.colors, strict=True)):
            if UNWRITABLE.search(name):
                raise MapError(f"class {number} {name!a}: control characters in its name")
            if len(color) != 3 or not 0 <= min(color) <= max(color) <= 255:
                raise MapError(f"class {number} '{name}': {color} is not three numbers of 0..255")


def _lattice_color(number: int) -> Color:
    """A point of a lattice in RGB that grows finer; those of the numbers 0..63 are 64 apart."""
    channels = [0, 0, 0]
    for bit in range(number.bit_length()):
        channels[bit % 3] |= (number >> bit & 1) << (7 - bit // 3)
    return channels[0], channels[1], channels[2]


def default_legend(num_classes: int) -> Legend:
    """Names by number; the eight colours of Okabe and Ito, then those of a lattice apart from them.

    >>> default_legend(2)
    Legend(names=('class 0', 'class 1'), colors=((0, 0, 0), (230, 159, 0)))
    """
    lattice = map(_lattice_color, itertools.count(1))
    apart = (color for color in lattice if all(math.dist(color, o) > 48 for o in OKABE_ITO))
    colors = itertools.islice(itertools.chain(OKABE_ITO, apart), num_classes)
    return Legend(tuple(f"class {number}" for number in range(num_classes)), tuple(colors))


def legend_of(classes: Sequence[Any] | None, num_classes: int) -> Legend:
    """The legend of `dataset.classes` (each with .name and .color), or the default one."""
    default = default_legend(num_classes)
    if classes is None:
        return default
    colors = [
        default.colors[number] if each.color is None else bytes.fromhex(each.color[1:])
        for number, each in enumerate(classes)
    ]
    return Legend(tuple(each.name for each in classes), tuple(tuple(color) for color in colors))


def map_nodata(num_classes: int) -> int:
    """The value of unmapped pixels: 255 in a uint8 map, 65535 above 254 classes (uint16).

    >>> map_nodata(6), map_nodata(254), map_nodata(255)
    (255, 255, 65535)
    """
    return 255 if num_classes <= 254 else 65535


def share_bytes(shares: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Shares of 0..1, (..., height, width), as 0..250; 255 where not valid (height, width).

    >>> share_bytes(np.array([[0.0, 0.5, 1.0, 0.7]]), np.array([[True, True, True, False]]))
    array([[  0, 125, 250, 255]], dtype=uint8)
    """
    return np.where(valid, np.rint(shares * SHARE_MAX), 255).astype(np.uint8)


@dataclass(frozen=True, slots=True)
class Content:
    """What the bands of a file hold, and how GDAL may make overviews of it."""

    bands: tuple[str, ...]  # one description each
    nodata: int
    overviews: Literal["mode", "average"]
    scale: float = 1.0  # stored number × scale = what is meant
    legend: Legend | None = None  # where pixels are class ids: their names and colours

    @property
    def dtype(self) -> str:
        return "uint8" if self.nodata == 255 else "uint16"


def class_map(legend: Legend) -> Content:
    """One band of class ids, coloured and named; overviews take the most frequent class.

    >>> class_map(default_legend(300)).dtype
    'uint16'
    """
    return Content(("class",), map_nodata(len(legend.names)), "mode", legend=legend)


def probability_map(legend: Legend) -> Content:
    """One band per class of its probability, 0..250 (`share_bytes`), overviews by average.

    >>> probability_map(default_legend(2)).bands
    ('class 0', 'class 1')
    """
    return Content(legend.names, 255, "average", 1 / SHARE_MAX)


def confidence_map() -> Content:
    """One band of the winning class's share, 0..250 (`share_bytes`), overviews by average."""
    return Content(("confidence",), 255, "average", 1 / SHARE_MAX)


def sidecar(legend: Legend) -> str:
    """The text of the `.aux.xml` of a class map: category names, and a table with their colours.

    QGIS takes its legend from the table; the palette in the TIFF would list all 256 values.
    GDAL takes no notice of a file with an XML declaration.

    >>> "<Category>sand &amp; clay</Category>" in sidecar(Legend(("sand & clay",), ((9, 9, 9),)))
    True
    """
    root = Element("PAMDataset")
    band = _add(root, "PAMRasterBand", band=1)
    names = _add(band, "CategoryNames")
    table = _add(band, "GDALRasterAttributeTable", tableType="thematic")
    for index, values in enumerate(FIELDS):
        field = _add(table, "FieldDefn", index=index)
        for tag, value in zip(("Name", "Type", "Usage"), values, strict=True):
            _add(field, tag, value)
    for number, (name, color) in enumerate(zip(legend.names, legend.colors, strict=True)):
        _add(names, "Category", name)
        row = _add(table, "Row", index=number)
        for value in (number, name, *color):
            _add(row, "F", value)
    return tostring(root, encoding="unicode")


def _add(parent: Element, tag: str, text: object = "", **attributes: object) -> Element:
    child = SubElement(parent, tag, {key: str(v) for key, v in attributes.items()})
    child.text = str(text)
    return child


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """What the disk or GDAL object to while a map is written becomes an UnwrittenError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            yield
    except (OSError, RasterError, RasterioError, CPLE_BaseError, SystemError) as error:
        # SystemError: where GDAL fails without a word of why
        reason = error.__cause__ or error
        raise UnwrittenError(f"{path}: not written; disk full? ({reason})") from error


class MapWriter:
    """A map that grows downwards and gets its name, with its `.aux.xml`, when it is whole.

    Its own profile: uint8 (uint16 above 254 classes), deflate, 512-pixel blocks, BigTIFF where
    needed, CRS and transform of the grid. Rows come in any number and leave in whole blocks.

    >>> grid = Grid(None, rasterio.Affine.scale(2, -2), height=3, width=2)
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with MapWriter(Path(folder, "map.tif"), grid, class_map(default_legend(2))) as output:
    ...         output.write(np.array([[0, 1], [1, 1], [255, 255]]))
    ...     sorted(path.name for path in Path(folder).iterdir())
    ['map.tif', 'map.tif.aux.xml']
    """

    def __init__(
        self, path: Path, grid: Grid, content: Content, format: str = "cog",
        tags: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        if format not in FORMATS:
            raise MapError(f"{path}: format '{format}' is none of {', '.join(FORMATS)}")
        self.path = path
        self._grid, self._content, self._format = grid, content, format
        self._tags = dict(tags or {})
        self._area = 0  # pixels written
        self._sums: list[tuple[Window, int]] = []  # of what was written
        self.begin(0, grid.width)

    def begin(self, start: int, stop: int) -> None:
        """Go on with other columns, from the top; blocks are whole where `start` is one's edge."""
        shape = (len(self._content.bands), BLOCK, stop - start)
        self._block = np.empty(shape, self._content.dtype)
        self._col, self._filled, self._written = start, 0, 0

    def __enter__(self) -> "MapWriter":
        if self.path.is_dir():
            raise MapError(f"{self.path}: is a folder; a map needs the name of a file")
        with _naming(self.path), contextlib.ExitStack() as stack:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # a folder of our own, so that GDAL's temporary files go with it whatever happens
            self._folder = temporary_of(self.path)
            self._folder.mkdir()
            stack.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self._dataset = rasterio.open(self._folder / "map.tif", "w", **self._profile())
            stack.callback(self._dataset.close)
            self._describe(self._content)
            self._stack = stack.pop_all()
        return self

    def _profile(self) -> dict[str, object]:
        grid, content = self._grid, self._content
        profile = {"driver": "GTiff", "height": grid.height, "width": grid.width}
        profile |= {"count": len(content.bands), "dtype": content.dtype, "nodata": content.nodata}
        profile |= {"crs": grid.crs, "transform": grid.transform, "bigtiff": "IF_SAFER"}
        profile |= {"tiled": True, "blockxsize": BLOCK, "blockysize": BLOCK, "compress": "deflate"}
        profile["zlevel"] = 1 if self._format == "cog" else 6  # 1: it is copied soon
        if content.legend is None:  # else GDAL takes three bands for RGB, the fourth for alpha
            profile |= {"photometric": "MINISBLACK", "alpha": "NO"}
        return profile

    def _describe(self, content: Content) -> None:
        self._dataset.update_tags(**self._tags)
        self._dataset.descriptions = content.bands
        self._dataset.scales = [content.scale] * len(content.bands)
        if content.legend is not None:
            colors = {number: (*color, 255) for number, color in enumerate(content.legend.colors)}
            self._dataset.write_colormap(1, colors | {content.nodata: (0, 0, 0, 0)})

    def write(self, rows: np.ndarray) -> None:
        """Append finished rows of the columns begun, (n, width) or (bands, n, width)."""
        rows = rows[None] if rows.ndim == 2 else rows
        left = self._grid.height - self._written - self._filled
        if rows.shape[::2] != self._block.shape[::2] or rows.shape[1] > left:
            raise ValueError(f"{self.path}: {rows.shape} in {self._block.shape}, {left} rows left")
        while rows.shape[1]:
            part = rows[:, : BLOCK - self._filled]
            rows = rows[:, part.shape[1] :]
            self._block[:, self._filled : self._filled + part.shape[1]] = part
            self._filled += part.shape[1]
            if self._filled == BLOCK or self._written + self._filled == self._grid.height:
                self._flush()

    def _flush(self) -> None:
        window = Window(self._col, self._written, self._block.shape[2], self._filled)
        rows = np.ascontiguousarray(self._block[:, : self._filled])
        with _naming(self.path):
            self._dataset.write(rows, window=window)
        self._sums.append((window, zlib.crc32(rows)))
        self._area += self._filled * self._block.shape[2]
        self._written += self._filled
        self._filled = 0

    def _finish(self) -> None:
        if self._area != self._grid.height * self._grid.width:
            of = f"{self._grid.height} rows of {self._grid.width}"
            raise ValueError(f"{self.path}: {self._area} pixels written, expected {of}")
        with _naming(self.path):
            self._dataset.close()
            whole = self._folder / "map.tif"
            check_structure(whole)  # GDAL closes a file on a full disk without a word
            if self._format == "cog":
                source, whole = whole, self._folder / "cog.tif"
                options = {"driver": "COG", "compress": "deflate", "blocksize": BLOCK}
                options |= {"bigtiff": "IF_SAFER", "num_threads": "ALL_CPUS"}
                options["overview_resampling"] = self._content.overviews
                rasterio.shutil.copy(source, whole, **options)
                check_structure(whole)
            self._read_back(whole)
            self._publish(whole)

    def _read_back(self, whole: Path) -> None:
        """Compare what the file holds with what was written: GDAL hides a failing disk."""
        with rasterio.open(whole) as written:
            for window, wanted in self._sums:
                if zlib.crc32(written.read(window=window)) != wanted:
                    rows = f"{window.row_off} to {window.row_off + window.height - 1}"
                    raise RasterError(f"rows {rows} cannot be read back as they were written")

    def _publish(self, whole: Path) -> None:
        aux, legend = self._folder / "map.aux.xml", self._content.legend
        if legend is not None:
            aux.write_text(sidecar(legend), encoding="utf-8")
        publish(whole, self.path)
        for ending in STALE:
            Path(f"{self.path}{ending}").unlink(missing_ok=True)
        if legend is not None:
            publish(aux, Path(f"{self.path}.aux.xml"))

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None:
                self._finish()
