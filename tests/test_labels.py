"""Labels on a scene's grid: rasters as a walk from pixel to pixel finds them, polygons as one burn.

In any CRS and at any window; what values mean, and which of several files comes first.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pyogrio.raw import write as write_ogr
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.features import rasterize
from rasterio.transform import Affine, from_bounds
from rasterio.warp import transform, transform_bounds
from shapely.geometry import MultiPolygon, Polygon, box, mapping

from config import Dataset
from utils import warping
from utils.grids import Grid
from utils.label_rasters import nodata_class
from utils.label_values import HOLE, LabelRules, ids_by_table, label_rules
from utils.labels import (
    check_values,
    find_labels,
    labels_identity,
    open_labels,
    without_borders,
)
from utils.opening import RasterError
from utils.raster import Reading, open_scene
from utils.tiling import Tile, tiles
from utils.vectors import VectorError

HEIGHT, WIDTH = 150, 200
UTM = CRS.from_epsg(32633)
SCENE = Affine(0.5, 0, 412000, 0, -0.5, 5326000)
WHOLE = Tile(0, 0, HEIGHT, WIDTH)
CLASSES, IGNORE = 5, 255
TIE = 1e-4  # label pixels: a centre this close to an edge may fall to either side


def over_scene(epsg: int, height: int, width: int) -> Affine:
    """A grid in another CRS that covers the scene with a margin."""
    left, top = SCENE @ (-20, -20)
    right, bottom = SCENE @ (WIDTH + 20, HEIGHT + 20)
    bounds = transform_bounds(UTM, CRS.from_epsg(epsg), left, bottom, right, top)
    return from_bounds(*bounds, width, height)


NORTH_UP = Affine(0.4, 0, 411990, 0, -0.4, 5326010)
CASES = {  # CRS, transform, shape, declared nodata
    "offset": (32633, SCENE @ Affine.translation(-3.3, -7.7), (180, 230), None),
    "coarser": (32633, Affine(1.7, 0, 411980, 0, -1.7, 5326020), (80, 90), None),
    "partial": (32633, SCENE @ Affine.translation(60.2, 41.6), (60, 70), None),
    "rotated": (
        32633, SCENE @ Affine.translation(-20, -60) @ Affine.rotation(10), (280, 330), None,
    ),
    "south-up": (32633, Affine(0.5, 0, 411990.1, 0, 0.5, 5325915.2), (200, 240), None),
    "nodata 0": (32633, SCENE @ Affine.translation(-2.6, -1.4), (150, 210), 0),
    "web mercator": (3857, over_scene(3857, 240, 290), (240, 290), None),
    "degrees": (4326, over_scene(4326, 330, 310), (330, 310), None),
}  # fmt: skip


@pytest.fixture
def scene_path(write_tiff) -> Path:
    return write_tiff("scene.tif", np.ones((3, HEIGHT, WIDTH), np.uint8), transform=SCENE)


def walk(classes: np.ndarray, label: Grid, scene: Grid) -> tuple[np.ndarray, np.ndarray]:
    """Labels by carrying each pixel's centre to the label raster, and which are not ties."""
    rows, cols = np.mgrid[: scene.height, : scene.width]
    x, y = scene.transform @ (cols + 0.5, rows + 0.5)
    x, y = transform(scene.crs, label.crs, x.ravel(), y.ravel())
    cols, rows = ~label.transform @ (np.array(x), np.array(y))
    clear = (np.abs(cols - np.rint(cols)) > TIE) & (np.abs(rows - np.rint(rows)) > TIE)
    cols, rows = np.floor(cols).astype(int), np.floor(rows).astype(int)
    inside = (rows >= 0) & (rows < label.height) & (cols >= 0) & (cols < label.width)
    found = np.full(rows.shape, IGNORE)
    found[inside] = classes[rows[inside], cols[inside]]
    shape = scene.height, scene.width
    return found.reshape(shape), clear.reshape(shape)


def rules_of(classes=CLASSES, ignore=IGNORE, mapping=None, **options) -> LabelRules:
    """Rules as a configuration gives them; mapping: values of each class, in order."""
    dataset = {"ignore_index": ignore, "labels": options}
    if mapping is not None:
        dataset["classes"] = [{"name": f"c{n}", "values": v} for n, v in enumerate(mapping)]
    config = Dataset.model_validate(dataset)
    return label_rules(config, classes if mapping is None else len(mapping))


def read(label: Path | list[Path], scene_path: Path, tile=WHOLE, rules=None, **options):
    paths = label if isinstance(label, list) else [label]
    rules = rules or rules_of(**options)
    with open_scene(scene_path) as scene, open_labels(paths, scene, rules) as labels:
        return labels.read(tile)


def checked(label: Path | list[Path], scene_path: Path, size=64, **options) -> None:
    paths = label if isinstance(label, list) else [label]
    with (
        open_scene(scene_path) as scene,
        open_labels(paths, scene, rules_of(**options)) as labels,
    ):
        check_values(labels, scene, tiles(scene.grid.height, scene.grid.width, size))


def nearby(label: Path, scene_path: Path) -> set[int]:
    """All values around a scene that are not IGNORE, whatever they mean."""
    nothing = LabelRules(2, {})
    with open_scene(scene_path) as scene, open_labels([label], scene, nothing) as labels:
        return labels.sources[0].unlisted_around(scene.grid)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("turned_scene", [False, True], ids=["north-up", "turned"])
def test_labels_are_those_that_lie_under_the_pixel_centres(write_tiff, rng, case, turned_scene):
    epsg, place, shape, nodata = CASES[case]
    turn = Affine.rotation(-7) if turned_scene else Affine.identity()
    grid = Grid(UTM, SCENE @ turn, HEIGHT, WIDTH)
    scene_path = write_tiff(
        "scene.tif", np.ones((3, HEIGHT, WIDTH), np.uint8), transform=grid.transform
    )
    classes = rng.integers(0, CLASSES, shape, dtype=np.uint8)
    label = write_tiff(
        "label.tif", classes, crs=CRS.from_epsg(epsg), transform=place, nodata=nodata
    )
    expected, clear = walk(classes, Grid(CRS.from_epsg(epsg), place, *shape), grid)
    found = read(label, scene_path)
    assert (found[clear] == expected[clear]).all()
    assert clear.mean() > 0.99
    assert 0 < (expected == IGNORE).mean() < 1 or case not in {"partial"}


