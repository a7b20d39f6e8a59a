"""Class maps as polygons: nothing is lost, nothing overlaps, no band of rows shows."""

import json
import math
from pathlib import Path

import numpy as np
import pyogrio
import pytest
import rasterio
import shapely
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.warp import transform as transform_points

import utils.polygons as layers
from utils.ground import Ground
from utils.polygons import PolygonError, write_polygons

CLASSES = ["water", "forest", "field", "town"]
NORTH_UP = Affine(10, 0, 412000, 0, -10, 5326000)
TRANSFORMS = {
    "north-up": NORTH_UP,
    "south-up": Affine(10, 0, 412000, 0, 10, 5326000),
    "rotated": NORTH_UP @ Affine.rotation(33),
    "sheared": Affine(8, 3, 412000, 1, -12, 5326000),
}
NODATA = 255
EVEN = {"crs": "EPSG:3035", "transform": Affine(10, 0, 4321000, 0, -10, 3210000)}  # equal pixels


def noise(seed: int, height: int = 60, width: int = 80, block: int = 1) -> np.ndarray:
    """Classes at random in squares of `block` pixels, with speckle and patches without data."""
    random = np.random.default_rng(seed)
    shape = height // block + 1, width // block + 1
    classes = random.integers(0, 4, shape).astype(np.uint8).repeat(block, 0).repeat(block, 1)
    classes = classes[:height, :width].copy()
    speckle = random.random(classes.shape) < 0.05
    classes[speckle] = random.integers(0, 4, speckle.sum())
    classes[10:25, 40:60] = NODATA
    classes[random.random(classes.shape) < 0.02] = NODATA
    return classes


def save(path: Path, classes: np.ndarray, crs="EPSG:32633", transform=NORTH_UP, nodata=NODATA):
    height, width = classes.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "nodata": nodata}
    profile |= {"dtype": classes.dtype, "crs": crs, "transform": transform}
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(classes, 1)
    return path


class Layer:
    """What a written GeoPackage holds."""

    def __init__(self, path: Path) -> None:
        self.meta, _, geometry, fields = pyogrio.raw.read(path)
        self.polygons = shapely.from_wkb(geometry)
        self.class_id, self.names, self.area_m2 = fields
        self.wkb = sorted(geometry)


def convert(
    tmp_path: Path, classes: np.ndarray, min_area=0, simplify=0, window=50, **grid
) -> Layer:
    path = save(tmp_path / "map.tif", classes, **grid)
    output = tmp_path / "map.gpkg"
    count = write_polygons(path, output, CLASSES, min_area, simplify, window)
    layer = Layer(output)
    assert count == len(layer.polygons)
    return layer


def burnt(layer: Layer, shape: tuple[int, int], transform: Affine = NORTH_UP) -> np.ndarray:
    """The layer on the map's grid again, by pixel centres."""
    if not len(layer.polygons):
        return np.full(shape, NODATA, np.uint8)
    pairs = zip(layer.polygons, layer.class_id.tolist(), strict=True)
    return rasterize(pairs, shape, fill=NODATA, transform=transform, dtype="uint8")


def flood(classes: np.ndarray) -> np.ndarray:
    """Numbers of the 4-connected regions in the order of their first pixels."""
    numbers = np.arange(classes.size).reshape(classes.shape)
    down, right = classes[1:] == classes[:-1], classes[:, 1:] == classes[:, :-1]
    before = None
    while before is None or (numbers != before).any():
        before = numbers.copy()
        for _ in range(8):
            numbers[1:][down] = np.minimum(numbers[1:], numbers[:-1])[down]
            numbers[:-1][down] = np.minimum(numbers[1:], numbers[:-1])[down]
            numbers[:, 1:][right] = np.minimum(numbers[:, 1:], numbers[:, :-1])[right]
            numbers[:, :-1][right] = np.minimum(numbers[:, 1:], numbers[:, :-1])[right]
    return np.unique(numbers, return_inverse=True)[1].reshape(classes.shape)


