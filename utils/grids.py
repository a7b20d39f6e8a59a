"""Where a raster's pixels lie: CRS, transform and size, and what follows from them."""

import contextlib
from typing import NamedTuple

import numpy as np
from rasterio._err import CPLE_BaseError  # what rasterio.warp raises; it has no public name
from rasterio.crs import CRS
from rasterio.transform import Affine
from rasterio.warp import transform, transform_geom
from shapely.geometry import Polygon, mapping, shape

NO_PLACE = (CPLE_BaseError, SystemError)  # what rasterio.warp raises for points beyond a CRS


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


def extent_of(grid: Grid) -> str:
    """A grid's bounds in degrees, so that two CRSs can be compared at a glance."""
    return extent_of_outline(grid.footprint(), grid.crs)


def extent_of_outline(outline: Polygon, crs: CRS) -> str:
    """A polygon's bounds in degrees; in its own units where it reaches past the Earth's rim."""
    with contextlib.suppress(*NO_PLACE):
        west, south, east, north = warp_outline(outline, crs, CRS.from_epsg(4326)).bounds
        return f"{west:.5f}..{east:.5f} E, {south:.5f}..{north:.5f} N"
    left, bottom, right, top = outline.bounds
    return f"{left:.7g}..{right:.7g}, {bottom:.7g}..{top:.7g} in its own CRS"
