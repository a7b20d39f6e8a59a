"""Polygons on disk, and the class map they become on a scene's pixels, window by window.

GeoJSON is read with the standard library and shapely; GeoPackage, Shapefile and FlatGeobuf through
pyogrio. Attribute values stay as the file has them; `value_key` tells which of them are the same.
"""

import difflib
import json
import math
import re
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyogrio
import shapely
from pyogrio.errors import DataLayerError, DataSourceError
from pyogrio.raw import read as read_ogr
from rasterio._err import CPLE_BaseError  # what rasterio.warp raises; it has no public name
from rasterio.crs import CRS
from rasterio.warp import transform
from shapely import STRtree
from shapely.errors import ShapelyError
from shapely.geometry import Polygon, box, shape

from utils.grids import Grid, warp_outline
from utils.limits import MEBIBYTE, limited_bytes

LARGEST_GEOJSON = 1024 * MEBIBYTE  # read whole, it takes ten times as much memory
STARTS = {".gpkg": b"SQLite format 3\0", ".shp": b"\0\0\x27\x0a", ".fgb": b"fgb\x03fgb"}
CRS_NAME = re.compile(  # what names a CRS without a look into files or the net
    r"urn:(x-)?ogc:def:crs:[\w.:-]+|https?://(www\.)?opengis\.net/def/crs/[\w./-]+|[a-z]+:\w+",
    re.ASCII | re.IGNORECASE,
)
GEOJSON_SUFFIXES = (".geojson", ".json")
VECTOR_SUFFIXES = (*GEOJSON_SUFFIXES, ".gpkg", ".shp", ".fgb")
GEOMETRIES = (
    "Point", "MultiPoint", "LineString", "MultiLineString", "Polygon", "MultiPolygon",
    "GeometryCollection",
)  # fmt: skip
MALFORMED = (KeyError, TypeError, ValueError, AttributeError, IndexError, ShapelyError)
WGS84 = CRS.from_epsg(4326)
# metres between points of a warped edge: at 45° it then lies within 2 mm of where it belongs
EDGE = 250
FARTHEST = 1e12  # units from an origin: on the Earth there are some 10^7 metres
EARTH = 6_371_000  # metres, mean radius

Value = str | int | float | None


class VectorError(Exception):
    """A vector file that cannot be used: the file, what was found, what helps."""

    exit_code = 3


def is_vector(path: Path) -> bool:
    """Whether a file's name says that it holds shapes.

    >>> is_vector(Path("roofs.GPKG")), is_vector(Path("roofs.tif"))
    (True, False)
    """
    return path.suffix.lower() in VECTOR_SUFFIXES


def value_key(value: Value) -> str:
    """The text by which attribute values are compared: one number is one text, however stored.

    >>> [value_key(value) for value in ("4", 4, 4.0, "4.0", " Forêt ", 0.5, None, True)]
    ['4', '4', '4', '4', 'Forêt', '0.5', '', 'true']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    text = unicodedata.normalize("NFC", str(value)).strip()
    return re.sub(r"^(-?\d+)\.0+$", r"\1", text)


@dataclass(frozen=True, slots=True, eq=False)
class Shapes:
    """Polygons with one attribute value each, in the order of their file.

    A multipolygon is there as its parts, each with the value. `repaired` counts invalid geometries
    that were made valid, `dropped` features without an area: points, lines, null and empty ones.
    """

    polygons: np.ndarray
    values: tuple[Value, ...]
    crs: CRS
    path: Path
    repaired: int = 0
    dropped: int = 0
    tree: STRtree = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if (shapely.get_type_id(self.polygons) != shapely.GeometryType.POLYGON).any():
            raise ValueError(f"{self.path}: Shapes are single polygons")
        object.__setattr__(self, "tree", STRtree(self.polygons))

    def __len__(self) -> int:
        return len(self.polygons)

    def to(self, crs: CRS, grid: Grid | None = None) -> "Shapes":
        """The shapes in another CRS, with points along their edges so that straight stays right.

        With the grid they will be burnt on they are first cut to its surroundings, so that one the
        size of a continent warps right, and shapes elsewhere are left out. What the CRS has no
        coordinates for is dropped and counted.
        """
        if crs == self.crs:
            return self
        polygons, owners = self.polygons, np.arange(len(self))
        if grid is not None:
            polygons, owners = self._around(grid)
        longest = EDGE / self.crs.units_factor[1] / (EARTH if self.crs.is_geographic else 1)
        warped = _warp(shapely.segmentize(polygons, longest), self.crs, crs)
        parts, parents = _polygons_of(_valid(self.path, warped))
        return replace(
            self,
            polygons=parts,
            values=tuple(self.values[owner] for owner in owners[parents]),
            crs=crs,
            dropped=self.dropped + len(polygons) - len(np.unique(parents)),
        )

    def _around(self, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
        """The parts of the shapes on and around a grid, and the number of each part's shape."""
        try:
            outline = warp_outline(grid.footprint(), grid.crs, self.crs)
        except CPLE_BaseError:  # the grid reaches off the Earth: nothing can be cut away
            return self.polygons, np.arange(len(self))
        zone = outline.buffer(math.sqrt(outline.area), join_style="mitre")
        near = np.sort(self.tree.query(zone, predicate="intersects"))
        polygons = self.polygons[near]
        out = ~shapely.covers(zone, polygons)
        polygons[out] = shapely.intersection(polygons[out], zone)
        return polygons, near