def borders(classes: np.ndarray, here: np.ndarray) -> np.ndarray:
    """How many edges of pixels each class shares with the pixels that are `here`."""
    counts = np.zeros(256, int)
    for axis in (0, 1):
        there, beside = np.moveaxis(here, axis, 0), np.moveaxis(classes, axis, 0)
        counts += np.bincount(beside[1:][there[:-1] & ~there[1:]], minlength=256)
        counts += np.bincount(beside[:-1][there[1:] & ~there[:-1]], minlength=256)
    return counts


def sieved(classes: np.ndarray, least: int) -> np.ndarray:
    """The rule of the sieve taken literally: one region at a time, `least` in pixels."""
    classes = classes.copy()
    while True:
        numbers = flood(classes)
        sizes = np.bincount(numbers.ravel())
        for number in np.argsort(sizes, kind="stable"):
            here = numbers == number
            counts = borders(classes, here)
            counts[NODATA] = 0
            if sizes[number] < least and counts.any() and classes[here][0] != NODATA:
                classes[here] = counts.argmax()
                break
        else:
            return classes


@pytest.mark.parametrize("block", [1, 2, 7])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_polygons_burnt_again_are_the_map(tmp_path, transform, block):
    classes = noise(1, block=block)
    layer = convert(tmp_path, classes, transform=transform)
    assert np.array_equal(burnt(layer, classes.shape, transform), classes)
    assert len(layer.polygons) == sum(
        classes[numbers == number][0] != NODATA
        for numbers in [flood(classes)]
        for number in range(numbers.max() + 1)
    )


@pytest.mark.parametrize("block", [1, 5])
@pytest.mark.parametrize("simplify", [0, 8, 25])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_polygons_cover_the_data_once_without_gaps(tmp_path, transform, simplify, block):
    classes = noise(2, block=block)
    layer = convert(tmp_path, classes, simplify=simplify, transform=transform)
    assert shapely.is_valid(layer.polygons).all()
    valid = (classes != NODATA).sum() * abs(transform.determinant)
    assert shapely.area(layer.polygons).sum() == pytest.approx(valid, rel=1e-9)
    whole = shapely.union_all(layer.polygons, grid_size=1e-4)
    assert whole.area == pytest.approx(valid, rel=1e-7)


@pytest.mark.parametrize("simplify", [0, 8, 25])
def test_neighbours_have_the_same_points_along_their_border(tmp_path, simplify):
    layer = convert(tmp_path, noise(3, block=4), simplify=simplify)
    assert shapely.coverage_is_valid(layer.polygons)
    tree = shapely.STRtree(layer.polygons)
    first, second = tree.query(layer.polygons, predicate="intersects")
    apart = first < second
    overlaps = shapely.intersection(layer.polygons[first[apart]], layer.polygons[second[apart]])
    assert shapely.area(overlaps).max() < 1e-6


def test_simplified_polygons_leave_no_hole_that_was_not_there(tmp_path):
    classes = noise(4, block=6)
    exact = shapely.coverage_union_all(convert(tmp_path, classes).polygons)
    fewer = convert(tmp_path, classes, simplify=20)
    assert shapely.coverage_union_all(fewer.polygons).normalize() == exact.normalize()


def test_simplified_polygons_have_fewer_corners_and_stay_near(tmp_path):
    classes = noise(5, block=9)
    exact = convert(tmp_path, classes, min_area=2000)
    fewer = convert(tmp_path, classes, min_area=2000, simplify=10)
    counts = [shapely.get_num_coordinates(layer.polygons).sum() for layer in (exact, fewer)]
    assert counts[1] < counts[0]
    assert np.array_equal(exact.class_id, fewer.class_id)
    away = shapely.hausdorff_distance(exact.polygons, fewer.polygons)
    assert away.max() < 60


