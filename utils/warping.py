"""Which pixel of one raster lies under each pixel of another: nearest neighbour, in any CRS.

A pixel's centre is carried over, and the pixel that it falls into counts; within TIE of a border it
is the one to the right or below. The same pixel gets the same answer from every window.

In one CRS that is a matrix. Between two, PROJ's answer is exact but slow and almost everywhere
smooth: on each of the grid's fixed squares a polynomial through a few exact places stands for it,
once it has met other exact places between them within CLOSE. Where it has not (the rim of a
projection, 180 degrees), the square has no places, and GDAL's warper is to be asked.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from rasterio.env import Env
from rasterio.transform import Affine
from rasterio.warp import transform
from rasterio.windows import Window

from utils.grids import NO_PLACE, Grid
from utils.tiling import Tile

SQUARE = 256  # pixels; the squares on which a polynomial stands for PROJ
CLOSE = 1e-6  # pixels between the polynomial and an exact place
TIE = 1e-6  # pixels; a place this close to a border lies on it, and so right of or below it
LARGEST_READ = 2**22  # pixels read at once, however fine the raster below is
# as shares of a square's side: Chebyshev points, which the polynomial goes through, and a lattice
NODES = 0.5 - 0.5 * np.cos(np.pi * (np.arange(5) + 0.5) / 5)
CHECKS = np.linspace(0, 1, 6)
LATTICE = np.array(  # both as (row, col)
    [*itertools.product(NODES, repeat=2), *itertools.product(CHECKS, repeat=2)]
).T


class Places(NamedTuple):
    """Rows and columns of the raster below, int32 that broadcast to a window's shape.

    From -1, which is before the first, to the raster's height or width, which is past the last.
    """

    rows: np.ndarray
    cols: np.ndarray


class Stored(NamedTuple):
    """Values as stored and where they count; None for everywhere."""

    values: np.ndarray
    valid: np.ndarray | None


class Overlay:
    """A grid laid over a raster that may lie in another CRS.

    >>> from utils.grids import north_up
    >>> scene = north_up("EPSG:32633", 412000, 5326000, 0.5, 1408, 1408)
    >>> label = north_up("EPSG:32633", 411999, 5326001, 2.0, 352, 352)
    >>> [(_, places)] = Overlay(scene, label).parts(Tile(0, 0, 1, 5))
    >>> places.rows.tolist(), places.cols.tolist()
    ([[0]], [[0, 0, 1, 1, 1]])
    """

    def __init__(self, grid: Grid, raster: Grid) -> None:
        self.grid, self.raster = grid, raster
        self._matrix = matrix_between(grid, raster)

    @property
    def complete(self) -> bool:
        """Whether no part can be without places."""
        return self._matrix is not None

    def parts(self, tile: Tile) -> Iterator[tuple[Tile, Places | None]]:
        """The parts of a tile inside the grid, with their places; None where only GDAL knows them.

        PROJ is asked for whole squares of the grid, so a tile's bounds change no place.
        """
        matrix = self._matrix
        if matrix is not None and not (matrix.b or matrix.d):
            yield tile, self._by_matrix(tile, matrix)
            return
        squares = list(self._squares(tile))
        if matrix is not None:
            yield from ((part, self._by_matrix(part, matrix)) for part, _ in squares)
            return
        with Env.from_defaults():  # or rasterio looks for the data of PROJ at each call
            exact = [self._exact(square) for _, square in squares]
        for (part, square), places in zip(squares, exact, strict=True):
            yield part, self._by_polynomial(part, square, places)

    def _squares(self, tile: Tile) -> Iterator[tuple[Tile, Tile]]:
        """The parts of a tile, each with the whole square of the grid that it lies in."""
        bottom, right = tile.row + tile.height, tile.col + tile.width
        for top in range(tile.row // SQUARE * SQUARE, bottom, SQUARE):
            for left in range(tile.col // SQUARE * SQUARE, right, SQUARE):
                row, col = max(top, tile.row), max(left, tile.col)
                height, width = min(top + SQUARE, bottom) - row, min(left + SQUARE, right) - col
                below, beside = self.grid.height - top, self.grid.width - left
                square = Tile(top, left, min(SQUARE, below), min(SQUARE, beside))
                yield Tile(row, col, height, width), square

    def _by_matrix(self, part: Tile, matrix: Affine) -> Places:
        a, b, c, d, e, f, *_ = matrix
        rows = np.arange(part.row, part.row + part.height)[:, None] + 0.5
        cols = np.arange(part.col, part.col + part.width)[None] + 0.5
        below, right = e * rows + f, a * cols + c
        if b or d:
            below, right = below + d * cols, right + b * rows
        return self._floored(below, right)

    def _by_polynomial(self, part: Tile, square: Tile, exact: np.ndarray) -> Places | None:
        """The places of a part of a square whose lattice has these exact ones."""
        if not np.isfinite(exact).all():
            return None
        at_nodes = exact[:, : NODES.size**2].reshape(2, NODES.size, -1)
        at_checks = exact[:, NODES.size**2 :].reshape(2, CHECKS.size, -1)
        if np.abs(AT_CHECKS @ at_nodes @ AT_CHECKS.T - at_checks).max() > CLOSE:
            return None
        found = at_centres(square.height) @ at_nodes @ at_centres(square.width).T  # (2, h, w)
        row, col = part.row - square.row, part.col - square.col
        return self._floored(*found[:, row : row + part.height, col : col + part.width])

    def _exact(self, square: Tile) -> np.ndarray:
        """Where PROJ puts a square's lattice, (row, col) in the raster below (2, n); inf if not."""
        rows = square.row + square.height * LATTICE[0]
        cols = square.col + square.width * LATTICE[1]
        x, y = self.grid.transform @ (cols, rows)
        try:
            x, y = np.array(transform(self.grid.crs, self.raster.crs, x, y))
        except NO_PLACE:
            return np.full((2, 1), np.inf)
        left, top = self.raster.transform.c, self.raster.transform.f
        with np.errstate(invalid="ignore"):
            cols, rows = ~starting_at(self.raster, left, top) @ (x - left, y - top)
        return np.stack([rows, cols])

    def _floored(self, rows: np.ndarray, cols: np.ndarray) -> Places:
        found = []
        for each, length in ((rows, self.raster.height), (cols, self.raster.width)):
            each += TIE
            np.clip(each, -1, length, out=each)
            np.floor(each, out=each)
            found.append(each.astype(np.int32))
        return Places(*found)