def outline_in(shapes: Shapes) -> Polygon:
    """The box around all shapes, in their CRS; empty where there are none.

    >>> roofs = np.array([box(0, 0, 4, 3), box(8, 1, 9, 2)])
    >>> outline_in(Shapes(roofs, (None, None), WGS84, Path("roofs.gpkg"))).bounds
    (0.0, 0.0, 9.0, 3.0)
    """
    return box(*shapely.total_bounds(shapes.polygons)) if len(shapes) else Polygon()


def _warp(polygons: np.ndarray, source: CRS, target: CRS) -> np.ndarray:
    """Polygons in another CRS; None for those that have no place in it."""
    if len(polygons) == 0:
        return polygons
    try:
        warped = shapely.transform(
            polygons, lambda xy: np.column_stack(transform(source, target, xy[:, 0], xy[:, 1]))
        )
    except CPLE_BaseError:  # one point without a place fails all: find the polygons it spoils
        if len(polygons) == 1:
            return np.array([None])
        half = len(polygons) // 2
        return np.concatenate([_warp(part, source, target) for part in np.split(polygons, [half])])
    xy, owners = shapely.get_coordinates(warped, return_index=True)
    warped[owners[~np.isfinite(xy).all(1)]] = None
    if target.is_geographic:
        wraps = (np.abs(np.diff(xy[:, 0])) > 180) & (np.diff(owners) == 0)
        for owner in np.unique(owners[1:][wraps]):  # crosses 180° or holds a pole: GDAL cuts it
            warped[owner] = warp_outline(polygons[owner], source, target)
    return warped


def read_shapes(path: Path, attribute: str | None = None, layer: str | None = None) -> Shapes:
    """The polygons of a file, each with its value of `attribute` (None without one).

    `layer` chooses among several; a GeoJSON has only one, whatever it is called.

    >>> read_shapes(Path("roofs.tif"))
    Traceback (most recent call last):
    utils.vectors.VectorError: roofs.tif: no vector file; one ends in .geojson .json .gpkg .shp .fgb
    """
    if not is_vector(path):
        raise VectorError(f"{path}: no vector file; one ends in {' '.join(VECTOR_SUFFIXES)}")
    if not path.is_file():
        raise VectorError(f"{path}: no such file")
    _check_length(path)
    if path.suffix.lower() in GEOJSON_SUFFIXES:
        return _clean(path, *_read_geojson(path, attribute))
    return _clean(path, *_read_ogr(path, attribute, layer))


def _check_length(path: Path) -> None:
    """Refuse a file cut short; GDAL would give null for what a shapefile has lost."""
    size, needed = path.stat().st_size, 1
    with path.open("rb") as file:
        start = file.read(28)
    if path.suffix.lower() == ".shp":  # bytes 24 to 27: the length in words of 16 bits
        needed = max(100, 2 * int.from_bytes(start[24:], "big"))
    if size < needed:
        found = f"truncated: {size} bytes of {needed}" if size else "the file is empty"
        raise VectorError(f"{path}: {found}; copy it again from its source")
    if not start.startswith(STARTS.get(path.suffix.lower(), b"")):
        raise VectorError(
            f"{path}: not a vector file that GDAL can read: it begins with {start[:8]!r}, as none "
            f"that ends in {path.suffix} does; rename it, or convert it with ogr2ogr"
        )