def test_a_region_that_touches_itself_at_a_corner_has_a_hole_there(tmp_path):
    ring = np.array([[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 0]], np.uint8)
    layer = convert(tmp_path, ring)
    assert shapely.is_valid(layer.polygons).all()
    assert sorted(shapely.get_num_interior_rings(layer.polygons).tolist()) == [0, 0, 0, 1]
    closed = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 1]], np.uint8)  # the way round is closed
    layer = convert(tmp_path, closed)
    assert shapely.is_valid(layer.polygons).all()
    assert np.array_equal(burnt(layer, closed.shape), closed)


@pytest.mark.parametrize("settings", [(0, 0), (700, 0), (700, 12)], ids=str)
@pytest.mark.parametrize("ending", [".gpkg", ".geojson"])
def test_the_result_does_not_depend_on_the_window(tmp_path, settings, ending):
    path = save(tmp_path / "map.tif", noise(6, 130, 110, block=3))
    texts = []
    for window in (3, 64, 100, 1000):
        output = tmp_path / f"{window}{ending}"
        write_polygons(path, output, CLASSES, *settings, window)
        if ending == ".gpkg":
            _, _, geometry, fields = pyogrio.raw.read(output)
            texts.append([part.tolist() for part in (geometry, *fields)])
        else:
            texts.append(output.read_text())
    assert texts[0] == texts[1] == texts[2] == texts[3]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("least", [2, 6, 30])
def test_the_sieve_takes_the_smallest_region_first_into_the_longest_border(tmp_path, seed, least):
    classes = noise(seed, 30, 28, block=1 + seed % 3)
    layer = convert(tmp_path, classes, min_area=least * 100 - 50, window=7, **EVEN)
    assert np.array_equal(burnt(layer, classes.shape, EVEN["transform"]), sieved(classes, least))


@pytest.mark.parametrize("seed", range(3))
def test_the_sieve_leaves_nothing_smaller_and_changes_nothing_larger(tmp_path, seed):
    classes, least = noise(seed, block=3), 12
    layer = convert(tmp_path, classes, min_area=least * 100 - 50)
    found, before = burnt(layer, classes.shape), flood(classes)
    large = (np.bincount(before.ravel()) >= least)[before]
    assert np.array_equal(found[large], classes[large])
    assert np.array_equal(found == NODATA, classes == NODATA)
    after = flood(found)
    small = (np.bincount(after.ravel()) < least)[after] & (found != NODATA)
    for number in np.unique(after[small]):  # nothing but islands in pixels without data
        counts = borders(found, after == number)
        assert counts.sum() == counts[NODATA]


def quad(south: float, north: float, width: float) -> float:
    """Square metres between two parallels and two meridians on WGS 84, in closed form."""
    flattening = 1 / 298.257223563
    e2 = flattening * (2 - flattening)
    e = math.sqrt(e2)

    def q(latitude: float) -> float:
        s = math.sin(math.radians(latitude))
        return (1 - e2) * (s / (1 - e2 * s * s) + math.atanh(e * s) / e)

    return math.radians(width) * 6378137**2 / 2 * (q(north) - q(south))


def dense(crs: str, left: float, bottom: float, size: float) -> float:
    """The true area of a square of map units, with 20 000 points along its sides."""
    steps = np.linspace(0, 1, 5000)
    zero, one = np.zeros(5000), np.ones(5000)
    xs = left + size * np.concatenate([steps, one, 1 - steps, zero])
    ys = bottom + size * np.concatenate([zero, steps, one, 1 - steps])
    lon, lat = transform_points(crs, "EPSG:4326", [left + size / 2], [bottom + size / 2])
    flat = f"+proj=laea +lat_0={lat[0]} +lon_0={lon[0]} +datum=WGS84"
    return shapely.Polygon(np.transpose(transform_points(crs, flat, xs, ys))).area


@pytest.mark.parametrize(("south", "west"), [(0, 0), (60, 12), (-34, 179.5), (89, -180)])
def test_a_degree_has_its_known_area(tmp_path, south, west):
    degree = Affine(1 / 3, 0, west, 0, -1 / 3, south + 1)
    layer = convert(tmp_path, np.zeros((3, 3), np.uint8), crs="EPSG:4326", transform=degree)
    assert layer.area_m2[0] == pytest.approx(quad(south, south + 1, 1), rel=1e-9)


