"""Which files are scenes and what they are called; which bands are read, and their value ranges."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
from hypothesis import given
from hypothesis import strategies as st
from rasterio.enums import ColorInterp

from utils.opening import RasterError
from utils.scenes import band_ranges, default_bands, find_scenes, told_apart, type_range

HEIGHT, WIDTH = 40, 50


@pytest.fixture
def pixels(rng) -> np.ndarray:
    return rng.integers(1, 256, (3, HEIGHT, WIDTH), dtype=np.uint8)


@pytest.fixture
def flights(write_tiff, pixels, tmp_path) -> Path:
    """Scenes in nested folders, two of one basename."""
    for name in ("north.tif", "2021/north.tif", "2021/south.tif", "2022/raw/north.tif"):
        write_tiff(f"flights/{name}", pixels)
    return tmp_path / "flights"


def names(sources, **options) -> list[str]:
    return [scene.name for scene in find_scenes(sources, **options)[0]]


# Files


def test_a_folder_gives_its_rasters_sorted_and_says_what_it_skips(write_tiff, pixels, tmp_path):
    for name in ("south.tif", "north.TIF", "Ödland 2.tiff"):
        write_tiff(name, pixels)
    with rasterio.open(tmp_path / "picture.png", "w", driver="PNG", count=3, height=9, width=9,
                       dtype="uint8") as picture:  # fmt: skip
        picture.write(pixels[:, :9, :9])
    (tmp_path / "notes.txt").write_text("flown in May")
    (tmp_path / "text.tif").write_text("no TIFF at all")
    for name in ("south.tif.msk", "south.tif.ovr", "south.tif.aux.xml", "south.tfw", ".hidden",
                 ".south.tif.123.tmp"):  # fmt: skip
        (tmp_path / name).write_text("")
    (tmp_path / "folder.tif").mkdir()
    found, skipped = find_scenes(tmp_path)
    assert [scene.name for scene in found] == sorted(["north", "picture", "south", "Ödland 2"])
    assert {scene.path.name for scene in found} == {
        "north.TIF", "picture.png", "south.tif", "Ödland 2.tiff",
    }  # fmt: skip
    assert [path.name for path, _ in skipped] == ["notes.txt", "text.tif"]
    assert all("not a raster" in reason for _, reason in skipped)


def test_a_damaged_tiff_in_the_folder_is_an_error_and_not_skipped(write_tiff, pixels, tmp_path):
    path = write_tiff("cut.tif", pixels)
    path.write_bytes(path.read_bytes()[:60])  # not even its directory is whole
    with pytest.raises(RasterError, match="cut.tif"):
        find_scenes(tmp_path)


def test_a_file_that_is_named_must_be_a_raster(tmp_path):
    (tmp_path / "notes.txt").write_text("flown in May")
    with pytest.raises(RasterError, match=r"notes\.txt: not a raster that GDAL can open"):
        find_scenes(tmp_path / "notes.txt")


def test_two_scenes_of_one_name_and_folder_are_refused(write_tiff, pixels, tmp_path):
    write_tiff("north.tif", pixels)
    write_tiff("north.tiff", pixels)
    with pytest.raises(RasterError, match=r"north\.tiff: named like .*north\.tif,"):
        find_scenes(tmp_path)


@pytest.mark.parametrize("source", ["nowhere", "nowhere/*.tif", "*.jp2", "north/**/*.tif"])
def test_what_names_no_file_is_an_error_with_its_key(tmp_path, source):
    for key in ("paths.raw_images_dir", "inference.input_tif"):
        with pytest.raises(RasterError) as caught:
            find_scenes(tmp_path / source, key)
        assert str(caught.value) == f"{tmp_path / source}: no such file or folder ({key})"


def test_a_folder_is_searched_in_depth_and_one_basename_stays_two_scenes(flights):
    found, skipped = find_scenes(flights)
    assert skipped == []
    assert {scene.name: scene.path.relative_to(flights).as_posix() for scene in found} == {
        "north": "north.tif",
        "2021__north": "2021/north.tif",
        "2021__south": "2021/south.tif",
        "2022__raw__north": "2022/raw/north.tif",
    }
    assert [scene.name for scene in found] == sorted(scene.name for scene in found)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["*.tif"], ["north"]),
        (["2021/*.tif"], ["north", "south"]),
        (["20*/*.tif"], ["2021__north", "2021__south"]),
        (["**/north.tif"], ["2021__north", "2022__raw__north", "north"]),
        (["202[12]"], ["2021__north", "2021__south", "2022__raw__north"]),
        (["2021/n?rth.tif"], ["north"]),
        (["north.tif", "2021/south.tif"], ["north", "south"]),
        (["2021", "2022"], ["north", "raw__north", "south"]),
        (["2021/north.tif", "north.tif"], ["2021__north", "flights__north"]),
        (["2021", "2022/raw"], ["2021__north", "raw__north", "south"]),
        ([".", "2021/north.tif", "2021/*"],
         ["2021__north", "2021__south", "2022__raw__north", "north"]),
    ],
)  # fmt: skip
def test_patterns_and_lists_name_scenes(flights, patterns, expected):
    sources = tuple(flights / pattern for pattern in patterns)
    assert names(sources) == expected
    if len(sources) == 1:
        assert names(sources[0]) == expected


def test_a_file_that_is_called_like_a_pattern_is_that_file(write_tiff, pixels, tmp_path):
    write_tiff("a[1].tif", pixels)
    write_tiff("a1.tif", pixels)
    assert names(tmp_path / "a[1].tif") == ["a[1]"]


folders = st.lists(st.sampled_from("abc"), min_size=1, max_size=4)
PLACES = st.lists(st.tuples(folders, st.sampled_from(["x", "y"])), min_size=1, max_size=12)


@given(PLACES, st.integers(1, 3))
def test_every_scene_has_a_name_of_its_own(places, depth):
    paths = {Path("/data", *above, f"{stem}.tif") for above, stem in places}
    scenes = told_apart({path: min(depth, len(path.parts) - 1) for path in sorted(paths)})
    assert {scene.path for scene in scenes} == paths
    assert len({scene.name for scene in scenes}) == len(paths)
    assert all("/" not in scene.name for scene in scenes)


# Bands


@pytest.mark.parametrize(("count", "bands"), [(1, (1,)), (3, (1, 2, 3)), (4, (1, 2, 3)),
                                              (7, (1, 2, 3))])  # fmt: skip
def test_the_first_three_bands_or_the_only_one_are_read(write_tiff, count, bands):
    path = write_tiff("s.tif", np.ones((count, 8, 8), np.uint16))
    assert default_bands(path) == bands


def test_opacity_is_no_band_to_read(write_tiff):
    grey = write_tiff("grey.tif", np.ones((2, 8, 8), np.uint8), alpha="yes")
    assert default_bands(grey) == (1,)
    path = write_tiff("s.tif", np.ones((4, 8, 8), np.uint8), photometric="rgb")
    with rasterio.open(path, "r+") as dataset:
        dataset.colorinterp = [
            ColorInterp.alpha, ColorInterp.red, ColorInterp.green, ColorInterp.blue,
        ]  # fmt: skip
    assert default_bands(path) == (2, 3, 4)


def test_two_bands_leave_a_choice_to_the_config(write_tiff):
    path = write_tiff("s.tif", np.ones((2, 8, 8), np.uint16))
    with pytest.raises(RasterError, match=r"has 2 bands; set dataset\.bands and dataset\.rgb"):
        default_bands(path)


# Ranges


def test_bytes_keep_their_values(write_tiff, rng):
    paths = [write_tiff(f"{n}.tif", rng.integers(90, 99, (3, 9, 9), dtype=np.uint8)) for n in "ab"]
    for wanted in ("auto", "dtype"):
        assert band_ranges(paths, (1, 2, 3), wanted, None) == ((0.0, 255.0),) * 3


@pytest.mark.parametrize("kind", ["uint16", "int16", "float32"])
def test_auto_is_the_percentile_of_valid_pixels_over_all_scenes(write_tiff, rng, kind):
    scenes = []
    for number, (height, width) in enumerate([(80, 90), (30, 200)]):
        scenes.append(rng.normal(3000 + 2000 * number, 400, (4, height, width)).astype(kind))
    scenes[0][:, :20] = -9 if kind != "uint16" else 9  # declared by the file
    scenes[1][:, :, :30] = 30000  # by dataset.nodata
    if kind == "float32":
        scenes[1][1, 5:9] = np.nan
    paths = [
        write_tiff("a.tif", scenes[0], nodata=float(scenes[0][0, 0, 0])),
        write_tiff("b.tif", scenes[1]),
    ]
    bands = (4, 2)
    found = band_ranges(paths, bands, "auto", 30000.0)
    left, right = scenes[0][:, 20:], scenes[1][:, :, 30:]
    for band, (low, high) in zip(bands, found, strict=True):
        values = [left[band - 1].ravel(), right[band - 1].ravel()]
        if kind == "float32":  # valid is what all bands that are read are
            values[1] = values[1][np.isfinite(right[[3, 1]]).all(0).ravel()]
        expected = np.percentile(np.concatenate(values).astype(float), (1, 99))
        assert (low, high) == pytest.approx(tuple(expected))


def test_auto_is_near_the_percentile_where_scenes_are_too_large_to_read_whole(write_tiff, rng):
    pixels = rng.integers(0, 10000, (1, 1500, 1200)).astype(np.uint16)
    ((low, high),) = band_ranges([write_tiff("a.tif", pixels)], (1,), "auto", None)
    assert (low, high) == pytest.approx((100, 9900), abs=40)


def test_one_scene_that_is_not_of_bytes_makes_auto_measure_all(write_tiff, rng):
    small = rng.integers(0, 200, (1, 50, 50), dtype=np.uint8)
    large = rng.integers(0, 200, (1, 50, 50)).astype(np.uint16)
    paths = [write_tiff("a.tif", small), write_tiff("b.tif", large)]
    both = np.concatenate([small.ravel(), large.ravel()])
    expected = tuple(np.percentile(both, (1, 99)))
    assert band_ranges(paths, (1,), "auto", None)[0] == pytest.approx(expected)
    with pytest.raises(RasterError, match=r"dtype, but scenes are uint16, uint8; give numbers"):
        band_ranges(paths, (1,), "dtype", None)


@pytest.mark.parametrize("value", [0, 7, 30000])
def test_a_band_of_one_value_has_a_range_all_the_same(write_tiff, value):
    path = write_tiff("a.tif", np.full((1, 20, 20), value, np.uint16))
    ((low, high),) = band_ranges([path], (1,), "auto", None)
    assert np.float32(low) < np.float32(high)
    assert low == value


def test_scenes_without_a_valid_pixel_have_no_range(write_tiff):
    path = write_tiff("a.tif", np.zeros((1, 20, 20), np.uint16), nodata=0)
    with pytest.raises(RasterError, match=r"no scene has a valid pixel; set dataset\.input_range"):
        band_ranges([path], (1,), "auto", None)


@pytest.mark.parametrize(
    ("kind", "ends"),
    [("uint8", (0, 255)), ("uint16", (0, 65535)), ("int16", (-32768, 32767)), ("float64", (0, 1))],
)
def test_dtype_is_all_that_the_type_holds(write_tiff, kind, ends):
    path = write_tiff("a.tif", np.ones((2, 8, 8), kind))
    assert band_ranges([path], (1, 2), "dtype", None) == (ends, ends)
    assert type_range(np.dtype(kind)) == ends


def test_numbers_are_taken_as_they_are(write_tiff):
    one, two = (5.0, 9.0), (-1.0, 1.0)
    assert band_ranges([], (1, 2), one, None) == (one, one)
    assert band_ranges([], (1, 2), (one,), None) == (one, one)
    assert band_ranges([], (1, 2), (one, two), None) == (one, two)
    with pytest.raises(RasterError, match="2 pairs for 3 bands"):
        band_ranges([], (1, 2, 3), (one, two), None)