@pytest.mark.parametrize("case", CASES)
def test_a_window_reads_what_the_whole_reads_there(write_tiff, scene_path, rng, case):
    epsg, place, shape, nodata = CASES[case]
    classes = rng.integers(0, CLASSES, shape, dtype=np.uint8)
    label = write_tiff(
        "label.tif", classes, crs=CRS.from_epsg(epsg), transform=place, nodata=nodata
    )
    with open_scene(scene_path) as scene, open_labels([label], scene, rules_of()) as labels:
        whole = labels.read(WHOLE)
        for tile in [*tiles(HEIGHT, WIDTH, 48), *tiles(HEIGHT, WIDTH, 16, 0.5), Tile(149, 3, 1, 9)]:
            rows, cols = (
                slice(tile.row, tile.row + tile.height),
                slice(tile.col, tile.col + tile.width),
            )
            assert np.array_equal(labels.read(tile), whole[rows, cols])


def test_what_the_label_raster_does_not_cover_is_ignored(write_tiff, scene_path):
    place = SCENE @ Affine.translation(50, 40)
    label = write_tiff("label.tif", np.zeros((60, 70), np.uint8), transform=place)
    found = read(label, scene_path)
    assert (found[40:100, 50:120] == 0).all()
    assert (found == IGNORE).sum() == HEIGHT * WIDTH - 60 * 70


def test_a_declared_nodata_that_is_a_class_stays_a_class(write_tiff, scene_path, rng):
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    for nodata in (0, 3):
        label = write_tiff("label.tif", classes, transform=SCENE, nodata=nodata)
        assert np.array_equal(read(label, scene_path), classes)
        assert nodata_class(label, rules_of()) == nodata


@pytest.mark.parametrize("nodata", [5, 200, 255])
def test_a_declared_nodata_that_is_no_class_is_ignored(write_tiff, scene_path, rng, nodata):
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    classes[30:60] = nodata
    label = write_tiff("label.tif", classes, transform=SCENE, nodata=nodata)
    found = read(label, scene_path)
    assert (found[30:60] == IGNORE).all()
    assert np.array_equal(np.delete(found, range(30, 60), 0), np.delete(classes, range(30, 60), 0))
    assert nodata_class(label, rules_of()) is None


@pytest.mark.parametrize("ignore", [255, 65535])
def test_ignore_index_may_lie_beyond_the_label_rasters_type(write_tiff, scene_path, rng, ignore):
    classes = rng.integers(0, CLASSES, (60, 70), dtype=np.uint8)
    found = read(write_tiff("label.tif", classes, transform=SCENE), scene_path, ignore=ignore)
    assert np.array_equal(found[:60, :70], classes)
    assert (found[60:] == ignore).all()


def test_an_undeclared_ignore_value_stays_what_it_is(write_tiff, scene_path):
    classes = np.zeros((HEIGHT, WIDTH), np.uint8)
    classes[:20] = IGNORE  # GDAL's warper may not step aside from the value it fills with
    assert np.array_equal(read(write_tiff("l.tif", classes, transform=SCENE), scene_path), classes)


@pytest.mark.parametrize("internal", [True, False])
@pytest.mark.parametrize("nodata", [None, 0])
def test_masked_label_pixels_are_ignored(write_tiff, scene_path, rng, internal, nodata):
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[70:90] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        label = write_tiff("label.tif", classes, transform=SCENE, mask=mask, nodata=nodata)
    found = read(label, scene_path)
    assert np.array_equal(found, np.where(mask > 0, classes, IGNORE))


@pytest.mark.parametrize("place", ["one CRS", "degrees", "warper"])
@pytest.mark.parametrize("internal", [True, False])
@pytest.mark.parametrize("nodata", [None, 0, 200])
def test_a_mask_and_nodata_each_hide_label_pixels(
    write_tiff, scene_path, rng, monkeypatch, internal, nodata, place
):
    epsg, where, shape, _ = CASES["offset" if place == "one CRS" else "degrees"]
    monkeypatch.setattr(warping, "CLOSE", 0 if place == "warper" else warping.CLOSE)
    classes = rng.integers(0, CLASSES, shape, dtype=np.uint8)
    classes[60:80] = 200
    mask = np.full(shape, 255, np.uint8)
    mask[70:90] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        label = write_tiff(
            "label.tif", classes, crs=CRS.from_epsg(epsg), transform=where, mask=mask,
            nodata=nodata,
        )  # fmt: skip
    classes[70:90] = IGNORE
    classes[60:70] = IGNORE if nodata == 200 else 4
    grid = Grid(UTM, SCENE, HEIGHT, WIDTH)
    expected, clear = walk(classes, Grid(CRS.from_epsg(epsg), where, *shape), grid)
    last = [4] if nodata == 200 else [4, 200]
    found = read(label, scene_path, mapping=[[0], [1], [2], [3], last])
    assert np.array_equal(found[clear], expected[clear])
    assert 0 < (found == IGNORE).mean() < 1


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] != 32633])
@pytest.mark.parametrize(
    "dtype", ["uint8", "uint16", "uint32", "int16", "int32", "int64", "float32", "float64"]
)
def test_what_is_left_to_the_warper_has_the_same_labels(
    write_tiff, scene_path, rng, monkeypatch, case, dtype
):
    epsg, place, shape, _ = CASES[case]
    values = rng.choice([0, 1, 2, 3, 4, 7, IGNORE], shape).astype(dtype)
    label = write_tiff("label.tif", values, crs=CRS.from_epsg(epsg), transform=place, nodata=7)
    crs = CRS.from_epsg(epsg)
    _, clear = walk(values, Grid(crs, place, *shape), Grid(UTM, SCENE, HEIGHT, WIDTH))
    usual = read(label, scene_path)
    monkeypatch.setattr(warping, "CLOSE", 0)
    assert np.array_equal(read(label, scene_path)[clear], usual[clear])


@pytest.mark.parametrize(
    "dtype",
    ["int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64"],
)
def test_labels_of_any_number_type_are_read(write_tiff, scene_path, rng, dtype):
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH)).astype(dtype)
    label = write_tiff("label.tif", classes, transform=SCENE)
    found = read(label, scene_path)
    assert found.dtype == np.int32
    assert np.array_equal(found, classes)


