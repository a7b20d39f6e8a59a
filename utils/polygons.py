"""A class map on disk as polygons: sieved, simplified without slivers, with true ground areas.

Outlines are walked from corner to corner of the pixel grid, so no result depends on how many rows
are read at once. Polygons stay in pixels (col, row) until they are measured and written. They have
a corner wherever three regions meet, so two neighbours have equal points along the border they
share.
"""

import contextlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyogrio
import shapely
from pyogrio.errors import DataLayerError, DataSourceError, FeatureError, GeometryError
from rasterio.errors import RasterioError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from utils.artefacts import replacing
from utils.grids import Grid
from utils.ground import Ground, PolygonError
from utils.opening import MAP, grid_of, open_raster
from utils.regions import Regions

CHUNK = 1 << 19  # corners of the polygons that are measured and written at once
VERTICAL = (0, 2)  # of the ways along a border, region on the right: 0 up, 1 right, 2 down, 3 left
OGR_ERRORS = DataLayerError, DataSourceError, FeatureError, GeometryError
SQLITE = ("-wal", "-shm", "-journal")  # what may lie beside a GeoPackage


class UnwrittenPolygonsError(PolygonError):
    """The disk, or OGR over it, did not take a map's polygons."""

    exit_code = 4


class Corners(NamedTuple):
    """Where a region's border turns or passes a corner of others, and how it comes and goes."""

    rows: np.ndarray
    cols: np.ndarray
    coming: np.ndarray
    going: np.ndarray
    regions: np.ndarray


def corners_of(band: np.ndarray, top: int, kind: type) -> Corners:
    """The corners in a band of regions, by rows; `top` is the grid line below its first row.

    Where a region touches itself diagonally, its border turns away, so that rings stay simple.

    >>> corners_of(np.pad(np.array([[4]]), 1, constant_values=-1), 0, np.uint16).going.tolist()
    [1, 2, 0, 3]
    """
    around = band[:-1, :-1], band[:-1, 1:], band[1:, 1:], band[1:, :-1]  # clockwise
    northwest, northeast, southeast, southwest = around
    plain = (northwest == northeast) & (southwest == southeast)
    plain |= (northwest == southwest) & (northeast == southeast)
    rows, cols = np.nonzero(~plain)
    here = np.stack([part[rows, cols] for part in around], axis=1)
    across, opposite, ahead = (np.roll(here, -steps, axis=1) for steps in (1, 2, 3))
    border = (here >= 0) & (here != across)
    turn = np.where(opposite == here, 3, np.where(ahead == here, 0, 1))  # left, straight, right
    coming = np.broadcast_to((np.arange(4) + 2) % 4, here.shape)
    going = (coming + turn) % 4
    at = np.nonzero(border)[0]
    places = (rows[at] + top).astype(kind), cols[at].astype(kind)
    ways = coming[border].astype(np.uint8), going[border].astype(np.uint8)
    return Corners(*places, *ways, here[border])


def _all_corners(grid: Grid, bands: Iterable[np.ndarray]) -> Corners:
    kind = np.uint16 if max(grid.height, grid.width) < 1 << 16 else np.int32
    columns, top = [[] for _ in Corners._fields], 0
    for band in bands:
        for column, part in zip(columns, corners_of(band, top, kind), strict=True):
            column.append(part)
        top += len(band) - 1
    whole = []
    while columns:  # one after another: they are large
        whole.append(np.concatenate(columns.pop(0)))
    return Corners(*whole)


def following(corners: Corners) -> np.ndarray:
    """The next corner on each corner's ring: on one grid line the n-th start has the n-th end."""
    after = np.empty(len(corners.rows), np.int32)
    for way in range(4):
        starts, ends = (np.flatnonzero(ways == way) for ways in (corners.going, corners.coming))
        if way in VERTICAL:
            starts = starts[np.argsort(corners.cols[starts], kind="stable")]
            ends = ends[np.argsort(corners.cols[ends], kind="stable")]
        after[starts] = ends
    return after


