"""A grid's pixels on the Earth: sizes in metres, true areas, degrees."""

import numpy as np
import shapely
from rasterio._err import CPLE_BaseError
from rasterio.crs import CRS
from rasterio.errors import CRSError, RasterioError
from rasterio.warp import transform as transform_points

from utils.grids import Grid

KNOTS = (1024, 64)  # rows and columns at most whose pixels are measured; between them: interpolated
CHUNK = 1 << 19  # points that are warped at once
DECIMALS = 9  # of a degree in GeoJSON: 0.1 mm
EARTH = 6371e3  # metres
LONGEST = 20e3  # metres of an edge that a parabola follows well when the map is warped
NOWHERE = "reaches beyond what its CRS can place on the Earth; cut it or gdalwarp it"
DEGREES = CRS.from_epsg(4326)


class PolygonError(Exception):
    """A map that cannot become polygons, with what was found and what helps."""

    exit_code = 3


class Ground:
    """A grid's pixels on the Earth: the size of the one at the centre, areas, degrees."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        shape = np.array([grid.width, grid.height])
        frame = self.warp(np.indices((3, 3)).reshape(2, 9).T * shape / 2, DEGREES)
        self._lon, lat = frame[4].clip((-np.inf, -90), (np.inf, 90))
        local = CRS.from_string(f"+proj=laea +lat_0={lat} +lon_0={self._lon} +datum=WGS84")
        cylinder = f"+proj=cea +lon_0={self._lon} +datum=WGS84"
        if grid.crs.is_geographic:  # a map of the whole Earth meets its first meridian again
            self._equal_area = CRS.from_string(f"{cylinder} +over")
        else:  # a pole is nowhere on the cylinder
            polar = np.abs(frame[:, 1]).max() > 75
            self._equal_area = local if polar else CRS.from_string(cylinder)
        steps = np.array([(-0.5, 0), (0.5, 0), (0, -0.5), (0, 0.5)])
        west, east, north, south = self.warp(shape / 2 + steps, local)
        right, down = east - west, south - north
        self.edges = np.hypot(*right), np.hypot(*down)  # metres of a pixel's top and side
        self.pixel = abs(right[0] * down[1] - right[1] * down[0])  # square metres
        self._lines = [
            np.linspace(0, length - 1, min(length, most))
            for length, most in zip((grid.height, grid.width), KNOTS, strict=True)
        ]
        rows, cols = np.meshgrid(*self._lines, indexing="ij")
        squares = shapely.box(cols, rows, cols + 1, rows + 1).ravel()
        self._knots = self.areas(squares).reshape(rows.shape)

    def warp(self, points: np.ndarray, crs: CRS) -> np.ndarray:
        """Points (n, 2) in pixels as points in a CRS."""
        warped = np.empty(points.shape)
        try:
            for start in range(0, len(points), CHUNK):
                xs, ys = self.place(points[start : start + CHUNK]).T
                warped[start : start + CHUNK] = np.transpose(
                    transform_points(self.grid.crs, crs, xs, ys)
                )
        except (CPLE_BaseError, CRSError, RasterioError) as error:  # what GDAL says of a point
            raise PolygonError(f"{NOWHERE} ({error})") from error
        if not np.isfinite(warped).all():
            raise PolygonError(NOWHERE)
        return warped

    def place(self, points: np.ndarray) -> np.ndarray:
        """Points (n, 2) in pixels as points of the map's own CRS."""
        return np.column_stack(self.grid.transform @ (points[:, 0], points[:, 1]))

    def in_degrees(self, polygons: np.ndarray) -> np.ndarray:
        """Polygons in pixels as longitude and latitude, without a jump at the antimeridian."""
        if self.grid.crs.is_geographic:
            return shapely.transform(polygons, lambda at: self.warp(at, DEGREES).round(DECIMALS))
        west = self._lon - 180

        def place(points: np.ndarray) -> np.ndarray:
            lonlat = self.warp(points.round(6), DEGREES)  # equal points of neighbours stay equal
            lonlat[:, 0] = (lonlat[:, 0] - west) % 360 + west
            return lonlat.round(DECIMALS)

        most = np.sqrt(0.4 * EARTH / min(self.edges))  # pixels: longer edges miss the map's by 1/20
        return shapely.transform(shapely.segmentize(polygons, most), place)

    def pixel_areas(self, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
        """Square metres of the pixels at these places, which may be between two pixels."""
        (row, beyond, down), (col, beside, right) = map(_between, self._lines, (rows, cols))
        knots = self._knots
        upper = knots[row, col] * (1 - right) + knots[row, beside] * right
        lower = knots[beyond, col] * (1 - right) + knots[beyond, beside] * right
        return upper * (1 - down) + lower * down

    def areas(self, polygons: np.ndarray) -> np.ndarray:
        """True square metres of polygons in pixels; the middle of each edge is warped as well.

        >>> from utils.grids import north_up
        >>> degree = north_up("EPSG:4326", left=0, top=1, gsd=1, height=1, width=1)
        >>> round(Ground(degree).areas(shapely.box([0], [0], [1], [1]))[0])
        12308463894
        """
        polygons = shapely.segmentize(polygons, LONGEST / max(self.edges))
        rings, owner = shapely.get_rings(polygons, return_index=True)
        corners, ring = shapely.get_coordinates(rings, return_index=True)
        flat = self.warp(corners, self._equal_area)
        middle = self.warp((corners[:-1] + corners[1:]) / 2, self._equal_area)
        origin = flat[np.flatnonzero(np.diff(ring, prepend=-1))][ring]
        flat, middle = flat - origin, middle - origin[:-1]  # near zero, products keep their digits
        chord = _cross(flat[:-1], flat[1:])
        arc = (4 * (_cross(flat[:-1], middle) + _cross(middle, flat[1:])) - chord) / 3  # a parabola
        edge = ring[1:] == ring[:-1]
        inside = np.abs(np.bincount(ring[1:][edge], arc[edge])) / 2
        shell = np.diff(owner, prepend=-1) > 0
        return np.bincount(owner, np.where(shell, inside, -inside), len(polygons))


def _cross(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]


def _between(lines: np.ndarray, places: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The line before each place, the line behind it, and the way from the first to the place."""
    scaled = places * ((len(lines) - 1) / max(lines[-1], 1))
    before = scaled.astype(np.intp)
    return before, np.minimum(before + 1, len(lines) - 1), scaled - before