def _clean(path: Path, geometries: np.ndarray, values: Sequence[Value], crs: CRS) -> Shapes:
    """Valid, flat, single polygons of what a file holds."""
    if len(geometries) == 0:
        raise VectorError(f"{path}: holds no features")
    geometries = shapely.force_2d(geometries)
    _check_coordinates(path, geometries, crs)
    invalid = ~(shapely.is_valid(geometries) | shapely.is_missing(geometries))
    repaired = geometries.copy()
    repaired[invalid] = _valid(path, geometries[invalid])
    polygons, owners = _polygons_of(repaired)
    if len(polygons) == 0:
        kinds = Counter("null" if each is None else each.geom_type for each in geometries)
        found = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
        raise VectorError(f"{path}: holds no polygon with an area, only {found}")
    return Shapes(
        polygons,
        tuple(values[owner] for owner in owners),
        crs,
        path,
        repaired=int(invalid.sum()),
        dropped=len(geometries) - len(np.unique(owners)),
    )


def _valid(path: Path, geometries: np.ndarray) -> np.ndarray:
    try:
        return shapely.make_valid(geometries)
    except ShapelyError as error:
        raise VectorError(
            f"{path}: an outline of it cannot be repaired ({error}); draw it anew, or run "
            f"ogr2ogr -makevalid OUT.gpkg {path}"
        ) from error