def matrix_between(grid: Grid, raster: Grid) -> Affine | None:
    """The matrix from one grid's (col, row) to another's in the same CRS; None where they differ.

    Rasters without a place on the Earth lie on each other pixel by pixel.
    """
    if not grid.georeferenced:
        return Affine.identity()
    if grid.crs != raster.crs:
        return None
    left, top = raster.transform.c, raster.transform.f
    between = ~starting_at(raster, left, top) @ starting_at(grid, left, top)
    a, b, c, d, e, f, *_ = between
    turned = max(abs(b) * grid.height, abs(d) * grid.width) > TIE / 1000
    return between if turned else Affine(a, 0, c, 0, e, f)


def starting_at(grid: Grid, left: float, top: float) -> Affine:
    """A grid's transform in a CRS that starts there: small numbers, so that no digits are lost."""
    a, b, c, d, e, f, *_ = grid.transform
    return Affine(a, b, c - left, d, e, f - top)


def basis(shares: np.ndarray) -> np.ndarray:
    """Each node's part (n, nodes) in the polynomial's value at some shares of a square's side.

    >>> (basis(CHECKS) @ NODES**4).round(9).tolist()
    [0.0, 0.0016, 0.0256, 0.1296, 0.4096, 1.0]
    """
    parts = [
        np.prod([(shares - other) / (node - other) for other in NODES if other != node], axis=0)
        for node in NODES
    ]
    return np.stack(parts, 1)


AT_CHECKS = basis(CHECKS)


@lru_cache(maxsize=64)
def at_centres(length: int) -> np.ndarray:
    """The basis at the centres of so many pixels along a square's side."""
    return basis((np.arange(length) + 0.5) / length)


def gather(places: Places, raster: Grid, read: Callable[[Window], Stored]) -> Stored:
    """What lies at some places of a raster that is read by windows; not valid outside it.

    >>> numbers = np.arange(12).reshape(3, 4)
    >>> def read(window):
    ...     return Stored(numbers[tuple(slice(*bounds) for bounds in window.toranges())], None)
    >>> places = Places(np.array([[1], [2], [3]]), np.array([[2, 3]]))
    >>> values, valid = gather(places, Grid(None, Affine.identity(), 3, 4), read)
    >>> values.tolist(), valid.all(1).tolist()
    ([[6, 7], [10, 11], [0, 0]], [True, True, False])
    """
    rows, cols = places
    top, bottom = int(rows.min()), int(rows.max()) + 1
    left, right = int(cols.min()), int(cols.max()) + 1
    if (bottom - top) * (right - left) > LARGEST_READ and max(rows.size, cols.size) > 1:
        return _in_halves(places, raster, read)
    patch = _patch(Window(left, top, right - left, bottom - top), raster, read)
    if rows.shape[1] == cols.shape[0] == 1:
        rows, cols = _steps(rows.ravel() - top), _steps(cols.ravel() - left)
        return Stored(*(part if part is None else part[rows][:, cols] for part in patch))
    places = (rows - top) * (right - left) + (cols - left)
    return Stored(*(part if part is None else part.ravel().take(places) for part in patch))


def _in_halves(places: Places, raster: Grid, read: Callable[[Window], Stored]) -> Stored:
    both = np.broadcast_arrays(*places)
    axis = int(np.argmax(both[0].shape))
    halves = zip(*(np.array_split(each, 2, axis) for each in both), strict=True)
    found = [gather(Places(*half), raster, read) for half in halves]
    values = np.concatenate([each.values for each in found], axis)
    if all(each.valid is None for each in found):
        return Stored(values, None)
    full = [np.ones(v.shape, bool) if valid is None else valid for v, valid in found]
    return Stored(values, np.concatenate(full, axis))


def _patch(window: Window, raster: Grid, read: Callable[[Window], Stored]) -> Stored:
    """A window that may reach one pixel past the raster, where nothing is valid."""
    (top, bottom), (left, right) = window.toranges()
    sides = (
        (max(0, -top), max(0, bottom - raster.height)),
        (max(0, -left), max(0, right - raster.width)),
    )
    height = bottom - top - sum(sides[0])
    width = right - left - sum(sides[1])
    if height <= 0 or width <= 0:
        shape = bottom - top, right - left
        return Stored(np.zeros(shape, np.uint8), np.zeros(shape, bool))
    values, valid = read(Window(max(left, 0), max(top, 0), width, height))
    if not any(map(any, sides)):
        return Stored(values, valid)
    valid = np.ones(values.shape, bool) if valid is None else valid
    return Stored(np.pad(values, sides), np.pad(valid, sides))


def _steps(places: np.ndarray) -> np.ndarray | slice:
    """Places along one axis; a slice, which copies nothing, where they are all one apart."""
    one_apart = np.array_equal(places, np.arange(len(places)))
    return slice(0, len(places)) if one_apart else places