def test_the_whole_earth_has_its_known_area(tmp_path):
    for west in (-180, 0):
        whole = Affine(2, 0, west, 0, -2, 90)
        layer = convert(tmp_path, np.ones((90, 180), np.uint8), crs="EPSG:4326", transform=whole)
        assert layer.area_m2[0] == pytest.approx(510065621724088, rel=1e-9)


def test_web_mercator_at_60_degrees_is_four_times_too_large(tmp_path):
    bottom = transform_points("EPSG:4326", "EPSG:3857", [10], [60])[1][0]
    grid = {"crs": "EPSG:3857", "transform": Affine(10, 0, 1e6, 0, -10, bottom + 1000)}
    layer = convert(tmp_path, np.zeros((100, 100), np.uint8), **grid)
    corners = [1e6, 1e6 + 1000], [bottom, bottom + 1000]
    lon, lat = transform_points("EPSG:3857", "EPSG:4326", *corners)
    assert layer.area_m2[0] == pytest.approx(quad(*lat, lon[1] - lon[0]), rel=1e-8)
    assert layer.area_m2[0] == pytest.approx(1e6 / 4, rel=2e-2)


@pytest.mark.parametrize(
    ("crs", "left", "bottom", "size"),
    [
        ("EPSG:32633", 412000, 5326000, 2),
        ("EPSG:32633", 412000, 5326000, 60000),
        ("EPSG:32660", 800000, 1000000, 100000),  # across the antimeridian
        ("EPSG:3413", -20000, -20000, 40000),  # the North Pole inside
        ("EPSG:2154", 700000, 6600000, 30000),  # a cone
        ("EPSG:27700", 400000, 300000, 30000),  # another datum
    ],
)
def test_areas_are_true_in_projected_systems(tmp_path, crs, left, bottom, size):
    grid = {"crs": crs, "transform": Affine(size / 8, 0, left, 0, -size / 8, bottom + size)}
    layer = convert(tmp_path, np.zeros((8, 8), np.uint8), **grid)
    assert layer.area_m2[0] == pytest.approx(dense(crs, left, bottom, size), rel=1e-6)


@pytest.mark.parametrize("simplify", [0, 25])
def test_areas_of_parts_add_up_to_the_whole(tmp_path, simplify):
    classes = noise(8, block=5)
    classes[classes == NODATA] = 0
    parts = convert(tmp_path, classes, simplify=simplify)
    whole = convert(tmp_path, np.zeros_like(classes))
    assert parts.area_m2.sum() == pytest.approx(whole.area_m2[0], rel=1e-7)


def test_min_area_is_measured_on_the_ground(tmp_path):
    classes = np.zeros((40, 40), np.uint8)
    classes[10:14, 10:14] = 1  # 1600 map units, about 400 m²
    bottom = transform_points("EPSG:4326", "EPSG:3857", [10], [60])[1][0]
    grid = {"crs": "EPSG:3857", "transform": Affine(10, 0, 1e6, 0, -10, bottom)}
    assert len(convert(tmp_path, classes, min_area=380, **grid).polygons) == 2
    assert len(convert(tmp_path, classes, min_area=420, **grid).polygons) == 1


def test_a_geopackage_has_the_crs_fields_and_types_of_the_map(tmp_path):
    classes = noise(9, block=10)
    layer = convert(tmp_path, classes)
    assert layer.meta["crs"] == "EPSG:32633"
    assert layer.meta["geometry_type"] == "Polygon"
    assert list(layer.meta["fields"]) == ["class_id", "class", "area_m2"]
    assert [str(kind) for kind in layer.meta["dtypes"]] == ["int32", "object", "float64"]
    assert pyogrio.list_layers(tmp_path / "map.gpkg")[:, 0].tolist() == ["map"]
    assert [CLASSES[number] for number in layer.class_id] == layer.names.tolist()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.gpkg", "map.tif"]


