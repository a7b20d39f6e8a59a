"""Labels on a scene's grid: what a walk from pixel to pixel finds, in any CRS and at any window."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine, from_bounds
from rasterio.warp import transform, transform_bounds

from utils.labels import (
    covered_share,
    label_histogram,
    label_nodata_class,
    open_labels,
    source_values,
)
from utils.raster import Grid, RasterError, open_scene
from utils.tiling import Tile, tiles

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


def read(label: Path, scene_path: Path, tile=WHOLE, classes=CLASSES, ignore=IGNORE) -> np.ndarray:
    with open_scene(scene_path) as scene, open_labels(label, scene, classes, ignore) as labels:
        return labels.read(tile)


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
    with open_scene(scene_path) as scene, open_labels(label, scene, CLASSES, IGNORE) as labels:
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
        assert label_nodata_class(label, CLASSES) == nodata


@pytest.mark.parametrize("nodata", [5, 200, 255])
def test_a_declared_nodata_that_is_no_class_is_ignored(write_tiff, scene_path, rng, nodata):
    classes = rng.integers(0, CLASSES, (HEIGHT, WIDTH), dtype=np.uint8)
    classes[30:60] = nodata
    label = write_tiff("label.tif", classes, transform=SCENE, nodata=nodata)
    found = read(label, scene_path)
    assert (found[30:60] == IGNORE).all()
    assert np.array_equal(np.delete(found, range(30, 60), 0), np.delete(classes, range(30, 60), 0))
    assert label_nodata_class(label, CLASSES) is None


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


@pytest.mark.parametrize("dtype", ["int8", "uint16", "int16", "int32", "int64", "float32"])
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
    with open_scene(scene) as opened:
        assert covered_share(label, opened) == 1
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
    with open_scene(scene_path) as scene, pytest.raises(RasterError) as caught:
        covered_share(label, scene)
    said = str(caught.value)
    assert "no overlap" in said
    assert said.count(" E, ") == said.count(" N") == 2
    assert "13.8" in said  # the scene's longitude
    assert "\n" not in said


@pytest.mark.parametrize("case", CASES)
def test_the_covered_share_is_that_of_the_pixels(write_tiff, scene_path, case):
    epsg, place, shape, _ = CASES[case]
    label = write_tiff(
        "label.tif", np.zeros(shape, np.uint8), crs=CRS.from_epsg(epsg), transform=place
    )
    covered = (read(label, scene_path) != IGNORE).mean()
    with open_scene(scene_path) as scene:
        assert covered_share(label, scene) == pytest.approx(covered, abs=0.01)


@pytest.mark.parametrize("case", CASES)
def test_values_around_the_scene_hold_all_that_its_grid_shows(write_tiff, scene_path, rng, case):
    epsg, place, shape, _ = CASES[case]
    classes = rng.integers(0, 250, shape, dtype=np.uint8)
    label = write_tiff("label.tif", classes, crs=CRS.from_epsg(epsg), transform=place)
    with open_scene(scene_path) as scene, open_labels(label, scene, 250, IGNORE) as labels:
        counts = label_histogram(labels)
        assert sum(counts.values()) == HEIGHT * WIDTH
        assert set(counts) - {IGNORE} <= source_values(label, scene)


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
    with open_scene(scene_path) as scene:
        assert source_values(label, scene) == {0, 7}


def test_values_far_from_the_scene_are_not_held_against_it(write_tiff, scene_path):
    classes = np.zeros((1000, 1200), np.uint8)
    classes[500:] = 77
    label = write_tiff("label.tif", classes, transform=SCENE)
    with open_scene(scene_path) as scene:
        assert source_values(label, scene) == {0}


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