@pytest.mark.parametrize("nodata", [None, float("nan"), -9999])
def test_nan_and_nodata_of_float_labels_are_ignored(write_tiff, scene_path, rng, nodata):
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH)).astype(np.float32)
    classes[:50] = np.nan if nodata is None else nodata
    label = write_tiff("label.tif", classes, transform=SCENE, nodata=nodata)
    found = read(label, scene_path)
    assert (found[:50] == IGNORE).all()
    assert np.array_equal(found[50:], classes[50:])


def test_a_label_that_is_no_whole_number_is_refused(write_tiff, scene_path):
    label = write_tiff("label.tif", np.full((9, 9), 1.5, np.float32), transform=SCENE)
    with pytest.raises(RasterError, match=r"holds 1\.5"):
        read(label, scene_path)


@pytest.mark.parametrize("shape", [(1, 1), (1, 200), (150, 1), (40, 50)])
def test_a_scene_smaller_than_a_tile_has_ignored_labels_past_its_border(write_tiff, rng, shape):
    scene_path = write_tiff("scene.tif", np.ones((3, *shape), np.uint8), transform=SCENE)
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    found = read(write_tiff("l.tif", classes, transform=SCENE), scene_path, Tile(0, 0, 64, 64))
    rows, cols = min(64, shape[0]), min(64, shape[1])
    assert found.shape == (64, 64)
    assert np.array_equal(found[:rows, :cols], classes[:rows, :cols])
    assert (found != IGNORE).sum() == rows * cols


# Places that do not fit


