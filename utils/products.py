"""What a scene's map consists of: rasters that grow as blended pixels are finished."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Inference
from utils.blending import Blend, Part, Strip, carried_rows, strips
from utils.devices import download
from utils.grids import Grid
from utils.journal import Journal, Place, Stored
from utils.maps import (
    BLOCK,
    Content,
    Legend,
    MapWriter,
    class_map,
    confidence_map,
    map_nodata,
    probability_map,
    share_bytes,
)
from utils.metrics import best_class
from utils.tiling import Tile, stride_of

MB = 10**6
WAITING = 2  # batches of predictions that wait for the thread that blends and writes, at most
COG_ROOM = 8 / 3  # of a GeoTIFF, its copy with overviews, and overviews, to a GeoTIFF


class InferenceError(Exception):
    """Scenes that could not be mapped; the others were."""

    exit_code = 3


class Product(NamedTuple):
    """One raster to write: where, what its bands are, and how they come from finished pixels."""

    path: Path
    content: Content
    of: Callable[[Part], np.ndarray]


class Prediction(NamedTuple):
    """A tile's probabilities (K, size, size), None where it has no valid pixel, and its mask."""

    tile: Tile
    probabilities: Tensor | None
    valid: np.ndarray


def classes_of(part: Part) -> np.ndarray:
    """The most probable class of each pixel, nodata where not valid."""
    nodata = map_nodata(len(part.probabilities))
    dtype = torch.uint8 if nodata == 255 else torch.uint16
    classes = torch.full(part.valid.shape, nodata, dtype=dtype)
    if part.valid.any():
        found = download(best_class(part.probabilities).to(dtype))  # only bytes come down
        classes = torch.where(torch.from_numpy(part.valid), found, classes)
    return classes.numpy()


def shares_of(part: Part) -> np.ndarray:
    """The probability of each class as bytes, (classes, height, width)."""
    return share_bytes(download(part.probabilities.clamp(0, 1)).numpy(), part.valid)


def confidence_of(part: Part) -> np.ndarray:
    """The winning class's probability as bytes, (height, width)."""
    return share_bytes(download(part.probabilities.amax(0).clamp(0, 1)).numpy(), part.valid)


def raster_path(path: Path, name: str, several: bool) -> Path:
    """Where a scene's raster goes: the configured path, for several scenes a file in that folder.

    >>> raster_path(Path("maps"), "north", several=True).as_posix()
    'maps/north.tif'
    """
    return path / f"{name}.tif" if several else path


def products_of(section: Inference, name: str, several: bool, legend: Legend) -> list[Product]:
    """The rasters to write for a scene; with several scenes the configured paths are folders."""
    wanted = [
        (section.output_tif, class_map(legend), classes_of),
        (section.probabilities, probability_map(legend), shares_of),
        (section.confidence, confidence_map(), confidence_of),
    ]
    return [
        Product(raster_path(path, name, several), content, of)
        for path, content, of in wanted
        if path is not None
    ]


class Sheet:
    """A product on its way to disk: finished parts, side by side, become rows."""

    def __init__(self, product: Product, writer: MapWriter, most_rows: int) -> None:
        self._product, self._writer, self._most_rows = product, writer, most_rows

    def begin(self, strip: Strip) -> None:
        """Go on with other columns, from the top."""
        content = self._product.content
        shape = (len(content.bands), self._most_rows, strip.stop - strip.start)
        self._first, self._rows = strip.start, np.empty(shape, content.dtype)
        self._writer.begin(strip.start, strip.stop)

    def put(self, part: Part) -> np.ndarray | None:
        """Take a part; returns the rows (bands, n, width) when it is the last of them."""
        height, width, start = part.place.height, part.place.width, part.place.col - self._first
        self._rows[:, :height, start : start + width] = self._product.of(part)
        return self._rows[:, :height] if start + width == self._rows.shape[2] else None

    def write(self, rows: np.ndarray) -> None:
        """Append finished rows."""
        self._writer.write(rows)


class Mosaic:
    """Takes predictions tile by tile, blends them and puts what is finished on each sheet.

    strips: the columns to map, one after the other; rows: where the rows of tiles start; blend:
    makes the blend of a strip. Rows that are in the journal are taken from it. The methods are
    called by one thread only.
    """

    def __init__(
        self,
        strips: Sequence[Strip],
        rows: Sequence[int],
        blend: Callable[[Strip], Blend],
        sheets: Sequence[Sheet],
        journal: Journal,
    ) -> None:
        self._strips, self._rows, self._blend_of = list(strips), list(rows), blend
        self._sheets, self._journal = sheets, journal
        self._blend: Blend | None = None

    def missing(self, strip: Strip) -> int | None:
        """The first row of tiles of a strip that is not in the journal; None if all are."""
        return next(
            (row for row in self._rows if (strip.start, row) not in self._journal.places), None
        )

    def take(self, strip: Strip, prediction: Prediction) -> None:
        """Add the next tile of a strip; what it finishes is written if it was missing."""
        while self._blend is None or self._blend.strip != strip:
            self._begin_next()
        part = self._blend.feed(*prediction)
        if part is None or self._from is None or part.place.row < self._from:
            return
        self._check(part, prediction.tile)
        rows = [sheet.put(part) for sheet in self._sheets]
        if rows[0] is not None:
            self._journal.keep((strip.start, part.place.row), rows)
            self._append(rows)

    def finish(self) -> None:
        """Write strips of which no tile had to be predicted."""
        while self._strips:
            self._begin_next()

    def _begin_next(self) -> None:
        strip = self._strips.pop(0)
        self._blend = None  # first, so that two strips are never held at once
        self._blend = self._blend_of(strip)
        self._from = self.missing(strip)
        for sheet in self._sheets:
            sheet.begin(strip)
        for row in self._rows:
            if row == self._from:
                break
            self._append(self._journal.read((strip.start, row)))

    def _append(self, rows: Sequence[np.ndarray]) -> None:
        for sheet, part in zip(self._sheets, rows, strict=True):
            sheet.write(part)

    def _check(self, part: Part, tile: Tile) -> None:
        if not torch.isfinite(part.probabilities.sum()):
            raise InferenceError(
                f"tile {tile.name}: probabilities are not finite; the head's or the "
                "backbone's weights are damaged, or resources.precision does not suit them"
            )


