"""Where cached tiles lie on the ground, in metres, so that splits can be judged by distance.

Every tile becomes a polygon in one equal-area projection around the tiles' own centre. Tiles of
scenes without a CRS lie in pixels, each scene far from all others.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
from rasterio._err import CPLE_BaseError  # what rasterio.warp raises; it has no public name
from rasterio.crs import CRS
from rasterio.errors import RasterioError
from rasterio.transform import Affine
from rasterio.warp import transform

from utils.artefacts import write_artefact
from utils.manifest import Manifest, scene_of

APART = 1e9  # metres between scenes that have no place on the Earth
TOUCH = 1e-4  # of a tile's side: what warping may make neighbours overlap by
STEPS = 8  # points along an edge, since what is straight in one CRS is bent in another


class FootprintError(Exception):
    """A tile that has no place on the Earth, though its scene has a CRS."""

    exit_code = 3


class Footprints(NamedTuple):
    """Tiles by name, their outlines in metres, and the CRS of these (None: no place)."""

    names: list[str]
    outlines: np.ndarray
    crs: CRS | None

    def of(self, names: Sequence[str]) -> np.ndarray:
        """The outlines of some of the tiles."""
        place = {name: number for number, name in enumerate(self.names)}
        return self.outlines[[place[name] for name in names]]


def corners(name: str, scene: dict[str, Any], size: int) -> np.ndarray:
    """The four corners (4, 2) of a tile in its scene's map coordinates, clipped to the scene.

    >>> scene = {"height": 1000, "width": 700, "transform": [0.5, 0, 400000, 0, -0.5, 5000000]}
    >>> corners("north__r000512_c000188", scene, 512)[2].tolist()       # at the scene's far corner
    [400350.0, 4999500.0]
    """
    row, col = (int(part[1:]) for part in name.rpartition("__")[2].split("_"))
    rows = row, min(row + size, scene["height"])
    cols = col, min(col + size, scene["width"])
    affine = Affine(*scene["transform"])
    around = ((0, 0), (0, 1), (1, 1), (1, 0))
    return np.array([affine @ (cols[right], rows[down]) for down, right in around])


def rim(points: np.ndarray) -> np.ndarray:
    """Corners (4, 2) with points along the edges between them, (4 * STEPS, 2).

    >>> rim(np.array([(0, 0), (8, 0), (8, 8), (0, 8)]))[:3].tolist()
    [[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]]
    """
    shares = np.linspace(0, 1, STEPS, endpoint=False)[:, None]
    ways = np.roll(points, -1, axis=0) - points
    return (points[:, None] + shares * ways[:, None]).reshape(-1, 2)


def footprints(names: Sequence[str], manifest: Manifest) -> Footprints:
    """The ground footprints of cached tiles."""
    scenes = manifest.scenes
    rims = [rim(corners(name, scenes[scene_of(name)], manifest.tile_size)) for name in names]
    places = {name: scene["crs"] for name, scene in scenes.items()}
    if any(crs is None for crs in places.values()):
        order = {scene: number * APART for number, scene in enumerate(sorted(scenes))}
        rims = [rim + order[scene_of(name)] for name, rim in zip(names, rims, strict=True)]
        return Footprints(list(names), shapely.polygons(np.array(rims)), None)
    degrees = _warped(names, rims, places, CRS.from_epsg(4326))
    lon, lat = middle(degrees.reshape(-1, 2))
    metric = CRS.from_string(f"+proj=laea +lat_0={lat:.6f} +lon_0={lon:.6f} +datum=WGS84 +units=m")
    outlines = shapely.polygons(_warped(names, rims, places, metric))
    return Footprints(list(names), outlines, metric)


def middle(degrees: np.ndarray) -> tuple[float, float]:
    """The mean of longitudes and latitudes (n, 2), on either side of the date line.

    >>> middle(np.array([[179.0, -16.0], [-179.0, -18.0]]))
    (180.0, -17.0)
    """
    turns = np.exp(1j * np.radians(degrees[:, 0])).mean()
    return round(float(np.degrees(np.angle(turns))), 6), round(float(degrees[:, 1].mean()), 6)


def _warped(
    names: Sequence[str], rims: Sequence[np.ndarray], places: dict[str, str], target: CRS
) -> np.ndarray:
    """Rims (tiles, 4 * STEPS, 2) in the target CRS, warped scene by scene."""
    result = np.empty((len(names), 4 * STEPS, 2))
    scenes = np.array([scene_of(name) for name in names])
    for scene in np.unique(scenes):
        chosen = np.flatnonzero(scenes == scene)
        points = np.concatenate([rims[number] for number in chosen])
        try:
            east, north = transform(CRS.from_wkt(places[scene]), target, *points.T)
        except (RasterioError, CPLE_BaseError) as error:
            raise FootprintError(
                f"scene {scene}: some of its tiles lie beyond the Earth that its CRS shows "
                f"({error}); cut the scene, or gdalwarp it"
            ) from error
        result[chosen] = np.stack([east, north], 1).reshape(-1, 4 * STEPS, 2)
    return result


def overlapping(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Pairs (2, n) of outlines that share ground, as places in each; edges in common do not count.

    >>> left, right = shapely.box(0, 0, 256, 256), shapely.box(256, 0, 512, 256)
    >>> overlapping(np.array([left]), np.array([right, left])).tolist()
    [[0], [1]]
    """
    margin = TOUCH * np.sqrt(shapely.area(second))
    inner = shapely.buffer(second, -margin, join_style="mitre")
    return shapely.STRtree(inner).query(first, predicate="intersects")


def near(first: np.ndarray, second: np.ndarray, metres: float) -> np.ndarray:
    """Places in `first` of the outlines within a distance of any in `second`.

    >>> tiles = shapely.box([0, 256, 512], 0, [256, 512, 768], 256)
    >>> near(tiles, tiles[2:], metres=100).tolist()
    [1, 2]
    """
    pairs = shapely.STRtree(second).query(first, predicate="dwithin", distance=metres)
    return np.unique(pairs[0])


def smallest_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Metres between the two sets' nearest members; 0 where they touch.

    >>> tiles = shapely.box([0, 256, 600], 0, [256, 512, 856], 256)
    >>> smallest_distance(tiles[:2], tiles[2:])
    88.0
    """
    _, distances = shapely.STRtree(second).query_nearest(first, return_distance=True)
    return float(distances.min())


def write_sides(
    path: Path, places: Footprints, sides: dict[str, str], classes: dict[str, list[int]]
) -> None:
    """Write the tiles as GeoJSON (EPSG:4326, RFC 7946) with their side and their classes' pixels.

    Tiles without a place on the Earth have no geometry.
    """
    features = []
    outlines = shapely.simplify(places.outlines, TOUCH * np.sqrt(shapely.area(places.outlines)))
    for name, outline in zip(places.names, outlines, strict=True):
        geometry = None
        if places.crs is not None:
            points = np.array(outline.exterior.coords).T
            east, north = transform(places.crs, CRS.from_epsg(4326), *points)
            polygon = shapely.set_precision(shapely.polygons(np.stack([east, north], 1)), 1e-8)
            geometry = json.loads(shapely.to_geojson(shapely.orient_polygons(polygon)))
        properties = {"tile": name, "side": sides.get(name, "dropped"), "classes": classes[name]}
        features.append({"type": "Feature", "properties": properties, "geometry": geometry})
    text = json.dumps({"type": "FeatureCollection", "features": features})
    write_artefact(path, f"{text}\n".encode())