def plain(write_tiff, name: str, pixels: np.ndarray, **profile) -> Path:
    """A raster without a place on the Earth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        return write_tiff(name, pixels, crs=None, transform=None, **profile)


def test_a_georeference_on_one_side_only_is_an_error(write_tiff, scene_path, rng):
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    without = plain(write_tiff, "plain.tif", classes)
    with pytest.raises(RasterError, match=r"plain\.tif: has no CRS or transform.*gdal_translate"):
        read(without, scene_path)
    no_crs = write_tiff("no_crs.tif", classes, crs=None, transform=SCENE)
    with pytest.raises(RasterError, match=r"no_crs\.tif: has no CRS"):
        read(no_crs, scene_path)
    plain_scene = plain(write_tiff, "plain_scene.tif", np.ones((3, HEIGHT, WIDTH), np.uint8))
    label = write_tiff("label.tif", classes, transform=SCENE)
    with pytest.raises(RasterError, match=r"plain_scene\.tif: has no CRS"):
        read(label, plain_scene)


def test_without_any_georeference_labels_of_the_same_shape_are_read_as_they_are(write_tiff, rng):
    scene = plain(write_tiff, "scene.tif", np.ones((3, HEIGHT, WIDTH), np.uint8))
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    label = plain(write_tiff, "label.tif", classes)
    assert np.array_equal(read(label, scene), classes)
    other = plain(write_tiff, "other.tif", classes[:-1])
    with pytest.raises(RasterError, match=r"149×200 pixels.*150×200"):
        read(other, scene)


def test_nodata_and_masks_of_labels_without_georeference_are_ignored_too(write_tiff, rng):
    scene = plain(write_tiff, "scene.tif", np.ones((3, HEIGHT, WIDTH), np.uint8))
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    classes[:20] = 200
    expected = np.where(classes == 200, IGNORE, classes)
    assert np.array_equal(read(plain(write_tiff, "a.tif", classes, nodata=200), scene), expected)
    mask = np.where(classes == 200, 0, 255).astype(np.uint8)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        masked = plain(write_tiff, "b.tif", classes, mask=mask)
    assert np.array_equal(read(masked, scene), expected)
    a_class = plain(write_tiff, "c.tif", classes % 5, nodata=0)
    assert np.array_equal(read(a_class, scene), classes % 5)


@pytest.mark.parametrize(
    ("epsg", "place"),
    [
        (32633, Affine(1, 0, 500000, 0, -1, 5000000)),
        (32645, Affine(1, 0, 300000, 0, -1, 3000000)),
        (5070, Affine(1, 0, -1.5e6, 0, -1, 1.8e6)),
        (3031, Affine(1, 0, 0, 0, -1, 0)),
        (4326, Affine(0.001, 0, -165, 0, -0.001, -45)),
    ],
)
def test_no_overlap_is_an_error_that_names_both_extents(write_tiff, scene_path, epsg, place):
    label = write_tiff(
        "label.tif", np.zeros((50, 60), np.uint8), crs=CRS.from_epsg(epsg), transform=place
    )
    with pytest.raises(RasterError) as caught:
        read(label, scene_path)
    said = str(caught.value)
    assert "no overlap" in said
    assert said.count(" E, ") == said.count(" N") == 2
    assert "13.8" in said  # the scene's longitude
    assert "\n" not in said


@pytest.mark.parametrize("epsg", [4326, 3857])
def test_labels_of_the_whole_world_cover_every_scene(write_tiff, scene_path, epsg):
    west, north = (-180, 90) if epsg == 4326 else (-20037508.34, 20037508.34)
    classes = np.full((180, 360), 4, np.uint8)
    place = from_bounds(west, -north, -west, north, 360, 180)
    label = write_tiff("label.tif", classes, crs=f"EPSG:{epsg}", transform=place)
    checked(label, scene_path)
    assert (read(label, scene_path) == 4).all()


def test_a_scene_that_reaches_past_the_rim_of_the_earth_has_labels(write_tiff):
    crs = "+proj=geos +h=35786023 +lon_0=-75 +sweep=x"
    pixels = np.ones((3, 100, 100), np.uint8)
    place = Affine(2e5, 0, -1e7, 0, -2e5, 1e7)  # the whole disc, and space around it
    scene = write_tiff("scene.tif", pixels, crs=crs, transform=place)
    world = from_bounds(-180, -90, 180, 90, 360, 180)
    label = write_tiff("l.tif", np.full((180, 360), 4, np.uint8), crs="EPSG:4326", transform=world)
    checked(label, scene)
    found = read(label, scene, Tile(0, 0, 100, 100))
    assert found[50, 50] == 4
    assert found[0, 0] == IGNORE
    west = write_tiff("west.tif", pixels[:, :, :50], crs=crs, transform=place)
    east = from_bounds(-40, 10, -39, 11, 360, 180)
    label = write_tiff("l.tif", np.full((180, 360), 4, np.uint8), crs="EPSG:4326", transform=east)
    with pytest.raises(RasterError, match=r"overlap.* in its own CRS; .*-40\.00000\.\.-39"):
        read(label, west)


def test_a_local_crs_is_no_place_on_the_earth(write_tiff, scene_path, rng):
    site = 'LOCAL_CS["site grid",UNIT["metre",1]]'
    scene = write_tiff("local.tif", np.ones((3, HEIGHT, WIDTH), np.uint8), crs=site)
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    label = write_tiff("label.tif", classes, transform=SCENE)
    with pytest.raises(RasterError, match=r"local\.tif: has no CRS or transform"):
        read(label, scene)
    assert np.array_equal(read(write_tiff("l.tif", classes, crs=site), scene), classes)


@pytest.mark.parametrize("case", CASES)
def test_values_around_the_scene_hold_all_that_its_grid_shows(write_tiff, scene_path, rng, case):
    epsg, place, shape, _ = CASES[case]
    classes = rng.integers(0, 250, shape, dtype=np.uint8)
    label = write_tiff("label.tif", classes, crs=CRS.from_epsg(epsg), transform=place)
    with open_scene(scene_path) as scene, open_labels([label], scene, rules_of(250)) as labels:
        (source,) = labels.sources
        counts = source.met(tiles(HEIGHT, WIDTH, 64))
        values = source.values(WHOLE)
    assert counts == {v: (values == v).sum() for v in np.unique(values).tolist() if v != HOLE}
    assert set(counts) - {IGNORE} <= nearby(label, scene_path)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("corner", [(0, 0), (0, -1), (-1, 0), (-1, -1)])
def test_a_value_under_a_corner_of_the_scene_alone_is_seen(write_tiff, scene_path, case, corner):
    epsg, place, shape, _ = CASES[case]
    numbers = np.arange(shape[0] * shape[1], dtype=np.int32).reshape(shape)
    crs = CRS.from_epsg(epsg)
    grid = Grid(UTM, SCENE, HEIGHT, WIDTH)
    under = walk(numbers, Grid(crs, place, *shape), grid)[0][corner]
    if case == "partial":
        under = numbers[corner]  # the scene is the larger one: a corner of the labels
    classes = np.where(numbers == under, 7, 0).astype(np.uint8)
    label = write_tiff("label.tif", classes, crs=crs, transform=place)
    assert nearby(label, scene_path) == {0, 7}


def test_values_far_from_the_scene_are_not_held_against_it(write_tiff, scene_path):
    classes = np.zeros((1000, 1200), np.uint8)
    classes[500:] = 77
    label = write_tiff("label.tif", classes, transform=SCENE)
    assert nearby(label, scene_path) == {0}
    checked(label, scene_path)


def test_a_label_raster_of_several_bands_is_refused(write_tiff, scene_path):
    label = write_tiff("label.tif", np.zeros((2, 9, 9), np.uint8), transform=SCENE)
    with pytest.raises(RasterError, match="has 2 bands, a label raster has one"):
        read(label, scene_path)


def test_a_missing_or_truncated_label_raster_is_named(write_tiff, scene_path, rng, tmp_path):
    with pytest.raises(RasterError, match=r"gone\.tif: no such file.*label_path"):
        read(tmp_path / "gone.tif", scene_path)
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    label = write_tiff("label.tif", classes, transform=SCENE)
    label.write_bytes(label.read_bytes()[:-100])
    with pytest.raises(RasterError, match=r"label\.tif: truncated"):
        read(label, scene_path)


@pytest.mark.parametrize("place", ["one CRS", "degrees", "warper"])
def test_damaged_pixels_of_a_label_raster_are_an_error_that_names_it(
    write_tiff, scene_path, rng, monkeypatch, place
):
    epsg, where, shape, _ = CASES["offset" if place == "one CRS" else "degrees"]
    monkeypatch.setattr(warping, "CLOSE", 0 if place == "warper" else warping.CLOSE)
    classes = rng.integers(0, CLASSES, shape, dtype=np.uint8)
    crs = CRS.from_epsg(epsg)
    label = write_tiff("label.tif", classes, crs=crs, transform=where, compress="deflate")
    content = bytearray(label.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 999] = b"\xff" * 999
    label.write_bytes(content)
    for use in (read, checked):
        with pytest.raises(RasterError, match=r"label\.tif: cannot read its pixels \(.+\)"):
            use(label, scene_path)


# What values mean

MERGED = [[11, 12], [41, 42, 43], [], [95]]


def mapped(values: np.ndarray, mapping: list[list[int]], rest: int = IGNORE) -> np.ndarray:
    """Class ids by a table of values; `rest` where a value is no class."""
    ids = np.full(values.shape, rest)
    for number, own in enumerate(mapping):
        ids[np.isin(values, own)] = number
    return ids


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "uint32", "int64", "float32"])
def test_classes_merge_and_rename_values_of_any_number_type(write_tiff, scene_path, rng, dtype):
    values = rng.choice([11, 12, 41, 42, 43, 95, IGNORE], (HEIGHT, WIDTH)).astype(dtype)
    label = write_tiff("label.tif", values, transform=SCENE)
    checked(label, scene_path, mapping=MERGED)
    found = read(label, scene_path, mapping=MERGED)
    assert np.array_equal(found, mapped(values, MERGED))
    assert set(np.unique(found)) == {0, 1, 3, IGNORE}


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64"])
@pytest.mark.parametrize("changed", [{}, {4: 0}, {0: 4}, {2: -1}, {9: 3}])
def test_ids_are_what_the_table_says_of_each_value(rng, dtype, changed):
    table = np.arange(10, dtype=np.int32)
    for value, number in changed.items():
        table[value] = number
    values = rng.integers(0, 5, (130, 70)).astype(dtype)
    wanted = table[values]
    ids = ids_by_table(values, table)
    assert (ids.dtype, ids.tolist()) == (table.dtype, wanted.tolist())
    assert not np.shares_memory(ids, values)
    for odd in {-1, 10} if dtype != "uint8" else {10}:
        values[-1, -1] = odd
        assert ids_by_table(values, table) is None


def test_an_ignore_value_that_a_class_lists_is_that_class(write_tiff, scene_path):
    values = np.where(np.arange(WIDTH) < 50, IGNORE, 3)[None].repeat(HEIGHT, 0).astype(np.uint8)
    found = read(write_tiff("l.tif", values, transform=SCENE), scene_path, mapping=[[3], [IGNORE]])
    assert np.array_equal(found, np.where(values == IGNORE, 1, 0))


@pytest.mark.parametrize("dtype", ["int16", "int32", "float32"])
def test_a_value_below_zero_is_one_like_any_other(write_tiff, scene_path, rng, dtype):
    values = rng.choice([-1, 0, 1], (HEIGHT, WIDTH)).astype(dtype)
    label = write_tiff("label.tif", values, transform=SCENE)
    with pytest.raises(RasterError, match=r"no class, first -1; .*values: \[-1\]"):
        checked(label, scene_path, classes=2)
    found = read(label, scene_path, mapping=[[-1], [0, 1]])
    assert np.array_equal(found, np.where(values == -1, 0, 1))
    ignored = read(label, scene_path, classes=2, nodata=-1)
    assert np.array_equal(ignored, np.where(values == -1, IGNORE, values))


def test_large_values_are_classes_too(write_tiff, scene_path, rng):
    values = rng.choice([70000, 4000000000, 4294967295], (HEIGHT, WIDTH)).astype(np.uint32)
    label = write_tiff("label.tif", values, transform=SCENE)
    mapping = [[70000], [4000000000, 4294967295]]
    checked(label, scene_path, mapping=mapping)
    assert np.array_equal(read(label, scene_path, mapping=mapping), mapped(values, mapping))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
@pytest.mark.parametrize(("unlisted", "background"), [
    ("ignore", 0), ("background", 2), ("background", "ignore"),
])  # fmt: skip
def test_unlisted_values_become_what_the_config_says(
    write_tiff, scene_path, rng, dtype, unlisted, background
):
    values = rng.choice([11, 41, 95, 77], (HEIGHT, WIDTH)).astype(dtype)
    label = write_tiff("label.tif", values, transform=SCENE)
    options = {"mapping": MERGED, "unlisted": unlisted, "background": background}
    checked(label, scene_path, **options)
    rest = IGNORE if "ignore" in (unlisted, background) else background
    assert np.array_equal(read(label, scene_path, **options), mapped(values, MERGED, rest))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "float32"])
@pytest.mark.parametrize("size", [32, 64, 512])
def test_unlisted_values_are_an_error_with_a_histogram_and_the_line_to_add(
    write_tiff, scene_path, dtype, size
):
    values = np.full((HEIGHT, WIDTH), 11, dtype)
    values[10:20, 10:20], values[40, :30], values[60:70, 50:90] = 7, 41, 77
    label = write_tiff("label.tif", values, transform=SCENE)
    with pytest.raises(RasterError) as caught:
        checked(label, scene_path, size, mapping=MERGED)
    line = str(caught.value)
    assert line.startswith(f"{label}: 2 value(s) on scene scene are no class, first 77; ")
    assert f"{{11: {HEIGHT * WIDTH - 530}, 77: 400, 7: 100, 41: 30}}" in line
    assert "add - {name: NAME, values: [77]} to dataset.classes" in line
    assert "dataset.labels.unlisted: ignore" in line
    assert "\n" not in line


def test_a_tile_with_an_unlisted_value_is_never_read(write_tiff, scene_path):
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[90, 90] = 77
    label = write_tiff("label.tif", values, transform=SCENE)
    assert (read(label, scene_path, Tile(0, 0, 64, 64)) == 0).all()
    with pytest.raises(RasterError, match=r"label\.tif: values that are no class in r000064_c0000"):
        read(label, scene_path, Tile(64, 64, 64, 64))


def test_classes_without_any_values_mean_their_own_ids():
    unnamed = {"classes": [{"name": "field"}, {"name": "wood"}, {"name": "water"}]}
    rules = label_rules(Dataset.model_validate(unnamed), 3)
    assert rules.ids == {"0": 0, "1": 1, "2": 2}
    unnamed["classes"][1]["values"] = [4, "mixed"]
    assert label_rules(Dataset.model_validate(unnamed), 3).ids == {"4": 1, "mixed": 1}


def test_a_text_that_only_looks_like_a_number_is_no_raster_value(write_tiff, scene_path, rng):
    for dtype in ("uint8", "int32"):
        values = rng.choice([1, 2], (HEIGHT, WIDTH)).astype(dtype)
        label = write_tiff("label.tif", values, transform=SCENE)
        found = read(label, scene_path, mapping=[["01"], [2]], unlisted="ignore")
        assert np.array_equal(found, np.where(values == 2, 1, IGNORE))


# Values that mean no label


@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32"])
@pytest.mark.parametrize("declared", [None, 3, 9])
@pytest.mark.parametrize("georeferenced", [True, False])
def test_labels_nodata_decides_which_value_is_no_label(
    write_tiff, scene_path, rng, dtype, declared, georeferenced
):
    values = rng.choice([0, 1, 3, 9], (HEIGHT, WIDTH)).astype(dtype)
    if georeferenced:
        label = write_tiff("l.tif", values, transform=SCENE, nodata=declared)
    else:
        scene_path = plain(write_tiff, "scene.tif", np.ones((3, HEIGHT, WIDTH), np.uint8))
        label = plain(write_tiff, "l.tif", values, nodata=declared)
    mapping = [[0], [1, 9], [3]]
    everything = mapped(values, mapping)
    for nodata in ("auto", "none"):  # a class stays a class whatever is declared
        assert np.array_equal(read(label, scene_path, mapping=mapping, nodata=nodata), everything)
    for value in (0, 3, 9):
        found = read(label, scene_path, mapping=mapping, nodata=float(value))
        assert np.array_equal(found, np.where(values == value, IGNORE, everything))
        assert nodata_class(label, rules_of(mapping=mapping, nodata=float(value))) == (
            None if declared in (None, value) else {3: 2, 9: 1}[declared]
        )


@pytest.mark.parametrize("nodata", ["none", 1])
def test_a_declared_nodata_that_is_no_class_counts_with_auto_only(write_tiff, scene_path, nodata):
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[:20] = 200
    label = write_tiff("l.tif", values, transform=SCENE, nodata=200)
    checked(label, scene_path)
    assert (read(label, scene_path)[:20] == IGNORE).all()
    with pytest.raises(RasterError, match="first 200; "):
        checked(label, scene_path, nodata=nodata)


def test_a_value_that_is_no_label_is_not_held_against_it(write_tiff, scene_path):
    values = np.zeros((HEIGHT, WIDTH), np.int16)
    values[:20] = -1
    label = write_tiff("l.tif", values, transform=SCENE)
    checked(label, scene_path, nodata=-1)
    assert (read(label, scene_path, nodata=-1)[:20] == IGNORE).all()


# Several files


def test_where_several_rasters_cover_a_pixel_the_first_listed_counts(write_tiff, scene_path, rng):
    parts = [(20, 30, 60, 80), (50, 10, 70, 120), (0, 0, 90, 100)]  # row, col, rows, cols
    expected = np.full((HEIGHT, WIDTH), IGNORE)
    paths = []
    for number, (row, col, rows, cols) in enumerate(parts):
        classes = rng.integers(0, CLASSES, (rows, cols), dtype=np.uint8)
        place = SCENE @ Affine.translation(col, row)
        paths.append(write_tiff(f"{number}.tif", classes, transform=place))
        inside = expected[row : row + rows, col : col + cols]
        inside[:] = np.where(inside == IGNORE, classes, inside)
    assert np.array_equal(read(paths, scene_path), expected)
    assert not np.array_equal(read(paths[::-1], scene_path), expected)


def test_a_later_file_fills_what_the_first_leaves_open_but_not_what_it_ignores(
    write_tiff, scene_path
):
    first = np.zeros((HEIGHT, WIDTH), np.uint8)
    first[:20], first[20:40] = 200, IGNORE  # no data; ignored
    paths = [
        write_tiff("a.tif", first, transform=SCENE, nodata=200),
        write_tiff("b.tif", np.full((HEIGHT, WIDTH), 4, np.uint8), transform=SCENE),
    ]
    found = read(paths, scene_path)
    assert (found[:20] == 4).all()
    assert (found[20:40] == IGNORE).all()
    assert (found[40:] == 0).all()


def test_files_that_do_not_meet_the_scene_are_left_out(write_tiff, scene_path, tmp_path):
    far = write_tiff("far.tif", np.zeros((9, 9), np.uint8), transform=Affine(1, 0, 5e5, 0, -1, 5e6))
    near = write_tiff("near.tif", np.ones((HEIGHT, WIDTH), np.uint8), transform=SCENE)
    roofs = write_geojson(tmp_path / "roofs.geojson", [(over_land(500, 900), {})])
    rules = rules_of()
    with (
        open_scene(scene_path) as scene,
        open_labels([far, roofs, near], scene, rules) as labels,
    ):
        assert [source.path for source in labels.sources] == [near]
        assert (labels.read(WHOLE) == 1).all()
    with pytest.raises(RasterError) as caught:
        read([far, roofs], scene_path)
    assert f"{far} covers" in str(caught.value)
    assert f"{roofs} covers" in str(caught.value)


def test_files_folders_and_patterns_name_labels_in_their_order(write_tiff, tmp_path):
    for name in ("b/two.tif", "b/deep/three.tif", "a/one.tif"):
        write_tiff(name, np.zeros((9, 9), np.uint8))
    write_geojson(tmp_path / "b" / "roofs.geojson", [(over_land(0, 9), {})])
    (tmp_path / "b" / "notes.txt").write_text("drawn in May")
    found = find_labels([tmp_path / "b", tmp_path / "a" / "*.tif", tmp_path / "b" / "two.tif"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "b/deep/three.tif", "b/roofs.geojson", "b/two.tif", "a/one.tif",
    ]  # fmt: skip
    with pytest.raises(RasterError, match=r"no such file or folder \(paths\.label_path\)"):
        find_labels(tmp_path / "c")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RasterError, match=r"holds no label file \(paths\.label_path\)"):
        find_labels(tmp_path / "empty")
    cut = tmp_path / "b" / "two.tif"
    cut.write_bytes(cut.read_bytes()[:40])
    with pytest.raises(RasterError, match=r"two\.tif"):
        find_labels(tmp_path / "b")


def test_labels_are_other_ones_when_a_file_or_their_order_changes(write_tiff, tmp_path):
    first = write_tiff("a.tif", np.zeros((9, 9), np.uint8))
    roofs = write_geojson(tmp_path / "roofs.geojson", [(over_land(0, 9), {})])
    before = labels_identity([first, roofs])
    assert labels_identity([first, roofs]) == before
    assert labels_identity([roofs, first]) != before
    write_geojson(roofs, [(over_land(0, 99), {})])
    assert labels_identity([first, roofs]) != before


def test_a_shapefile_is_another_one_when_its_table_changes(tmp_path):
    path = write_layer(tmp_path / "roofs.shp", [(over_land(0, 9), {"kind": "tin"})])
    before = labels_identity([path])
    table = path.with_suffix(".dbf")
    table.write_bytes(table.read_bytes() + b" ")
    assert labels_identity([path]) != before


# Polygons

TEXTS = [["wood"], ["water"], ["Forêt", "4"], []]


def over_land(start: float, stop: float) -> Polygon:
    """A square of the scene in pixels from its upper left corner, in its CRS."""
    return box(*(SCENE @ (start, stop)), *(SCENE @ (stop, start)))


def in_degrees(polygon: Polygon, epsg: int = 4326) -> Polygon:
    polygon = shapely.segmentize(polygon, 1.0)
    return shapely.transform(
        polygon, lambda xy: np.transpose(transform(UTM, CRS.from_epsg(epsg), *xy.T))
    )


def write_geojson(path: Path, features: Sequence[tuple[Polygon, dict]]) -> Path:
    """Polygons of the scene's CRS as GeoJSON in degrees."""
    path.parent.mkdir(parents=True, exist_ok=True)
    parts = [
        {"type": "Feature", "geometry": mapping(in_degrees(polygon)), "properties": properties}
        for polygon, properties in features
    ]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": parts}))
    return path