def test_the_journal_of_a_replaced_geopackage_goes_with_it(tmp_path):
    journal = tmp_path / "map.gpkg-wal"  # SQLite would replay it into the new file
    journal.write_bytes(b"of the old file")
    convert(tmp_path, noise(9, block=10))
    assert not journal.exists()


def read_geojson(path: Path) -> tuple[np.ndarray, list[dict]]:
    features = json.loads(path.read_text(encoding="utf-8"))["features"]
    shapes = [shapely.from_geojson(json.dumps(feature["geometry"])) for feature in features]
    return np.array(shapes), [feature["properties"] for feature in features]


@pytest.mark.parametrize("simplify", [0, 25])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_a_geojson_is_in_degrees_by_the_right_hand_rule(tmp_path, transform, simplify):
    path = save(tmp_path / "map.tif", noise(10, block=4), transform=transform)
    output = tmp_path / "map.geojson"
    count = write_polygons(path, output, CLASSES, 900, simplify)
    shapes, properties = read_geojson(output)
    assert len(shapes) == count == pyogrio.read_info(output)["features"]
    assert shapely.is_valid(shapes).all()
    assert shapely.coverage_is_valid(shapes)
    assert shapely.is_ccw(shapely.get_exterior_ring(shapes)).all()
    assert shapely.total_bounds(shapes) == pytest.approx([13.8, 48.07, 13.84, 48.1], abs=0.02)
    write_polygons(path, tmp_path / "map.gpkg", CLASSES, 900, simplify)
    layer = Layer(tmp_path / "map.gpkg")
    assert [each["class"] for each in properties] == layer.names.tolist()
    assert [each["area_m2"] for each in properties] == pytest.approx(layer.area_m2, abs=1e-3)


def test_a_geojson_across_the_antimeridian_does_not_jump(tmp_path):
    grid = {"crs": "EPSG:32660", "transform": Affine(1000, 0, 800000, 0, -1000, 1000000)}
    path = save(tmp_path / "map.tif", np.zeros((9, 50), np.uint8), **grid)
    write_polygons(path, tmp_path / "map.geojson", CLASSES)
    west, _, east, _ = read_geojson(tmp_path / "map.geojson")[0][0].bounds
    assert west < 180 < east < west + 1


def test_long_edges_follow_the_map_in_degrees(tmp_path):
    grid = {"crs": "EPSG:3035", "transform": Affine(30, 0, 3000000, 0, -30, 4000000)}
    path = save(tmp_path / "map.tif", np.zeros((2000, 2000), np.uint8), **grid)
    write_polygons(path, tmp_path / "map.geojson", CLASSES)
    edge = read_geojson(tmp_path / "map.geojson")[0][0].exterior
    xs = 3000000 + np.linspace(0, 60000, 999)
    true = transform_points("EPSG:3035", "EPSG:4326", xs, np.full(999, 4e6))
    true = shapely.points(np.transpose(true))
    assert shapely.distance(edge, true).max() * 111e3 < 30 / 10


@pytest.mark.parametrize("ending", [".gpkg", ".geojson"])
def test_a_map_without_data_is_an_empty_layer(tmp_path, ending):
    path = save(tmp_path / "map.tif", np.full((20, 30), NODATA, np.uint8))
    output = tmp_path / f"map{ending}"
    for settings in ((0, 0), (500, 10)):
        assert write_polygons(path, output, CLASSES, *settings) == 0
        assert pyogrio.read_info(output)["features"] == 0


def test_sixteen_bits_and_a_map_without_nodata_are_read(tmp_path):
    classes = np.arange(300, dtype=np.uint16).reshape(15, 20)
    path = save(tmp_path / "map.tif", classes, nodata=65535)
    assert write_polygons(path, tmp_path / "map.gpkg", [f"c{i}" for i in range(300)]) == 300
    assert len(convert(tmp_path, np.eye(5, dtype=np.uint8), nodata=None).polygons) == 7


