"""Polygons burnt on a grid, window by window: the same pixel gets the same id from every window.

Every window is put together from fixed squares of the grid, since GDAL's rasterizer may decide
otherwise about a pixel on an edge when it starts elsewhere.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import shapely
from rasterio.features import rasterize
from rasterio.transform import Affine
from shapely.geometry import Polygon, box

from utils.grids import Grid
from utils.tiling import Tile
from utils.vectors import Shapes

SQUARE = 256  # pixels; every window is put together from the same squares of the grid
SMALL = 32  # vertices; a shorter ring is burnt as it is, whatever lies outside the window


class _Rings(NamedTuple):
    """Polygons to burn, as (col, row) on the grid: rings without their closing vertex, in order."""

    rings: list[np.ndarray]
    ids: np.ndarray  # what each ring's polygon burns
    polygons: np.ndarray  # the number of each ring's polygon
    low: np.ndarray  # (rings, 2): the box around each
    high: np.ndarray


def burn(
    shapes: Shapes,
    ids: Sequence[int | None],
    grid: Grid,
    tile: Tile,
    fill: int,
    all_touched: bool,
) -> np.ndarray:
    """The ids of the shapes (in the grid's CRS) on a tile's pixels, (height, width) int32.

    A pixel belongs to the last shape that holds its centre, or that meets it with all_touched;
    fill is where none does, and past the grid. Shapes with id None are not burnt. The same pixel
    gets the same id from every tile.

    >>> from utils.vectors import WGS84
    >>> roofs = Shapes(np.array([box(1, 0, 4, 1)]), ("tin",), WGS84, "roofs.gpkg")
    >>> from utils.grids import north_up
    >>> grid = north_up("EPSG:4326", left=0, top=2, gsd=1, height=2, width=5)
    >>> burn(roofs, [7], grid, Tile(0, 0, 2, 5), fill=0, all_touched=False).tolist()
    [[0, 0, 0, 0, 0], [0, 7, 7, 7, 0]]
    """
    if len(ids) != len(shapes):
        raise ValueError(f"{len(ids)} ids for {len(shapes)} shapes: take them from these shapes")
    label = np.full((tile.height, tile.width), fill, np.int32)
    top, left = max(tile.row, 0), max(tile.col, 0)
    bottom = min(tile.row + tile.height, grid.height)
    right = min(tile.col + tile.width, grid.width)
    if top >= bottom or left >= right:
        return label
    rows = range(top // SQUARE * SQUARE, bottom, SQUARE)
    cols = range(left // SQUARE * SQUARE, right, SQUARE)
    outer = Tile(rows[0], cols[0], len(rows) * SQUARE, len(cols) * SQUARE)
    rings = _rings_on(shapes, ids, grid, outer)
    for row in rows:
        for col in cols:
            square = _burn_square(rings, Tile(row, col, SQUARE, SQUARE), fill, all_touched)
            upper, lower = max(row, top), min(row + SQUARE, bottom)
            first, last = max(col, left), min(col + SQUARE, right)
            inside = np.s_[upper - tile.row : lower - tile.row, first - tile.col : last - tile.col]
            label[inside] = square[upper - row : lower - row, first - col : last - col]
    return label


def _rings_on(shapes: Shapes, ids: Sequence[int | None], grid: Grid, tile: Tile) -> _Rings:
    """The shapes that meet a tile, as pixel coordinates, without their far vertices."""
    start, stop = _margin(tile)
    corners = shapely.get_coordinates(box(*start, *stop))
    met = shapes.tree.query(Polygon([grid.transform @ tuple(corner) for corner in corners]))
    met = np.array([number for number in np.sort(met) if ids[number] is not None], int)
    rings, polygons = shapely.get_rings(shapes.polygons[met], return_index=True)
    xy, ring_of = shapely.get_coordinates(rings, return_index=True)
    a, b, c, d, e, f, *_ = grid.transform
    # not as a matrix product: BLAS rounds by the size of its input, which depends on the window
    pixels = np.column_stack(~Affine(a, b, 0, d, e, 0) @ (xy[:, 0] - c, xy[:, 1] - f))
    starts = np.flatnonzero(np.diff(ring_of, prepend=-1))
    parts = np.split(pixels, starts[1:]) if len(starts) else []
    return _Rings(
        [_prune(part[:-1], tile) for part in parts],
        np.array([ids[number] for number in met], int)[polygons],
        polygons,
        np.minimum.reduceat(pixels, starts) if parts else pixels,
        np.maximum.reduceat(pixels, starts) if parts else pixels,
    )


def _margin(tile: Tile) -> tuple[np.ndarray, np.ndarray]:
    """Upper left and lower right (col, row), one pixel outside the tile."""
    start = np.array((tile.col, tile.row)) - 1
    return start, start + (tile.width + 2, tile.height + 2)


def _prune(ring: np.ndarray, tile: Tile) -> np.ndarray:
    """A ring without vertices that cannot matter to the tile.

    On one side of the tile a run of vertices may be replaced by the straight line between its ends:
    neither the edges that meet the tile nor what they enclose there change.
    """
    if len(ring) <= SMALL:
        return ring
    start, stop = _margin(tile)
    for axis in (0, 1):
        for sign, limit in ((-1, -start[axis]), (1, stop[axis])):
            beyond = sign * ring[:, axis] > limit
            ring = ring[~(beyond & np.roll(beyond, 1) & np.roll(beyond, -1))]
    return ring


def _burn_square(rings: _Rings, square: Tile, fill: int, all_touched: bool) -> np.ndarray:
    label = np.full((square.height, square.width), fill, np.int32)
    start, stop = _margin(square)
    polygons: dict[int, tuple[dict[str, Any], int]] = {}
    for number in np.flatnonzero(((rings.low <= stop) & (rings.high >= start)).all(1)):
        ring = _prune(rings.rings[number], square) - (square.col, square.row)
        if len(ring) >= 3:  # what is left of others encloses nothing here
            blank = {"type": "Polygon", "coordinates": []}
            polygon, _ = polygons.setdefault(
                rings.polygons[number], (blank, int(rings.ids[number]))
            )
            polygon["coordinates"].append(np.vstack([ring, ring[:1]]).tolist())
    if polygons:
        rasterize(polygons.values(), out=label, all_touched=all_touched)
    return label