def write_layer(path: Path, features, epsg: int = 32633, **options) -> Path:
    """Polygons of the scene's CRS as a layer of GeoPackage, Shapefile or FlatGeobuf."""
    polygons = [polygon if epsg == 32633 else in_degrees(polygon, epsg) for polygon, _ in features]
    names = list(features[0][1])
    columns = [np.array([properties[name] for _, properties in features], object) for name in names]
    write_ogr(
        path, shapely.to_wkb(np.array(polygons, object)), columns, names,
        geometry_type="Unknown" if path.suffix == ".gpkg" else "Polygon",
        crs=f"EPSG:{epsg}", **options,
    )  # fmt: skip
    return path


def blobs(rng: np.random.Generator, count: int = 12) -> list[Polygon]:
    """Odd polygons over the scene's surroundings, some with a hole, some overlapping."""
    found = []
    for _ in range(count):
        row, col, size = rng.uniform(-30, HEIGHT), rng.uniform(-30, WIDTH), rng.uniform(10, 50)
        angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
        reach = size * rng.uniform(0.5, 1, 9)
        rim = np.stack([col + reach * np.cos(angles), row + reach * np.sin(angles)])
        blob = Polygon([SCENE @ tuple(point) for point in rim.T]).buffer(0)
        found.append(blob.difference(blob.centroid.buffer(3)))
    return [max(getattr(blob, "geoms", [blob]), key=lambda part: part.area) for blob in found]