def walk(after: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All corners, ring by ring, and where the rings start; the first is a ring's top left one.

    >>> [part.tolist() for part in walk(np.array([2, 4, 3, 0, 1], np.int32))]
    [[0, 2, 3, 1, 4], [0, 3]]
    """
    successor, seen = memoryview(after), bytearray(len(after))
    order, starts = array("i"), array("i")
    add, corner = order.append, 0
    while (corner := seen.find(0, corner)) >= 0:
        starts.append(len(order))
        step = corner
        while not seen[step]:
            seen[step] = 1
            add(step)
            step = successor[step]
    return np.frombuffer(order, np.int32), np.frombuffer(starts, np.int32)


class Part(NamedTuple):
    """Some of the regions and their polygons in pixels."""

    regions: np.ndarray
    polygons: np.ndarray


def outlines(corners: Corners) -> Iterator[Part]:
    """The regions' polygons, in order; a region's first ring is its shell, the others are holes."""
    order, starts = walk(following(corners))
    lengths = np.diff(starts, append=len(order))
    rings = np.argsort(corners.regions[order[starts]], kind="stable")
    starts, lengths = starts[rings], lengths[rings]
    regions = corners.regions[order[starts]]
    cut = np.flatnonzero(np.diff(regions, prepend=-1))  # shells
    chunk = (np.cumsum(lengths) - lengths)[cut] // CHUNK
    cut = cut[np.diff(chunk, prepend=-1) > 0] if len(cut) else [0]
    for first, last in zip(cut, [*cut[1:], len(rings)], strict=True):
        counts = lengths[first:last]
        shifts = starts[first:last] - np.cumsum(counts) + counts
        at = order[np.arange(counts.sum()) + np.repeat(shifts, counts)]
        points = np.column_stack([corners.cols[at], corners.rows[at]]).astype(float)
        loops = shapely.linearrings(points, indices=np.repeat(np.arange(len(counts)), counts))
        ids, owner = np.unique(regions[first:last], return_inverse=True)
        yield Part(ids, shapely.polygons(loops, indices=owner))


def simplified(parts: Iterable[Part], tolerance: float) -> Iterator[Part]:
    """Polygons with fewer corners, the same on both sides of each border (Visvalingam–Whyatt).

    A corner goes where the triangle with its neighbours is smaller than `tolerance` squared, but
    never where three regions meet or along the rim of the data. In whole pixels no rounding can
    put a corner on the wrong side of a line.
    """
    regions, polygons = map(np.concatenate, zip(*parts, strict=True))
    polygons = shapely.coverage_simplify(polygons, tolerance, simplify_boundary=False)
    ends = np.cumsum(shapely.get_num_coordinates(polygons)) // CHUNK
    cuts = np.flatnonzero(np.diff(ends)) + 1
    yield from map(Part, np.split(regions, cuts), np.split(polygons, cuts))


def write_polygons(
    map_path: Path,
    output: Path,
    classes: Sequence[str],
    min_area: float = 0.0,
    simplify: float = 0.0,
    window: int = 2048,
) -> int:
    """Write the regions of a class map as a layer of polygons; how many there are.

    Regions below `min_area` (m² on the ground) are merged into their neighbours, then outlines are
    simplified by `simplify` (metres at the map's centre), which may make one a little smaller. A
    GeoPackage has the map's CRS, a GeoJSON longitude and latitude; areas are true ones on WGS 84.
    `window` rows are read at a time: it bounds the memory and changes nothing else.

    >>> write_polygons(Path("map.tif"), Path("map.shp"), ["water", "forest"])
    Traceback (most recent call last):
    utils.ground.PolygonError: map.shp: polygons are written as .gpkg or .geojson
    """
    if output.suffix not in WRITERS:
        raise PolygonError(f"{output}: polygons are written as {' or '.join(WRITERS)}")
    with open_raster(map_path, MAP) as dataset:
        try:
            _check(dataset)
            ground = Ground(grid_of(dataset))
            regions = Regions(ground, dataset.nodata, min_area > 0)
            for rows in _read(dataset, len(classes), window):
                regions.feed(rows)
            layer = _layer(ground, regions, classes, min_area, simplify)
            with _renamed(output) as temporary:
                return WRITERS[output.suffix](temporary, output.stem, ground, layer)
        except PolygonError as error:
            raise PolygonError(f"{map_path}: {error}") from error.__cause__
        except OGR_ERRORS as error:
            raise UnwrittenPolygonsError(f"{output}: not written; disk full? ({error})") from error


def _check(dataset: DatasetReader) -> None:
    if dataset.count != 1 or np.dtype(dataset.dtypes[0]).kind not in "ui":
        found = f"{dataset.count} band(s) of {dataset.dtypes[0]}"
        raise PolygonError(f"has {found}; a class map has one band of whole numbers")
    if not grid_of(dataset).georeferenced:
        raise PolygonError("has no CRS or no transform, so its areas are unknown")


def _read(dataset: DatasetReader, num_classes: int, window: int) -> Iterator[np.ndarray]:
    for top in range(0, dataset.height, window):
        height = min(window, dataset.height - top)
        try:
            rows = dataset.read(1, window=Window(0, top, dataset.width, height))
        except RasterioError as error:
            raise PolygonError(f"cannot be read ({error.__cause__ or error})") from error
        wrong = (rows < 0) | (rows >= num_classes)
        if dataset.nodata is not None:
            wrong &= rows != dataset.nodata
        if wrong.any():
            found = f"the value {rows[wrong][0]} is neither a class nor nodata"
            raise PolygonError(f"{found}; classes are 0 to {num_classes - 1}")
        yield rows


class Features(NamedTuple):
    """What a layer holds: polygons in pixels with their fields."""

    class_id: np.ndarray
    names: np.ndarray
    area_m2: np.ndarray
    polygons: np.ndarray


def _layer(
    ground: Ground, regions: Regions, names: Sequence[str], min_area: float, simplify: float
) -> Iterator[Features]:
    region, classes = regions.finish(min_area)
    parts = outlines(_all_corners(ground.grid, regions.bands(region)))
    del region
    if simplify:
        parts = simplified(parts, simplify / np.sqrt(ground.pixel))
    for ids, polygons in parts:
        kinds = classes[ids].astype(np.int32)
        texts = np.array(names, object)[kinds]
        yield Features(kinds, texts, ground.areas(polygons), polygons)


@contextlib.contextmanager
def _renamed(output: Path) -> Iterator[Path]:
    """A file beside `output` that takes its place when it is whole, and leaves nothing if not."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output, output.suffix) as temporary:
        try:
            yield temporary
        finally:
            for journal in SQLITE:
                temporary.with_name(temporary.name + journal).unlink(missing_ok=True)
    for journal in SQLITE:  # of the file that was replaced
        output.with_name(output.name + journal).unlink(missing_ok=True)


def _write_geopackage(path: Path, name: str, ground: Ground, layer: Iterable[Features]) -> int:
    written = 0
    for part in layer:
        polygons = shapely.orient_polygons(shapely.transform(part.polygons, ground.place))
        pyogrio.raw.write(
            path,
            shapely.to_wkb(polygons),
            [part.class_id, part.names, part.area_m2],
            ["class_id", "class", "area_m2"],
            layer=name,
            driver="GPKG",
            geometry_type="Polygon",
            crs=ground.grid.crs.to_wkt(),
            append=written > 0,
        )
        written += len(polygons)
    return written


def _write_geojson(path: Path, name: str, ground: Ground, layer: Iterable[Features]) -> int:
    written = 0
    with path.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        for part in layer:
            shapes = shapely.to_geojson(shapely.orient_polygons(ground.in_degrees(part.polygons)))
            for class_id, text, area, shape in zip(*part[:3], shapes, strict=True):
                fields = {"class_id": int(class_id), "class": text, "area_m2": round(area, 3)}
                file.write(",\n" if written else "\n")
                file.write(f'{{"type": "Feature", "properties": {json.dumps(fields)}, ')
                file.write(f'"geometry": {shape}}}')
                written += 1
        file.write("\n]}\n")
    return written


WRITERS = {".gpkg": _write_geopackage, ".geojson": _write_geojson}
