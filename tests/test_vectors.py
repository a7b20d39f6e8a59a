"""Shapes of every format, in any CRS, and their burnt pixels: the same from every window."""

import json
import pickle
import sqlite3
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from pyogrio.raw import write as write_ogr
from rasterio.crs import CRS
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.warp import transform
from shapely import LineString, MultiPolygon, Point, Polygon, box
from shapely.geometry import mapping

from utils import burning, vectors
from utils.burning import burn
from utils.grids import Grid, north_up
from utils.opening import grid_of, open_raster
from utils.raster import read_whole
from utils.tiling import Tile
from utils.vectors import Shapes, VectorError, named_crs, outline_in, read_shapes, value_key

UTM, DEGREES = CRS.from_epsg(32633), CRS.from_epsg(4326)
SUFFIXES = ("geojson", "gpkg", "shp", "fgb")
TWO = (box(14, 48, 14.01, 48.01), box(14.02, 48, 14.03, 48.01))
pytestmark = pytest.mark.filterwarnings("error")
BOWTIE = Polygon([(0, 0), (2, 2), (2, 0), (0, 2)])


def write(path: Path, geometries: Any, crs: str | None = "EPSG:4326", **options: Any) -> Path:
    """A vector file; options: attribute columns, and `layer`, `append`, `kind` of geometries."""
    layer = {key: options.pop(key) for key in ("layer", "append", "encoding") if key in options}
    kind = options.pop("kind", "Polygon")
    if path.suffix == ".fgb":
        layer["SPATIAL_INDEX"] = "NO"  # which would put the features in another order
    if path.suffix == ".geojson":
        columns = {name: np.asarray(column).tolist() for name, column in options.items()}
        features = [
            feature(geometry, **{name: column[number] for name, column in columns.items()})
            for number, geometry in enumerate(geometries)
        ]
        return write_json(path, features)
    wkb = np.array([None if each is None else shapely.to_wkb(each) for each in geometries], object)
    columns = [np.asarray(column) for column in options.values()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that there is no CRS
        write_ogr(path, wkb, columns, list(options), geometry_type=kind, crs=crs, **layer)
    return path


def feature(geometry: Any, **properties: Any) -> dict[str, Any]:
    place = None if geometry is None else mapping(geometry)
    return {"type": "Feature", "properties": properties, "geometry": place}


def write_json(path: Path, features: list[Any], **members: Any) -> Path:
    document = {"type": "FeatureCollection", "features": features, **members}
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def text(*values: str | None) -> np.ndarray:
    return np.array(values, object)


def shapes_of(*polygons: Polygon, crs: CRS = UTM) -> Shapes:
    return Shapes(np.array(polygons, object), (None,) * len(polygons), crs, Path("memory.gpkg"))


# --- reading


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_shapes(tmp_path, suffix):
    path = write(tmp_path / f"roofs.{suffix}", TWO, kind_of=text("forêt", "4"), n=[7, 8])
    shapes = read_shapes(path, "kind_of")
    assert shapes.values == ("forêt", "4") and shapes.crs == DEGREES and shapes.path == path
    assert [shapely.equals(a, b) for a, b in zip(shapes.polygons, TWO, strict=True)] == [True] * 2
    assert (len(shapes), shapes.repaired, shapes.dropped) == (2, 0, 0)
    assert read_shapes(path, "n").values == (7, 8)
    assert read_shapes(path).values == (None, None)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_multipolygon_is_its_parts_in_the_files_order(tmp_path, suffix):
    parts = MultiPolygon(TWO)
    last = box(15, 48, 15.5, 48.5)
    path = write(tmp_path / f"a.{suffix}", [parts, MultiPolygon([last])], kind="MultiPolygon",
                 code=text("a", "b"))  # fmt: skip
    shapes = read_shapes(path, "code")
    assert shapes.values == ("a", "a", "b")
    assert [each.bounds for each in shapes.polygons] == [each.bounds for each in (*TWO, last)]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_heights_are_dropped_and_null_geometries_counted(tmp_path, suffix):
    high = Polygon([(0, 0, 5), (1, 0, 6), (1, 1, 7)])
    path = write(tmp_path / f"a.{suffix}", [high, None], kind="Polygon Z", n=[1, 2])
    shapes = read_shapes(path, "n")
    assert shapes.values == (1,) and shapes.dropped == 1
    assert not shapely.has_z(shapes.polygons).any()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_invalid_polygon_is_repaired_and_counted(tmp_path, suffix):
    shapes = read_shapes(write(tmp_path / f"a.{suffix}", [BOWTIE, TWO[0]], n=[1, 2]), "n")
    assert shapes.repaired == 1 and shapes.values == (1, 1, 2)
    assert shapely.is_valid(shapes.polygons).all()
    assert shapely.area(shapes.polygons[:2]).sum() == pytest.approx(2)


def test_points_lines_and_empty_polygons_among_polygons_are_dropped_and_counted(tmp_path):
    both = shapely.GeometryCollection([Point(0, 0), MultiPolygon(TWO)])
    features = [feature(Point(1, 2)), feature(both), feature(LineString([(0, 0), (1, 1)]))]
    features.append(feature(Polygon()))
    shapes = read_shapes(write_json(tmp_path / "a.json", features))
    assert len(shapes) == 2 and shapes.dropped == 3


def test_numbers_come_as_they_were_typed_whatever_the_column(tmp_path):
    path = tmp_path / "a.gpkg"
    write(path, TWO, single=np.array([0.1, np.nan], "f4"), flag=np.array([True, False]))
    assert read_shapes(path, "single").values == (0.1, None)
    assert read_shapes(path, "flag").values == (True, False)
    days = np.array(["2017-06-22", "NaT"], "M8[D]")
    write(tmp_path / "c.gpkg", TWO, day=days)
    assert read_shapes(tmp_path / "c.gpkg", "day").values == ("2017-06-22", None)
    mask = [np.array([False, True])]
    wkb = np.array([shapely.to_wkb(each) for each in TWO], object)
    write_ogr(tmp_path / "b.gpkg", wkb, [np.array([4, 5])], ["n"], field_mask=mask,
              geometry_type="Polygon", crs="EPSG:4326")  # fmt: skip
    values = read_shapes(tmp_path / "b.gpkg", "n").values
    assert [value_key(value) for value in values] == ["4", ""]


@pytest.mark.parametrize(
    ("value", "key"),
    [("4", "4"), (4, "4"), (4.0, "4"), ("4.0", "4"), (-0.0, "0"), (0.25, "0.25"), ("011", "011"),
     (None, ""), ("", ""), (False, "false"), ("  Road\t", "Road"), ("e\u0301te", "\u00e9te"),
     (1e20, "100000000000000000000"), ("4.10", "4.10"), ("v4.0", "v4.0"), (255, "255")],
)  # fmt: skip
def test_values_that_mean_one_thing_have_one_key(value, key):
    assert value_key(value) == key


def test_the_only_layer_with_geometries_needs_no_name(tmp_path):
    path = write(tmp_path / "a.gpkg", TWO, layer="land", n=[1, 2])
    write_ogr(path, None, [text("qml")], ["styleQML"], layer="layer_styles", append=True)
    assert read_shapes(path, "n").values == (1, 2)


def test_a_named_layer_is_read_and_several_need_a_name(tmp_path):
    path = write(tmp_path / "a.gpkg", TWO, layer="land", n=[1, 2])
    write(path, [Point(0, 0)], layer="trees", kind="Point", n=[3])
    assert read_shapes(path, "n", layer="land").values == (1, 2)
    with pytest.raises(VectorError, match=r"has 2 layers, name .* land \(Polygon\), trees \(Poi"):
        read_shapes(path)
    with pytest.raises(VectorError, match="no layer 'Lands', did you mean 'land'.* land, trees"):
        read_shapes(path, layer="Lands")
    with pytest.raises(VectorError, match="only 1 Point"):
        read_shapes(path, layer="trees")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_missing_attribute_is_answered_with_those_there_are(tmp_path, suffix):
    path = write(tmp_path / f"a.{suffix}", TWO, klasse=[1, 2], name=text("a", "b"))
    with pytest.raises(VectorError, match="no attribute 'KLASS', did you mean 'klasse'.* klasse, "):
        read_shapes(path, "KLASS")


def test_a_feature_without_the_attribute_has_no_value(tmp_path):
    features = [feature(TWO[0], n=1), feature(TWO[1]), {**feature(TWO[0]), "properties": None}]
    assert read_shapes(write_json(tmp_path / "a.json", features), "n").values == (1, None, None)


@pytest.mark.parametrize(
    ("name", "crs"),
    [("urn:ogc:def:crs:OGC:1.3:CRS84", DEGREES), ("urn:ogc:def:crs:EPSG::32633", UTM),
     ("EPSG:32633", UTM), ("urn:ogc:def:crs:EPSG::4326", DEGREES)],
)  # fmt: skip
def test_the_crs_member_of_old_geojson_counts(tmp_path, name, crs):
    member = {"type": "name", "properties": {"name": name}}
    shapes = read_shapes(write_json(tmp_path / "a.json", [feature(TWO[0])], crs=member))
    assert shapes.crs == crs


@pytest.mark.parametrize("crs", ["EPSG:25832+5783", "ESRI:102003", "OGC:CRS84", "EPSG:2953"])
@pytest.mark.parametrize("suffix", ["gpkg", "shp", "fgb"])
def test_crs_of_every_authority_arrive_usable(tmp_path, suffix, crs):
    shapes = read_shapes(write(tmp_path / f"a.{suffix}", TWO[:1], crs=crs))
    there = np.ravel(transform(shapes.crs, DEGREES, [14.0], [48.0]))
    own = np.ravel(transform(CRS.from_string(crs), DEGREES, [14.0], [48.0]))
    assert there == pytest.approx(own, abs=1e-9)


def test_geojson_may_be_a_feature_or_a_geometry_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.geojson"
    for document in (feature(TWO[0]), mapping(TWO[0]), mapping(MultiPolygon([TWO[0]]))):
        path.write_text(json.dumps(document), encoding="utf-8-sig")
        assert read_shapes(path).polygons[0].equals(TWO[0])


def test_an_unclosed_ring_is_closed(tmp_path):
    ring = [(0, 0), (1, 0), (1, 1)]
    place = {"type": "Polygon", "coordinates": [ring]}
    path = write_json(tmp_path / "a.json", [{"type": "Feature", "geometry": place}])
    assert read_shapes(path).polygons[0].area == 0.5
    wkb = struct.pack("<BIII6d", 1, 3, 1, 3, *np.ravel(ring))
    write_ogr(tmp_path / "a.fgb", np.array([wkb], object), [], [], geometry_type="Polygon",
              crs="EPSG:4326")  # fmt: skip
    assert read_shapes(tmp_path / "a.fgb").polygons[0].area == 0.5


def test_shapes_survive_the_way_to_a_worker():
    shapes = pickle.loads(pickle.dumps(shapes_of(*TWO)))
    assert len(shapes) == 2 and list(shapes.tree.query(TWO[1])) == [1]


# --- files that cannot be used


def _geometry(folder: Path, place: Any) -> Path:
    return write_json(folder / "a.json", [feature(TWO[0]), {"type": "Feature", "geometry": place}])


def _bytes(folder: Path, name: str, content: bytes) -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def _cut(folder: Path, suffix: str, share: float) -> Path:
    path = write(folder / f"a.{suffix}", [box(x, 0, x + 1, 1) for x in range(60)])
    content = path.read_bytes()
    return _bytes(folder, path.name, content[: int(share * len(content))])


def _undefined(folder: Path, number: int) -> Path:
    """A GeoPackage that declares one of the two systems of which nothing is known."""
    path = write(folder / "a.gpkg", TWO, layer="a")
    with sqlite3.connect(path) as database:
        for table in ("gpkg_contents", "gpkg_geometry_columns"):
            database.execute(f"update {table} set srs_id = {number}")
    database.close()
    return path


def _named_crs(folder: Path, member: Any) -> Path:
    return write_json(folder / "a.json", [feature(TWO[0])], crs=member)


def _without(folder: Path, ending: str) -> Path:
    path = write(folder / "a.shp", TWO)
    path.with_suffix(ending).unlink()
    return path


def _site(folder: Path) -> Path:
    path = write(folder / "a.shp", TWO)
    path.with_suffix(".prj").write_text('LOCAL_CS["site",LOCAL_DATUM["site",0],UNIT["metre",1]]')
    return path


METRES = box(412000, 5326000, 412010, 5326010)
BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda f: f / "a.gpkg", "no such file"),
    "a folder": (lambda f: f, "no vector file; one ends in .geojson .json .gpkg .shp .fgb"),
    "another format": (lambda f: _bytes(f, "a.kml", b"<kml/>"), "no vector file"),
    "empty gpkg": (lambda f: _bytes(f, "a.gpkg", b""), "the file is empty"),
    "empty geojson": (lambda f: _bytes(f, "a.json", b""), "the file is empty"),
    "empty shp": (lambda f: _bytes(f, "a.shp", b""), "the file is empty"),
    "no gpkg": (lambda f: _bytes(f, "a.gpkg", b"hello" * 99), "not a vector file that GDAL can"),
    "no fgb": (lambda f: _bytes(f, "a.fgb", b"hello" * 99), "not a vector file that GDAL can"),
    "no json": (lambda f: _bytes(f, "a.json", b"{..."), "not JSON that can be read"),
    "no utf-8": (lambda f: _bytes(f, "a.json", b'{"a": "\xe9"}'), "not JSON that can be read"),
    "deep json": (lambda f: _bytes(f, "a.json", b"[" * 200000), "not JSON that can be read"),
    "json lines": (lambda f: _bytes(f, "a.json", b"{}\n{}"), "not JSON that can be read (Extra"),
    "a json list": (lambda f: _bytes(f, "a.json", b"[1]"), "JSON of type list, not GeoJSON"),
    "a json null": (lambda f: _bytes(f, "a.json", b"null"), "JSON of type NoneType, not GeoJSON"),
    "topojson": (lambda f: _bytes(f, "a.json", b'{"type": "Topology"}'), "JSON of type Topology"),
    "no features": (lambda f: write_json(f / "a.json", []), "holds no features"),
    "odd features": (lambda f: write_json(f / "a.json", [1]), "not GeoJSON"),
    "no feature list": (
        lambda f: _bytes(f, "a.json", b'{"type": "FeatureCollection"}'), "with a list of features"),
    "no such type": (
        lambda f: _geometry(f, {"type": "Blob", "coordinates": []}), "feature 2 has no GeoJSON"),
    "no coordinates": (lambda f: _geometry(f, {"type": "Polygon"}), "feature 2 has no GeoJSON"),
    "a text": (lambda f: _geometry(f, "POLYGON EMPTY"), "feature 2 has no GeoJSON geometry"),
    "texts for numbers": (
        lambda f: _geometry(f, {"type": "Polygon", "coordinates": [[["a", "b"]] * 4]}),
        "feature 2 has no GeoJSON geometry"),
    "two points": (
        lambda f: _geometry(f, {"type": "Polygon", "coordinates": [[[0, 0], [1, 1]]]}),
        "feature 2 has no GeoJSON geometry"),
    "not a number": (
        lambda f: _geometry(f, {"type": "Polygon", "coordinates": [
            [[0, 0], [1, 0], [float("nan"), 1], [0, 0]]]}),
        "feature 2 has a coordinate that is no number on Earth"),
    "only points": (
        lambda f: write_json(f / "a.json", [feature(Point(1, 1)), feature(Point(2, 1)),
                                            feature(LineString([(0, 0), (1, 1)])), feature(None)]),
        "no polygon with an area, only 1 LineString, 2 Point, 1 null"),
    "only lines": (
        lambda f: write(f / "a.gpkg", [LineString([(0, 0), (1, 1)])], kind="LineString"),
        "no polygon with an area, only 1 LineString"),
    "flat": (
        lambda f: write(f / "a.gpkg", [Polygon([(0, 0), (1, 1), (2, 2)])]),
        "no polygon with an area, only 1 Polygon"),
    "no rows": (lambda f: write(f / "a.gpkg", []), "holds no features"),
    "metres without a crs": (
        lambda f: write_json(f / "a.json", [feature(METRES)]),
        "point at 412010, 5.326e+06, which are no degrees, but its CRS is EPSG:4326"),
    "metres as degrees": (lambda f: write(f / "a.gpkg", [METRES]), "ogr2ogr -a_srs EPSG:CODE"),
    "crs of nowhere": (
        lambda f: _named_crs(f, {"type": "name", "properties": {"name": "EPSG:999999"}}),
        "its 'crs' member names no known CRS"),
    "linked crs": (
        lambda f: _named_crs(f, {"type": "link", "properties": {"href": "x"}}),
        "its 'crs' member names no known CRS"),
    "odd crs": (lambda f: _named_crs(f, "EPSG:32633"), "its 'crs' member names no known CRS"),
    "shp without crs": (lambda f: write(f / "a.shp", TWO, crs=None), "no CRS (no .prj file besi"),
    "shp without shx": (lambda f: _without(f, ".shx"), "Unable to open"),
    "crs of a building site": (_site, "its CRS is no place on the Earth; name it with ogr2ogr"),
    "gpkg without crs": (lambda f: write(f / "a.gpkg", TWO, crs=None), "has no CRS; name it with"),
    "fgb without crs": (lambda f: write(f / "a.fgb", TWO, crs=None), "has no CRS; name it with"),
    "undefined cartesian": (lambda f: _undefined(f, -1), "ogr2ogr -a_srs EPSG:CODE"),
    "undefined geographic": (lambda f: _undefined(f, 0), "ogr2ogr -a_srs EPSG:CODE"),
    **{
        f"{suffix} cut at {share}": (
            lambda f, suffix=suffix, share=share: _cut(f, suffix, share), "a.")
        for suffix in SUFFIXES for share in (0.001, 0.01, 0.1, 0.5, 0.9, 0.9999)
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_one_line_that_names_it(tmp_path, case):
    make, message = BAD[case]
    path = make(tmp_path)
    with pytest.raises(VectorError) as caught:
        read_shapes(path)
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and message in line and "\n" not in line
    assert caught.value.exit_code == 3


def test_a_text_in_another_encoding_than_declared_is_refused(tmp_path):
    path = write(tmp_path / "a.shp", TWO, name=text("for\u00eat", "b"), encoding="ISO-8859-1")
    assert read_shapes(path, "name").values == ("for\u00eat", "b")
    path.with_suffix(".cpg").write_text("UTF-8")
    with pytest.raises(VectorError, match="a.shp: not a vector file .*'utf-8' codec"):
        read_shapes(path, "name")


@pytest.mark.parametrize("value", [["a", "b"], {"amenity": "school"}])
def test_an_attribute_of_lists_tells_no_class(tmp_path, value):
    path = write_json(tmp_path / "a.json", [feature(TWO[0], tags=value)])
    with pytest.raises(VectorError, match="attribute 'tags' holds a (list|dict), a class is told"):
        read_shapes(path, "tags")


# --- burning

TRANSFORMS = {
    "north up": Affine(0.5, 0, 412000, 0, -0.5, 5326000),
    "south up": Affine(0.5, 0, 412000, 0, 0.5, 5325800),
    "turned and sheared": Affine(0.4, 0.3, 412000, 0.2, -0.45, 5326000),
    "mirrored and oblong": Affine(-0.7, 0, 412400, 0, -0.2, 5326000),
    "degrees": Affine(5e-6, 0, 14.0, 0, -4e-6, 48.0),
}
HEIGHT, WIDTH = 300, 530


def blobs(seed: int, transform: Affine, count: int = 12, snap: float = 0) -> Shapes:
    """Jagged polygons with holes on and around the grid; snap: vertices on fractions of a pixel."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        corners = int(rng.integers(3, 150))
        angle = np.sort(rng.uniform(0, 2 * np.pi, corners))
        radius = rng.uniform(0.3, 1, corners) * rng.choice([3, 40, 400])
        centre = rng.uniform((-100, -100), (WIDTH + 100, HEIGHT + 100))
        pixels = centre + radius[:, None] * np.column_stack([np.cos(angle), np.sin(angle)])
        if snap:
            pixels = np.round(pixels / snap) * snap
        outline = shapely.make_valid(Polygon(pixels))
        outline = outline - outline.centroid.buffer(outline.area**0.5 / 4)
        made.append(outline)
    parts = [each for each in shapely.get_parts(shapely.get_parts(made)) if each.area > 0]
    matrix = [transform.a, transform.b, transform.d, transform.e, transform.c, transform.f]
    placed = [shapely.affinity.affine_transform(each, matrix) for each in parts]
    return shapes_of(*[each for each in placed if each.geom_type == "Polygon"])


def whole_by_gdal(shapes: Shapes, ids: list[int], grid: Grid, all_touched: bool) -> np.ndarray:
    return rasterize(
        zip(shapes.polygons, ids, strict=True), (grid.height, grid.width), fill=-1,
        transform=grid.transform, all_touched=all_touched, dtype="int32",
    )  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    where=st.sampled_from(sorted(TRANSFORMS)),
    snap=st.sampled_from([0, 0.5, 1]),
    all_touched=st.booleans(),
    data=st.data(),
)
def test_every_window_is_cut_from_the_burnt_scene(seed, where, snap, all_touched, data):
    grid = Grid(UTM, TRANSFORMS[where], HEIGHT, WIDTH)
    shapes = blobs(seed, grid.transform, snap=snap)
    ids = list(range(len(shapes)))
    whole = burn(shapes, ids, grid, Tile(0, 0, HEIGHT, WIDTH), -1, all_touched)
    if not snap:  # an edge through a pixel's very centre or corner is anyone's
        assert np.array_equal(whole, whole_by_gdal(shapes, ids, grid, all_touched))
    for _ in range(4):
        row = data.draw(st.integers(-20, HEIGHT + 5))
        col = data.draw(st.integers(-20, WIDTH + 5))
        height, width = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300))
        part = burn(shapes, ids, grid, Tile(row, col, height, width), -1, all_touched)
        padded = np.pad(whole, 400, constant_values=-1)
        expected = padded[row + 400 : row + 400 + height, col + 400 : col + 400 + width]
        assert part.dtype == np.int32 and np.array_equal(part, expected)


@pytest.mark.parametrize("where", TRANSFORMS)
def test_a_pixel_belongs_to_the_last_shape_that_holds_its_centre(where):
    grid = Grid(UTM, TRANSFORMS[where], HEIGHT, WIDTH)
    shapes = blobs(5, grid.transform)
    row, col = np.mgrid[:HEIGHT, :WIDTH] + 0.5
    x, y = grid.transform @ (col, row)
    expected = np.full((HEIGHT, WIDTH), -1)
    for number, polygon in enumerate(shapes.polygons):
        expected[shapely.contains_xy(polygon, x, y)] = number
    burnt = burn(shapes, range(len(shapes)), grid, Tile(0, 0, HEIGHT, WIDTH), -1, False)
    assert len(np.unique(burnt)) > 5 and np.array_equal(burnt, expected)


@pytest.mark.parametrize("all_touched", [False, True])
def test_a_coast_of_many_vertices_is_burnt_exactly_but_for_its_far_ones(monkeypatch, all_touched):
    angle = np.linspace(0, 2 * np.pi, 40000, endpoint=False)
    reach = 200 + 40 * np.sin(31 * angle) + 9 * np.sin(1013 * angle)
    coast = Polygon(np.column_stack([260 + reach * np.cos(angle), 150 + reach * np.sin(angle)]))
    lakes = [Point(x, y).buffer(9.3, 64) for x in range(120, 400, 23) for y in range(60, 240, 23)]
    land = max(shapely.get_parts(coast - shapely.union_all(lakes)), key=shapely.area)
    grid = Grid(UTM, Affine(1, 0, 0, 0, 1, 0), HEIGHT, WIDTH)
    expected = whole_by_gdal(shapes_of(land), [3], grid, all_touched)
    vertices = []

    def counting(burnt: Any, **options: Any) -> np.ndarray:
        burnt = list(burnt)
        vertices.extend(len(ring) for polygon, _ in burnt for ring in polygon["coordinates"])
        return rasterize(burnt, **options)

    monkeypatch.setattr(burning, "rasterize", counting)
    for tile in (Tile(0, 0, 256, 256), Tile(44, 260, 256, 256), Tile(100, 60, 60, 300)):
        part = burn(shapes_of(land), [3], grid, tile, -1, all_touched)
        cut = np.s_[tile.row : tile.row + tile.height, tile.col : tile.col + tile.width]
        assert np.array_equal(part, expected[cut])
    vertices.clear()
    burn(shapes_of(land), [3], grid, Tile(0, 0, 256, 256), -1, all_touched)
    assert sum(vertices) < 0.6 * len(shapely.get_coordinates(land))


def test_a_window_costs_what_is_in_it(monkeypatch):
    grid = north_up("EPSG:32633", 0, 10000, 1, 10000, 10000)
    roofs = [box(x, y, x + 5, y + 5) for x in range(0, 10000, 100) for y in range(0, 10000, 100)]
    burnt: list[int] = []
    monkeypatch.setattr(burning, "rasterize", lambda given, **_: burnt.append(len(given)))
    burn(shapes_of(*roofs), [1] * len(roofs), grid, Tile(5120, 5120, 512, 512), 0, False)
    assert 25 <= sum(burnt) <= 49


def test_a_shape_around_the_whole_scene_fills_every_window():
    angle = np.linspace(0, 2 * np.pi, 5000, endpoint=False)
    circle = Polygon(5000 * np.column_stack([np.cos(angle), np.sin(angle)]))
    ring = circle - box(100, 100, 120, 110)
    grid = Grid(UTM, Affine(1, 0, 0, 0, 1, 0), HEIGHT, WIDTH)
    label = burn(shapes_of(ring), [9], grid, Tile(0, 0, HEIGHT, WIDTH), 0, False)
    assert (label == 0).sum() == 200 and (label[100:110, 100:120] == 0).all()


def test_the_last_shape_wins_and_one_without_id_is_not_burnt():
    grid = Grid(UTM, Affine(1, 0, 0, 0, 1, 0), 4, 4)
    shapes = shapes_of(box(0, 0, 3, 4), box(1, 0, 4, 4), box(0, 0, 4, 4))
    assert burn(shapes, [1, 70000, None], grid, Tile(0, 0, 1, 4), 0, False).tolist() == [
        [1, 70000, 70000, 70000]
    ]
    assert burn(shapes, [70000, -1, None], grid, Tile(0, 0, 1, 4), 0, False).tolist() == [
        [70000, -1, -1, -1]
    ]


def test_past_the_grid_there_is_only_fill():
    grid = Grid(UTM, Affine(1, 0, 0, 0, 1, 0), 3, 2)
    label = burn(shapes_of(box(-9, -9, 99, 99)), [1], grid, Tile(-1, -2, 6, 6), 255, True)
    assert (label == 1).sum() == 6 and (label[1:4, 2:4] == 1).all()
    assert (burn(shapes_of(box(0, 0, 9, 9)), [1], grid, Tile(0, 2, 3, 3), 255, True) == 255).all()


def test_no_shapes_and_no_ids_burn_nothing():
    grid = Grid(UTM, Affine(1, 0, 0, 0, 1, 0), 4, 4)
    for shapes, ids in ((shapes_of(), []), (shapes_of(box(0, 0, 4, 4)), [None])):
        assert (burn(shapes, ids, grid, Tile(0, 0, 4, 4), 7, False) == 7).all()


def test_ids_of_other_shapes_are_refused():
    grid = Grid(UTM, Affine(1, 0, 0, 0, 1, 0), 4, 4)
    with pytest.raises(ValueError, match="1 ids for 2 shapes"):
        burn(shapes_of(*TWO), [1], grid, Tile(0, 0, 4, 4), 0, False)


def test_shapes_hold_single_polygons_only():
    with pytest.raises(ValueError, match="single polygons"):
        shapes_of(MultiPolygon(TWO))


# --- other CRSs


@pytest.mark.parametrize(
    ("source", "place", "target", "grid"),
    [
        ("EPSG:4326", box(11, 47.9, 15.2, 52.1), "EPSG:32633", (430000, 5800000, 300)),
        ("EPSG:4326", box(13, 48.123456, 17, 49), "EPSG:32633", (412000, 5331000, 10)),
        ("EPSG:3857", box(1.5e6, 6e6, 1.7e6, 6.1e6), "EPSG:4326", (13.2, 47.5, 0.004)),
        ("EPSG:32633", box(0, 5.1e6, 9e5, 5.4e6), "EPSG:3035", (4e6, 2.9e6, 1500)),
    ],
)
def test_edges_stay_straight_in_the_crs_they_were_drawn_in(source, place, target, grid):
    left, top, gsd = grid
    where = north_up(target, left, top, gsd, 300, 300)
    shapes = shapes_of(place, crs=CRS.from_string(source))
    row, col = np.mgrid[:300, :300] + 0.5
    x, y = where.transform @ (col.ravel(), row.ravel())
    x, y = transform(where.crs, CRS.from_string(source), x, y)
    expected = shapely.contains_xy(place, x, y).reshape(300, 300)
    for warped in (shapes.to(where.crs), shapes.to(where.crs, where)):
        label = burn(warped, [1] * len(warped), where, Tile(0, 0, 300, 300), 0, False)
        assert 0.02 < expected.mean() < 0.98
        assert (label != expected).sum() <= 2


def test_the_same_crs_changes_nothing():
    shapes = shapes_of(*TWO)
    assert shapes.to(UTM) is shapes


def test_values_and_counts_follow_the_shapes_to_another_crs():
    shapes = Shapes(np.array(TWO, object), ("a", "b"), DEGREES, Path("a.shp"), 3, 4)
    warped = shapes.to(UTM)
    assert warped.values == ("a", "b") and warped.crs == UTM and warped.path == Path("a.shp")
    assert (warped.repaired, warped.dropped) == (3, 4)
    assert len(warped.tree) == 2 and not warped.tree.geometries[0].equals(TWO[0])


def test_shapes_far_from_the_grid_are_left_out_without_a_count():
    far = box(100, -30, 101, -29)
    shapes = Shapes(np.array([far, TWO[0]], object), ("far", "near"), DEGREES, Path("a.shp"))
    where = north_up("EPSG:32633", 425200, 5317000, 1, 500, 500)
    warped = shapes.to(UTM, where)
    assert warped.values == ("near",) and warped.dropped == 0


def test_shapes_near_the_grid_keep_their_order():
    rng = np.random.default_rng(1)
    places = [box(x, y, x + 1e-4, y + 1e-4) for x, y in rng.uniform(0, 0.01, (300, 2)) + (14, 48)]
    shapes = Shapes(np.array(places, object), tuple(range(300)), DEGREES, Path("a.shp"))
    where = north_up("EPSG:32633", 425200, 5317400, 1, 500, 500)
    values = shapes.to(UTM, where).values
    assert len(values) > 100 and list(values) == sorted(values)


def test_the_whole_world_is_burnt_where_the_grid_lies():
    world = shapes_of(box(-180, -90, 180, 90), box(14.0, 48, 14.002, 48.002), crs=DEGREES)
    where = north_up("EPSG:32633", 425200, 5317000, 1, 500, 500)
    warped = world.to(UTM, where)
    label = burn(warped, [1, 2], where, Tile(0, 0, 500, 500), 0, False)
    assert set(np.unique(label)) == {1, 2}
    unaided = shapes_of(box(100, -1, 120, 1), TWO[0], crs=DEGREES).to(UTM)
    assert len(unaided) == 1 and unaided.dropped == 1


def test_a_hole_that_touches_its_rim_stays_valid():
    holes = [[(14.003, 48), (14.004, 48.002), (14.002, 48.002)],
             [(14.003, 48.01), (14.004, 48.008), (14.002, 48.008)]]  # fmt: skip
    warped = shapes_of(Polygon(box(14, 48, 14.01, 48.01).exterior, holes), crs=DEGREES).to(UTM)
    assert shapely.is_valid(warped.polygons).all() and len(warped.values) == len(warped)


def test_a_grid_that_reaches_off_the_earth_gets_the_shapes_it_sees():
    disc = CRS.from_string("+proj=geos +h=35785831 +lon_0=-75 +sweep=x +ellps=GRS80")
    where = north_up(disc.to_wkt(), -6e6, 6e6, 24000, 500, 500)
    shapes = shapes_of(box(-80, -5, -70, 5), box(100, -5, 110, 5), crs=DEGREES).to(disc, where)
    label = burn(shapes, [1], where, Tile(0, 0, 500, 500), 0, False)
    assert shapes.dropped == 1 and 1000 < label.sum() < 3000 and label[250, 250] == 1


def test_shapes_across_the_date_line_are_cut_there():
    crossing = box(300000, 5e6, 400000, 5.1e6)  # UTM zone 1 begins at 180°
    westward = box(200000, 5e6, 400000, 5.1e6)
    shapes = shapes_of(crossing, westward, crs=CRS.from_epsg(32601))
    warped = shapes.to(DEGREES)
    assert len(warped) == 3 and max(shapely.bounds(warped.polygons)[:, 2]) == 180
    assert all(right - left < 3 for left, _, right, _ in shapely.bounds(warped.polygons))
    back = warped.to(CRS.from_epsg(32601))
    areas = [shapely.area(each.polygons).sum() for each in (shapes, back)]
    assert areas[1] == pytest.approx(areas[0], rel=1e-6)


def test_a_scene_across_the_date_line_gets_the_shapes_of_both_sides():
    where = north_up("EPSG:32601", 200000, 5.1e6, 100, 300, 2000)
    halves = shapes_of(box(178, 44, 180, 48), box(-180, 44, -178, 48), crs=DEGREES)
    warped = halves.to(where.crs, where)
    label = burn(warped, [1] * len(warped), where, Tile(0, 0, 300, 2000), 0, False)
    assert label[:, :1000].all()


def test_a_shape_around_the_pole_holds_the_pole():
    polar = shapes_of(box(-1e5, -1e5, 2e5, 2e5), crs=CRS.from_epsg(3413)).to(DEGREES)
    assert outline_in(polar).bounds == pytest.approx((-180, 87.4, 180, 90), abs=0.1)
    assert shapely.contains_xy(polar.polygons, 10, 89.99).any()


def test_the_outline_is_the_box_around_all_shapes():
    assert outline_in(shapes_of(*TWO)).bounds == (14, 48, 14.03, 48.01)
    assert outline_in(shapes_of()).is_empty


# --- real data


def grid_at(path: Path) -> Grid:
    with open_raster(path) as dataset:
        return grid_of(dataset)


def test_the_burnt_roofs_of_banepa_are_the_published_mask(real_data):
    folder = real_data / "banepa-buildings"
    grid = grid_at(folder / "banepa_rgb.tif")
    roofs = read_shapes(folder / "buildings_osm.geojson").to(grid.crs, grid)
    whole = Tile(0, 0, grid.height, grid.width)
    label = burn(roofs, [1] * len(roofs), grid, whole, 0, False)
    mask = read_whole(folder / "buildings_mask.tif")[0]
    assert (label != mask).mean() <= 0.001


@pytest.mark.parametrize(
    ("scene", "counts"),
    [(1, {0: 63441, 1: 10031, 2: 13429, 3: 4999, 4: 3580}),
     (2, {0: 28008, 1: 88848, 2: 32937, 3: 950, 4: 1881, 255: 4508})],
)  # fmt: skip
def test_the_text_ids_of_baker_lake_are_burnt_from_another_crs(real_data, scene, counts):
    folder = real_data / "nb-aerial-multiclass"
    grid = grid_at(folder / f"23322E759967N_clipped_1m_{scene}of2.tif")
    shapes = read_shapes(folder / "BakerLake_2017_clipped.gpkg", "Quatreclasses")
    shapes = shapes.to(grid.crs, grid)
    ids = [int(value_key(value)) for value in shapes.values]
    label = burn(shapes, ids, grid, Tile(0, 0, grid.height, grid.width), 0, False)
    values, pixels = np.unique(label, return_counts=True)
    found = dict(zip(values.tolist(), pixels.tolist(), strict=True))
    assert set(found) == set(counts)
    assert all(abs(found[value] - count) <= 20 for value, count in counts.items())


@pytest.mark.parametrize(
    "name",
    ["http://localhost:9/crs.prj", "/etc/hostname", "crs.prj", "https://epsg.io/32633.wkt", "",
     'PROJCS["a"]', "+proj=utm +zone=33", "http://opengis.net.evil/def/crs/EPSG/0/4326"],
)  # fmt: skip
def test_a_crs_is_named_by_its_code_and_not_by_an_address(name, monkeypatch):
    monkeypatch.setattr(vectors, "CRS", None)  # GDAL is not even asked
    with pytest.raises(ValueError, match="a code such as EPSG:32633 is expected"):
        named_crs(name)


@pytest.mark.parametrize(
    "name", ["EPSG:32633", "urn:ogc:def:crs:EPSG::32633", "epsg:32633",
             "http://www.opengis.net/def/crs/EPSG/0/32633"]
)  # fmt: skip
def test_the_usual_names_of_a_crs_are_known(name):
    assert named_crs(name).to_epsg() == 32633