def whole_burn(polygons, ids, all_touched=False, rest=0) -> np.ndarray:
    shapes = zip(polygons, ids, strict=True)
    return rasterize(
        shapes, (HEIGHT, WIDTH), fill=rest, transform=SCENE, all_touched=all_touched,
        dtype=np.int32,
    )  # fmt: skip


@pytest.mark.parametrize("all_touched", [False, True])
@pytest.mark.parametrize("suffix", [".gpkg", ".shp", ".fgb"])
def test_polygons_are_burnt_as_one_burn_of_the_whole_scene(
    scene_path, rng, tmp_path, suffix, all_touched
):
    polygons = blobs(rng)
    ids = rng.integers(0, 3, len(polygons)).tolist()
    options = {"spatial_index": False} if suffix == ".fgb" else {}  # an index reorders features
    path = write_layer(
        tmp_path / f"l{suffix}",
        [(polygon, {"id": number}) for polygon, number in zip(polygons, ids, strict=True)],
        **options,
    )
    rules = rules_of(attribute="id", all_touched=all_touched)
    expected = whole_burn(polygons, ids, all_touched)
    with open_scene(scene_path) as scene, open_labels([path], scene, rules) as labels:
        for tile in [WHOLE, *tiles(HEIGHT, WIDTH, 48), Tile(149, 3, 1, 9), Tile(70, 7, 16, 16)]:
            rows = slice(tile.row, tile.row + tile.height)
            cols = slice(tile.col, tile.col + tile.width)
            assert np.array_equal(labels.read(tile), expected[rows, cols])