BAD = {
    "value": (np.full((5, 5), 7, np.uint8), {}, "the value 7 is neither a class nor nodata"),
    "crs": (np.zeros((5, 5), np.uint8), {"crs": None}, "has no CRS"),
    "floats": (np.zeros((5, 5), np.float32), {}, r"has 1 band\(s\) of float32"),
    "beyond": (
        np.zeros((5, 5), np.uint8),
        {"crs": "EPSG:4326", "transform": Affine(1, 0, 0, 0, -1, 300)},
        "reaches beyond what its CRS can",
    ),
    "off the disk": (
        np.zeros((5, 5), np.uint8),
        {
            "crs": "+proj=geos +h=35785831 +lon_0=0 +sweep=y +datum=WGS84",
            "transform": Affine(4e6, 0, -1e7, 0, -4e6, 1e7),
        },
        "reaches beyond what its CRS can",
    ),
}


@pytest.mark.parametrize(("classes", "grid", "message"), BAD.values(), ids=BAD)
def test_a_wrong_map_is_named_in_one_line_and_nothing_is_written(tmp_path, classes, grid, message):
    path = save(tmp_path / "map.tif", classes, **grid)
    with pytest.raises(PolygonError, match=message) as error:
        write_polygons(path, tmp_path / "new" / "map.gpkg", CLASSES)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert error.value.exit_code == 3
    assert list(tmp_path.iterdir()) == [path]


def test_a_damaged_map_is_named_and_nothing_is_written(tmp_path):
    path = save(tmp_path / "map.tif", noise(14, 200, 200))
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(PolygonError, match=r"map.tif: cannot be read"):
        write_polygons(path, tmp_path / "map.gpkg", CLASSES)
    assert list(tmp_path.iterdir()) == [path]


def test_a_wrong_ending_is_refused_before_the_map_is_read(tmp_path):
    with pytest.raises(PolygonError, match=r"map.shp: polygons are written as .gpkg or .geojson"):
        write_polygons(tmp_path / "none.tif", tmp_path / "map.shp", CLASSES)


@pytest.mark.parametrize("ending", [".gpkg", ".geojson"])
def test_a_failure_on_the_way_leaves_the_old_layer_and_nothing_else(tmp_path, monkeypatch, ending):
    path = save(tmp_path / "map.tif", noise(11))
    output = tmp_path / f"map{ending}"
    output.write_text("the old one")
    areas, calls = Ground.areas, []

    def fail_later(ground: Ground, shapes: np.ndarray) -> np.ndarray:
        calls.append(len(shapes))
        if len(calls) == 4:
            raise OSError("disk full")
        return areas(ground, shapes)

    monkeypatch.setattr(layers, "CHUNK", 1000)
    monkeypatch.setattr(Ground, "areas", fail_later)
    with pytest.raises(OSError, match="disk full"):
        write_polygons(path, output, CLASSES)
    assert output.read_text() == "the old one"
    assert sorted(tmp_path.iterdir()) == sorted([path, output])


def test_what_the_driver_cannot_write_is_one_line(tmp_path, monkeypatch):
    path = save(tmp_path / "map.tif", noise(12, block=9))

    def refuse(*_: object, **__: object) -> None:
        raise pyogrio.errors.DataSourceError("disk full")

    monkeypatch.setattr(pyogrio.raw, "write", refuse)
    with pytest.raises(PolygonError, match=r"map.gpkg: not written; disk full\?") as caught:
        write_polygons(path, tmp_path / "map.gpkg", CLASSES)
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == [path]


def test_a_layer_in_chunks_is_the_same_layer(tmp_path, monkeypatch):
    classes = noise(13, block=2)
    whole = convert(tmp_path, classes, simplify=12)
    monkeypatch.setattr(layers, "CHUNK", 300)
    chunks = convert(tmp_path, classes, simplify=12)
    assert whole.wkb == chunks.wkb
    assert whole.area_m2.tolist() == chunks.area_m2.tolist()
