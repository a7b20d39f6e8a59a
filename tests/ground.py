"""Tiles on the ground for tests of footprints and splits: scenes in any CRS, without any file."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import shapely
from rasterio.crs import CRS
from rasterio.warp import transform

from utils.footprints import Footprints, corners, footprints
from utils.tiling import tiles

UTM = "EPSG:32633"
SIZE = 64  # pixels along a tile's side


def scene(
    height: int = 256,
    width: int = 256,
    left: float = 412000,
    top: float = 5326000,
    gsd: float = 0.5,
    crs: str | None = UTM,
    skew: float = 0.0,
) -> dict[str, Any]:
    """What a manifest says of a scene; skew: radians that it is turned by."""
    a, b = gsd * np.cos(skew), gsd * np.sin(skew)
    place = [float(a), float(b), left, float(b), float(-a), top]
    if crs is None:
        place = [1.0, 0, 0, 0, 1.0, 0]
    wkt = None if crs is None else CRS.from_user_input(crs).to_wkt()
    return {
        "bytes": 1, "modified": 2, "height": height, "width": width, "crs": wkt, "transform": place,
    }  # fmt: skip


def laid(size: int = SIZE, **scenes: dict[str, Any]) -> Footprints:
    """The footprints of all tiles of some scenes."""
    names = [
        f"{name}__{tile.name}"
        for name, about in sorted(scenes.items())
        for tile in tiles(about["height"], about["width"], size)
    ]
    return footprints(names, SimpleNamespace(scenes=scenes, tile_size=size))


def boxes(cells: Sequence[tuple[int, int]], side: float = 32.0) -> Footprints:
    """Tiles at (row, col) cells of one scene, north up, without a CRS."""
    row, col = np.array(sorted(cells)).T * side
    names = [f"north__r{64 * r:06d}_c{64 * c:06d}" for r, c in sorted(cells)]
    return Footprints(names, shapely.box(col, -row - side, col + side, -row), None)


def alike(places: Footprints, classes: int = 3) -> np.ndarray:
    """Pixels per class that are the same in every tile."""
    return np.full((len(places.names), classes), 100)


def moved(crs: str, target: str, *points: tuple[float, float]) -> list[tuple[float, float]]:
    """Points (east, north) in another CRS."""
    source, target = CRS.from_string(crs), CRS.from_string(target)
    east, north = transform(source, target, *zip(*points, strict=True))
    return list(zip(east, north, strict=True))


def on_utm(about: dict[str, Any], name: str, crs: str) -> shapely.Polygon:
    """A tile's outline by its corners in a UTM zone."""
    rim = corners(name, about, SIZE)
    return shapely.Polygon(moved(CRS.from_wkt(about["crs"]).to_string(), crs, *rim))