@pytest.mark.parametrize("epsg", [3857, 4326, 32632, 3035])
def test_polygons_of_another_crs_land_where_they_belong(scene_path, rng, tmp_path, epsg):
    polygons = blobs(rng)
    path = write_layer(tmp_path / "l.gpkg", [(each, {"id": 1}) for each in polygons], epsg)
    found = read(path, scene_path)
    expected = whole_burn(polygons, [1] * len(polygons))
    assert (found != expected).mean() < 1e-3
    assert (found == 1).any()


def test_texts_of_polygons_are_classes(scene_path, tmp_path):
    features = [
        (over_land(30 * n, 30 * n + 20), {"kind": kind})
        for n, kind in enumerate(["wood", " water ", "Fore\u0302t", "4.0", "255"])
    ]
    path = write_geojson(tmp_path / "l.geojson", features)
    checked(path, scene_path, mapping=TEXTS, attribute="kind")
    found = read(path, scene_path, mapping=TEXTS, attribute="kind", background=3)
    assert [int(found[30 * n + 10, 30 * n + 10]) for n in range(5)] == [0, 1, 2, 2, IGNORE]
    assert found[25, 25] == 3


def test_without_an_attribute_every_polygon_is_the_first_class_after_background(
    scene_path, tmp_path
):
    path = write_geojson(tmp_path / "l.geojson", [(over_land(10, 50), {"kind": "tin"})])
    checked(path, scene_path, classes=2)
    assert np.array_equal(np.unique(read(path, scene_path, classes=2)), [0, 1])


@pytest.mark.parametrize(("background", "rest"), [(0, 0), (2, 2), ("ignore", IGNORE)])
def test_what_no_polygon_covers_is_background(scene_path, tmp_path, background, rest):
    path = write_geojson(tmp_path / "l.geojson", [(over_land(10, 50), {})])
    found = read(path, scene_path, background=background)
    assert np.array_equal(found, whole_burn([over_land(10, 50)], [1], rest=rest))
    part = read(path, scene_path, Tile(60, 60, 32, 32), background=background)
    assert (part == rest).all()


def test_polygons_may_lie_over_a_raster_or_below_it(write_tiff, scene_path, tmp_path):
    raster = write_tiff("l.tif", np.full((60, 60), 3, np.uint8), transform=SCENE)
    path = write_geojson(tmp_path / "l.geojson", [(over_land(40, 80), {})])
    over, below = read([path, raster], scene_path), read([raster, path], scene_path)
    assert over[50, 50] == 1 and below[50, 50] == 3
    for found in (over, below):
        assert (found[10, 10], found[70, 70], found[100, 100]) == (3, 1, 0)