def _polygons_of(geometries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The single polygons in geometries of all kinds, and the number of each one's geometry."""
    parts, owners = np.asarray(geometries, object), np.arange(len(geometries))
    while (shapely.get_type_id(parts) > shapely.GeometryType.POLYGON).any():
        parts, inner = shapely.get_parts(parts, return_index=True)
        owners = owners[inner]
    flat = (shapely.get_type_id(parts) == shapely.GeometryType.POLYGON) & (shapely.area(parts) > 0)
    return parts[flat], owners[flat]


def _check_coordinates(path: Path, geometries: np.ndarray, crs: CRS) -> None:
    """Refuse numbers that are no place: not finite, or metres where degrees are declared."""
    xy, owners = shapely.get_coordinates(geometries, return_index=True)
    broken = owners[~(np.abs(xy) < FARTHEST).all(1)]  # so is one that is no number
    if len(broken):
        number = broken[0] + 1
        raise VectorError(f"{path}: feature {number} has a coordinate that is no number on Earth")
    far = (np.abs(xy) > (400, 100)).any(1)  # beyond degrees, and beyond the gradians of old maps
    if crs.is_geographic and far.any():
        x, y = xy[far][0]
        raise VectorError(
            f"{path}: has a point at {x:.6g}, {y:.6g}, which are no degrees, but its CRS is "
            f"{crs.to_string()}; name the right one with ogr2ogr -a_srs EPSG:CODE OUT.gpkg {path}"
        )


def _check_name(path: Path, kind: str, name: str, names: Iterable[str]) -> None:
    known = {each.casefold(): each for each in names}
    if name in known.values():
        return
    close = difflib.get_close_matches(name.casefold(), known, 1)
    hint = f", did you mean '{known[close[0]]}'?" if close else "."
    listed = ", ".join(list(known.values())[:20]) + (", …" if len(known) > 20 else "")
    raise VectorError(f"{path}: has no {kind} '{name}'{hint} It has: {listed or 'none'}")


def _plain(path: Path, attribute: str, value: Any) -> Value:
    """An attribute value as str, int, float or None."""
    if isinstance(value, np.floating):
        value = float(str(value))  # a float32 0.1 stays 0.1
    elif isinstance(value, np.generic):
        value = value.item()
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if not isinstance(value, str | int | float):
        raise VectorError(
            f"{path}: attribute '{attribute}' holds a {type(value).__name__}, a class is told by "
            "text or a number"
        )
    return value


def _read_geojson(path: Path, attribute: str | None) -> tuple[np.ndarray, list[Value], CRS]:
    try:
        document = json.loads(limited_bytes(path, LARGEST_GEOJSON).decode("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise VectorError(f"{path}: not JSON that can be read ({error})") from error
    features = _features(path, document)
    names = dict.fromkeys(name for each in features for name in each.get("properties") or {})
    if attribute is not None and features:
        _check_name(path, "attribute", attribute, names)
    geometries = np.empty(len(features), object)
    values: list[Value] = []
    for number, feature in enumerate(features):
        try:
            geometry = feature.get("geometry")
            with np.errstate(invalid="ignore"):  # NaN: told with the number of its feature below
                geometries[number] = None if geometry is None else shape(geometry)
        except MALFORMED as error:
            raise VectorError(
                f"{path}: feature {number + 1} has no GeoJSON geometry ({error})"
            ) from error
        value = (feature.get("properties") or {}).get(attribute) if attribute else None
        values.append(_plain(path, attribute or "", value))
    return geometries, values, _geojson_crs(path, document)


def _features(path: Path, document: Any) -> list[dict[str, Any]]:
    kind = document.get("type") if isinstance(document, dict) else type(document).__name__
    features: Any = None
    if kind == "FeatureCollection":
        features = document.get("features")
    elif kind == "Feature":
        features = [document]
    elif kind in GEOMETRIES:
        features = [{"geometry": document}]
    if not isinstance(features, list) or not all(isinstance(each, dict) for each in features):
        raise VectorError(
            f"{path}: JSON of type {kind}, not GeoJSON: a FeatureCollection with a list of features"
        )
    return features


def _geojson_crs(path: Path, document: dict[str, Any]) -> CRS:
    """EPSG:4326 as RFC 7946 has it, or what a `crs` member of the older format names."""
    member = document.get("crs")
    if member is None:
        return WGS84
    try:
        name = member["properties"]["name"]
        return WGS84 if name.endswith("CRS84") else named_crs(name)
    except MALFORMED as error:
        raise VectorError(
            f"{path}: its 'crs' member names no known CRS ({error}); remove it if the coordinates "
            "are longitude and latitude"
        ) from error


def named_crs(name: str) -> CRS:
    """The CRS of a code or URN; ValueError of anything else, which GDAL may take for an address.

    >>> named_crs("urn:ogc:def:crs:EPSG::32633").to_epsg(), named_crs("EPSG:3857").to_epsg()
    (32633, 3857)
    """
    if not CRS_NAME.fullmatch(name):
        raise ValueError("a code such as EPSG:32633 is expected")
    return CRS.from_user_input(name)


def _read_ogr(
    path: Path, attribute: str | None, layer: str | None
) -> tuple[np.ndarray, list[Value], CRS]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd rings are repaired and counted
            layer = _choose_layer(path, layer)
            claimed = pyogrio.read_info(path, layer=layer)
            if claimed["features"] > path.stat().st_size:
                raise VectorError(
                    f"{path}: its header claims {claimed['features']} features, more than it has "
                    "bytes; copy it again from its source"
                )
            if attribute is not None:
                _check_name(path, "attribute", attribute, claimed["fields"])
            about, _, wkb, columns = read_ogr(
                path, layer, columns=[attribute] if attribute else [], datetime_as_string=True
            )
    except (DataSourceError, DataLayerError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise VectorError(f"{path}: not a vector file that GDAL can read ({reason})") from error
    geometries = np.array(shapely.from_wkb(wkb, on_invalid="fix"), object)
    column = columns[0] if attribute else [None] * len(wkb)
    values = [_plain(path, attribute or "", value) for value in column]
    return geometries, values, _ogr_crs(path, about["crs"])


def _choose_layer(path: Path, layer: str | None) -> str:
    """The named layer, or the only one with geometries (QGIS keeps its styles in another)."""
    kinds = {name: kind for name, kind in pyogrio.list_layers(path) if kind is not None}
    if layer is not None:
        _check_name(path, "layer", layer, kinds)
        return layer
    if len(kinds) == 1:
        return next(iter(kinds))
    if not kinds:
        raise VectorError(f"{path}: has no layer with geometries; is it whole?")
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    raise VectorError(f"{path}: has {len(kinds)} layers, name the one to read: {listed}")


def _ogr_crs(path: Path, text: str | None) -> CRS:
    try:
        crs = CRS.from_user_input(text or "")
    except ValueError:  # CRSError is one
        crs = None
    named = text and '"Undefined ' not in text  # as GeoPackage calls what it knows nothing about
    if named and crs and (crs.is_geographic or crs.is_projected):
        return crs
    found = "its CRS is no place on the Earth" if text else "has no CRS"
    if text is None and path.suffix.lower() == ".shp":
        found = "has no CRS (no .prj file beside it)"
    raise VectorError(f"{path}: {found}; name it with ogr2ogr -a_srs EPSG:CODE OUT.gpkg {path}")