def room_for(products: Sequence[Product], read: Grid, own: Grid, format: str) -> list[int]:
    """Bytes that each raster of a scene takes at most on its way, as if nothing got smaller.

    That is its rows in the journal; a draft where the scene is read on another grid than its own;
    the GeoTIFF; and for a COG the copy with overviews, and these once more while they are made.

    >>> grid, legend = Grid(None, None, height=100, width=300), Legend(("a",), ((0, 0, 0),))
    >>> room_for([Product(Path("map.tif"), class_map(legend), classes_of)], grid, grid, "gtiff")
    [60000]
    """
    before = read.height * read.width * (1 if read == own else 2)
    written = own.height * own.width * (COG_ROOM if format == "cog" else 1)
    sizes = (len(each.content.bands) * np.dtype(each.content.dtype).itemsize for each in products)
    return [round(size * (before + written)) for size in sizes]


def stored_rows(
    strips: Sequence[Strip], rows: Sequence[int], height: int, products: Sequence[Product]
) -> dict[Place, list[Stored]]:
    """How the finished rows of each place of a map lie in memory, raster by raster.

    rows: where the rows of tiles start; each is finished down to where the next one starts.
    """
    contents = [product.content for product in products]
    return {
        (strip.start, row): [
            Stored((len(each.bands), below - row, strip.stop - strip.start), each.dtype)
            for each in contents
        ]
        for strip in strips
        for row, below in zip(rows, [*rows[1:], height], strict=True)
    }


def blend_of(
    section: Inference, grid: Grid, num_classes: int, device: torch.device
) -> Callable[[Strip], Blend]:
    """What makes the blend of a strip as the configuration wants it."""
    whole = (grid.height, grid.width, section.tile_size, section.overlap, num_classes, device)
    return partial(Blend, *whole, section.blend)


def work_left(
    work: Sequence[tuple[Strip, Tile]], mosaic: Mosaic, batch: int
) -> Sequence[tuple[Strip, Tile]]:
    """The tiles from the first on that adds to a missing row.

    Whole batches are left out only, so that the others are the same as in a run from the start.
    """
    missing = {strip: mosaic.missing(strip) for strip, _ in work}
    for number, (strip, tile) in enumerate(work):
        if missing[strip] is not None and tile.row + tile.height > missing[strip]:
            return work[number // batch * batch :]
    return []


class Layout(NamedTuple):
    """How a scene is mapped: its columns, batches that wait to be blended, bytes held at most.

    >>> Layout([Strip(0, 5120), Strip(5120, 8000)], waiting=2, nbytes=10**9).strips[1].start
    5120
    """

    strips: list[Strip]
    waiting: int
    nbytes: int


def layout_of(
    section: Inference, grid: Grid, products: Sequence[Product], num_classes: int, batch: int
) -> Layout:
    """What stays within `inference.max_memory` with the fewest strips; if nothing does, the least.

    Batches are left as they are, since a network may round otherwise in one of another size.
    """
    most = section.max_memory * MB
    found = [
        layout
        for waiting in range(WAITING, 0, -1)
        for layout in layouts(section, grid, products, num_classes, batch, waiting)
    ]
    return min(found, key=lambda layout: (max(layout.nbytes, most), len(layout.strips)))


def layouts(
    section: Inference, grid: Grid, products: Sequence[Product], num_classes: int, batch: int,
    waiting: int,
) -> list[Layout]:  # fmt: skip
    """The scene in one piece, and in strips as wide as `inference.max_memory` lets them be.

    Held are, at any width, the blend's two tiles of sums and the batches: those that wait, and the
    one that is to. By the column: what a row of tiles leaves to the next, and rows to be written.
    """
    size, width = section.tile_size, grid.width
    pixel = 4 * num_classes
    always = pixel * size**2 * (2 + (waiting + 1) * batch)
    carried = pixel * carried_rows(grid.height, size, stride_of(size, section.overlap))
    rows = min(size, grid.height) + BLOCK  # of a row of tiles, and of the block being filled
    values = sum(len(p.content.bands) * np.dtype(p.content.dtype).itemsize for p in products)
    column, beside = carried + rows * values, always + 2 * size * carried  # tiles reach beyond
    whole = always + carried * max(width, size) + rows * values * width
    parts = strips(width, column, section.max_memory * MB - beside, BLOCK)
    widest = max(stop - start for start, stop in parts)
    return [
        Layout([Strip(0, width)], waiting, whole),
        Layout(parts, waiting, beside + column * widest),
    ]