@pytest.mark.parametrize(
    ("unlisted", "background", "inside"), [("ignore", 0, IGNORE), ("background", 2, 2)]
)
def test_unlisted_texts_become_what_the_config_says(
    scene_path, tmp_path, unlisted, background, inside
):
    path = write_geojson(tmp_path / "l.geojson", [(over_land(10, 50), {"kind": "roof"})])
    options = {"attribute": "kind", "unlisted": unlisted, "background": background}
    checked(path, scene_path, mapping=TEXTS, **options)
    found = read(path, scene_path, mapping=TEXTS, **options)
    assert np.array_equal(found, whole_burn([over_land(10, 50)], [inside], rest=background))


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("roof: tin, no", '"roof: tin, no"'),
        ("no", '"no"'),
        ("a\nb", '"a\\nb"'),
        ("Métal", '"Métal"'),
        (9, '"9"'),
        (None, '""'),
    ],
)
def test_unlisted_texts_are_an_error_with_a_line_that_yaml_takes(scene_path, tmp_path, value, line):
    features = [(over_land(10, 50), {"kind": value}), (over_land(20, 50), {"kind": value})]
    features += [(over_land(90, 95), {"kind": "wood"}), (over_land(5000, 5001), {"kind": "far"})]
    path = write_geojson(tmp_path / "l.geojson", features)
    with pytest.raises(RasterError) as caught:
        checked(path, scene_path, mapping=TEXTS, attribute="kind")
    said = str(caught.value)
    assert f"1 value(s) on scene scene are no class, first {line}; polygons per value: " in said
    assert f'{{{line}: 2, "wood": 1}}' in said
    assert "\n" not in said
    entry = said.partition("add - ")[2].partition(" to dataset.classes")[0]
    values = yaml.safe_load(entry)["values"]
    options = {"mapping": [*TEXTS, values], "attribute": "kind"}
    checked(path, scene_path, **options)
    assert read(path, scene_path, **options)[30, 30] == 4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"attribute": "kinds"}, "has no attribute 'kinds', did you mean 'kind'?"),
        ({"layer": "rooves"}, "has no layer 'rooves', did you mean 'roofs'?"),
        ({}, "has 2 layers, name the one to read: roofs (Unknown), roads (Unknown)"),
    ],
)
def test_a_layer_or_attribute_that_is_not_there_is_one_line(scene_path, tmp_path, options, said):
    path = tmp_path / "l.gpkg"
    for layer in ("roofs", "roads"):
        write_layer(path, [(over_land(10, 50), {"kind": "tin"})], layer=layer, append=True)
    options = {"layer": "roofs"} | options if options else {}
    with pytest.raises(VectorError) as caught:
        read(path, scene_path, **options)
    assert str(caught.value).startswith(str(path))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (read(path, scene_path, layer="roads") == 1).any()


def test_polygons_need_a_scene_with_a_place(write_tiff, tmp_path):
    scene = plain(write_tiff, "scene.tif", np.ones((3, HEIGHT, WIDTH), np.uint8))
    path = write_geojson(tmp_path / "l.geojson", [(over_land(10, 50), {})])
    with pytest.raises(RasterError, match=r"scene\.tif: has no CRS or transform, which labels in"):
        read(path, scene)


def test_a_multipolygon_is_all_of_its_parts(scene_path, tmp_path):
    parts = [over_land(10, 30), over_land(60, 90)]
    path = write_geojson(tmp_path / "l.geojson", [(MultiPolygon(parts), {})])
    assert np.array_equal(read(path, scene_path), whole_burn(parts, [1, 1]))


# Another pixel size


@pytest.mark.parametrize("gsd", [0.25, 1.0, 2.0])
def test_labels_follow_a_scene_that_is_read_at_another_gsd(
    write_tiff, scene_path, rng, tmp_path, gsd
):
    factor = gsd / 0.5
    height, width = round(HEIGHT / factor), round(WIDTH / factor)
    place = SCENE @ Affine.scale(WIDTH / width, HEIGHT / height)
    classes = rng.integers(0, CLASSES, (90, 80), dtype=np.uint8)
    raster_place = Affine(1.7, 0, 411980.3, 0, -1.7, 5326020.1)
    raster = write_tiff("label.tif", classes, transform=raster_place)
    whole, scene = Tile(0, 0, height, width), Grid(UTM, place, height, width)
    with open_scene(scene_path, Reading(gsd=gsd)) as opened:
        assert opened.grid[2:] == (height, width)
        with open_labels([raster], opened, rules_of()) as labels:
            expected, clear = walk(classes, Grid(UTM, raster_place, 90, 80), scene)
            assert (labels.read(whole)[clear] == expected[clear]).all()
        polygons = blobs(rng)
        path = write_layer(tmp_path / "l.gpkg", [(each, {"id": 1}) for each in polygons])
        with open_labels([path], opened, rules_of()) as labels:
            burnt = rasterize(polygons, (height, width), transform=opened.grid.transform)
            assert np.array_equal(labels.read(whole), burnt)


# Borders


def eroded(ids: np.ndarray, pixels: int) -> np.ndarray:
    """By brute force: ignore where two classes lie within a square around the pixel."""
    found = ids.copy()
    for row, col in np.ndindex(ids.shape):
        top, left = max(0, row - pixels), max(0, col - pixels)
        near = ids[top : row + pixels + 1, left : col + pixels + 1]
        if len(set(near[near != IGNORE].tolist())) > 1:
            found[row, col] = IGNORE
    return found


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.integers(1, 9), st.integers(1, 14))
def test_borders_are_where_two_classes_lie_near(seed, pixels, height, width):
    rng = np.random.default_rng(seed)
    ids = rng.choice([0, 1, 1, 1, 1, IGNORE], (height, width)).astype(np.int32)
    assert np.array_equal(without_borders(ids, pixels, IGNORE), eroded(ids, pixels))


@pytest.mark.parametrize("pixels", [1, 5, 64])
@pytest.mark.parametrize("kind", ["raster", "polygons"])
def test_borders_of_a_window_are_those_of_the_whole_scene(
    write_tiff, scene_path, rng, tmp_path, kind, pixels
):
    size = 4 if pixels < 64 else 140
    coarse = rng.integers(0, 2, (HEIGHT // size + 1, WIDTH // size + 1), dtype=np.uint8)
    classes = coarse.repeat(size, 0).repeat(size, 1)[:HEIGHT, :WIDTH]
    label = write_tiff("label.tif", classes, transform=SCENE)
    if kind == "polygons":
        label = write_layer(tmp_path / "l.gpkg", [(each, {"id": 1}) for each in blobs(rng, 5)])
    rules = rules_of(erode_borders=pixels)
    expected = without_borders(read(label, scene_path), pixels, IGNORE)
    with open_scene(scene_path) as scene, open_labels([label], scene, rules) as labels:
        for tile in [WHOLE, *tiles(HEIGHT, WIDTH, 48), Tile(0, 199, 3, 1), Tile(149, 0, 1, 200)]:
            rows = slice(tile.row, tile.row + tile.height)
            cols = slice(tile.col, tile.col + tile.width)
            assert np.array_equal(labels.read(tile), expected[rows, cols])
        past = labels.read(Tile(140, 190, 48, 48))
    assert np.array_equal(past[:10, :10], expected[140:, 190:])
    assert (past[10:] == IGNORE).all() and (past[:, 10:] == IGNORE).all()
