"""Scenes: whatever GDAL reads arrives as it is, at any range, mask and pixel size."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from hypothesis import given
from hypothesis import strategies as st
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

from utils.opening import RasterError
from utils.raster import Reading, open_scene, scaled
from utils.tiling import Tile, tiles

HEIGHT, WIDTH = 70, 90
WHOLE = Tile(0, 0, HEIGHT, WIDTH)


@pytest.fixture
def pixels(rng) -> np.ndarray:
    return rng.integers(1, 256, (3, HEIGHT, WIDTH), dtype=np.uint8)


@pytest.mark.parametrize(
    "profile",
    [
        {"interleave": "band"},
        {"interleave": "pixel", "compress": "lzw", "predictor": 2},
        {"interleave": "band", "tiled": True, "blockxsize": 32, "blockysize": 16},
        {"compress": "zstd"},
        {"compress": "deflate", "BIGTIFF": "YES"},
    ],
    ids=str,
)
def test_tiles_hold_the_pixels_of_the_file_however_it_is_laid_out(write_tiff, pixels, profile):
    path = write_tiff("scene.tif", pixels, **profile)
    with open_scene(path) as scene:
        for tile in tiles(HEIGHT, WIDTH, 32):
            image, valid = scene.read(tile)
            rows, cols = slice(tile.row, tile.row + 32), slice(tile.col, tile.col + 32)
            assert np.array_equal(image, pixels[:, rows, cols])
            assert valid.all()


def test_a_jpeg_compressed_scene_is_read_as_rgb(write_tiff):
    columns = np.linspace(20, 230, WIDTH).astype(np.uint8)
    smooth = np.stack([np.tile(columns, (HEIGHT, 1))] * 3) // np.array([[[1]], [[2]], [[4]]])
    smooth = smooth.astype(np.uint8)
    path = write_tiff(
        "scene.tif", smooth, compress="jpeg", photometric="ycbcr", interleave="pixel",
        jpeg_quality=95,
    )  # fmt: skip
    with open_scene(path) as scene:
        image = scene.read(WHOLE).image
    assert np.abs(image.astype(int) - smooth).max() < 8


def test_an_alpha_band_is_the_mask(write_tiff, pixels):
    alpha = np.full((1, HEIGHT, WIDTH), 255, np.uint8)
    alpha[:, 10:20, 30:40] = 0
    path = write_tiff("scene.tif", np.concatenate([pixels, alpha]), photometric="rgb", alpha="yes")
    with open_scene(path) as scene:
        image, valid = scene.read(WHOLE)
    assert np.array_equal(image, pixels)
    assert np.array_equal(valid, alpha[0] > 0)


def test_a_fourth_band_that_is_not_alpha_is_left_out(write_tiff, pixels):
    infrared = np.zeros((1, HEIGHT, WIDTH), np.uint8)
    path = write_tiff("scene.tif", np.concatenate([pixels, infrared]), photometric="rgb")
    with rasterio.open(path, "r+") as dataset:
        dataset.colorinterp = [
            ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.undefined,
        ]  # fmt: skip
    with open_scene(path) as scene:
        image, valid = scene.read(WHOLE)
    assert np.array_equal(image, pixels)
    assert valid.all()


def test_a_pixel_is_nodata_where_all_its_bands_are(write_tiff, pixels):
    pixels[:, :5] = 0
    pixels[0, 20:30] = 0
    with open_scene(write_tiff("scene.tif", pixels, nodata=0)) as scene:
        valid = scene.read(WHOLE).valid
    assert not valid[:5].any()
    assert valid[5:].all()


@pytest.mark.parametrize("internal", [True, False])
def test_a_mask_in_or_beside_the_file_is_seen(write_tiff, pixels, internal):
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[40:] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        path = write_tiff("scene.tif", pixels, mask=mask)
    assert path.with_name("scene.tif.msk").exists() is not internal
    with open_scene(path) as scene:
        assert np.array_equal(scene.read(WHOLE).valid, mask > 0)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (20, 100), (63, 64)])
def test_a_scene_smaller_than_a_tile_is_mirrored_and_not_valid_beyond_its_border(
    write_tiff, rng, shape
):
    pixels = rng.integers(0, 256, (3, *shape), dtype=np.uint8)
    with open_scene(write_tiff("scene.tif", pixels)) as scene:
        image, valid = scene.read(Tile(0, 0, 64, 64))
    rows, cols = min(64, shape[0]), min(64, shape[1])
    assert image.shape == (3, 64, 64)
    assert np.array_equal(image[:, :rows, :cols], pixels[:, :rows, :cols])
    assert valid[:rows, :cols].all()
    assert valid.sum() == rows * cols
    if 1 < rows < 64:  # the row after the last is the one before it
        assert np.array_equal(image[:, rows], image[:, rows - 2])
    if 1 < cols < 64:
        assert np.array_equal(image[:, :, cols], image[:, :, cols - 2])


def test_a_vrt_is_a_scene(write_tiff, pixels):
    path = write_tiff("scene.tif", pixels)
    rasterio.shutil.copy(path, path.with_suffix(".vrt"), driver="VRT")
    with open_scene(path.with_suffix(".vrt")) as scene:
        assert np.array_equal(scene.read(WHOLE).image, pixels)
        assert scene.grid.transform == Affine(0.5, 0, 412000, 0, -0.5, 5326000)


@pytest.mark.parametrize(
    ("kind", "count", "bands", "said"),
    [
        ("complex64", 3, (1, 2, 3), "pixels are complex64, expected real numbers"),
        ("uint8", 1, (1, 2, 3), "has 1 band(s), but bands [1, 2, 3] are to be read"),
        ("uint16", 4, (5, 1), "has 4 band(s), but bands [5, 1] are to be read (dataset.bands)"),
    ],
)
def test_pixels_that_cannot_be_read_are_refused_in_one_line(write_tiff, kind, count, bands, said):
    path = write_tiff("scene.tif", np.ones((count, 8, 8), kind))
    reading = Reading(bands, ((0, 255),) * len(bands))
    with pytest.raises(RasterError) as caught, open_scene(path, reading):
        pass
    assert str(path) in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_scene_with_control_points_only_is_refused_with_the_remedy(tmp_path, pixels):
    corners = [(0, 0), (0, WIDTH), (HEIGHT, 0)]
    points = [GroundControlPoint(r, c, 14 + c / 1e5, 48 - r / 1e5) for r, c in corners]
    path = tmp_path / "scene.tif"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver="GTiff", count=3, height=HEIGHT, width=WIDTH, dtype="uint8",
            gcps=points, crs="EPSG:4326",
        ) as dataset:  # fmt: skip
            dataset.write(pixels)
    with pytest.raises(RasterError, match=r"control points.*gdalwarp"), open_scene(path):
        pass


@pytest.mark.parametrize("kept", [0.02, 0.3, 0.7, 0.99])
@pytest.mark.parametrize("compress", [None, "deflate"])
def test_a_truncated_scene_is_named_before_a_pixel_is_read(write_tiff, pixels, compress, kept):
    path = write_tiff("scene.tif", pixels, compress=compress)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(RasterError, match="scene.tif") as caught, open_scene(path):
        pass
    assert "\n" not in str(caught.value)


def test_whatever_byte_of_its_directory_is_damaged_the_error_is_ours(write_tiff, pixels):
    path = write_tiff("scene.tif", pixels[:, :20, :20], compress="deflate")
    whole = path.read_bytes()
    for place in range(0, min(600, len(whole)), 3):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            with open_scene(path) as scene:
                scene.read(Tile(0, 0, 16, 16))
        except RasterError as error:
            assert path.name in str(error)


def test_handles_are_not_shared(write_tiff, pixels, monkeypatch):
    path = write_tiff("scene.tif", pixels, tiled=True, blockxsize=16, blockysize=16)
    opened, rasterio_open = [], rasterio.open

    def spy(*arguments, **options):
        opened.append(options.get("sharing"))
        return rasterio_open(*arguments, **options)

    monkeypatch.setattr(rasterio, "open", spy)

    def read_all(_: int) -> bool:
        with open_scene(path) as scene:
            found = [(tile, scene.read(tile).image) for tile in tiles(HEIGHT, WIDTH, 16)]
        return all(
            np.array_equal(image, pixels[:, t.row : t.row + 16, t.col : t.col + 16])
            for t, image in found
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read_all, range(16)))
    assert opened == [False] * 16


def test_a_missing_file_is_named(tmp_path):
    with (
        pytest.raises(RasterError, match=r"gone\.tif: no such file"),
        open_scene(tmp_path / "gone.tif"),
    ):
        pass


# Bands and ranges


def reading_of(*bands: int, span: tuple[float, float] = (0, 255), **options) -> Reading:
    return Reading(bands, (span,) * len(bands), **options)


def flagged(path, kind: ColorInterp) -> None:
    """Flag the fourth band of a file."""
    with rasterio.open(path, "r+") as dataset:
        first = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
        dataset.colorinterp = [*first, kind]


@pytest.mark.parametrize("bands", [(1,), (3, 2, 1), (4, 1), (3, 2, 1, 4), (5, 4, 3, 2, 1)])
def test_bands_come_in_the_order_they_are_asked_for(write_tiff, rng, bands):
    pixels = rng.integers(0, 256, (5, HEIGHT, WIDTH), dtype=np.uint8)
    with open_scene(write_tiff("scene.tif", pixels), reading_of(*bands)) as scene:
        assert np.array_equal(scene.read(WHOLE).image, pixels[[band - 1 for band in bands]])


@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "uint32", "float32", "float64"])
def test_each_band_is_scaled_by_its_own_range(write_tiff, rng, kind):
    pixels = rng.integers(0, 100, (2, HEIGHT, WIDTH)).astype(kind)
    ranges = ((10.0, 61.0), (-5.0, 250.0))
    path = write_tiff("scene.tif", pixels)
    with open_scene(path, Reading((1, 2), ranges)) as scene:
        image = scene.read(WHOLE).image
    assert image.dtype == np.uint8
    for band, (low, high) in enumerate(ranges):
        shares = ((pixels[band].astype(float) - low) / (high - low)).clip(0, 1)
        assert np.abs(image[band] - shares * 255).max() <= 0.51


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=20),
    st.floats(-1e6, 1e6, width=32),
    st.floats(0.125, 1e6, width=32),
)
def test_any_number_has_a_scaled_value_and_none_leaves_the_range(values, low, span):
    array = np.array(values, np.float32)[None, None]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = scaled(array, [(low, low + span)])
    assert (found[array <= low] == 0).all()
    assert (found[array >= low + span] == 255).all()
    order = np.argsort(array[np.isfinite(array)], kind="stable")
    assert (np.diff(found[np.isfinite(array)][order].astype(int)) >= 0).all()


def test_a_range_is_the_same_for_every_tile(write_tiff, rng):
    pixels = rng.integers(0, 30000, (3, HEIGHT, WIDTH)).astype(np.uint16)
    pixels[:, :, :32] //= 100  # a dark part: its tiles must stay dark
    with open_scene(write_tiff("s.tif", pixels), reading_of(1, 2, 3, span=(0, 30000))) as scene:
        whole = scene.read(WHOLE).image
        for tile in tiles(HEIGHT, WIDTH, 32):
            rows, cols = slice(tile.row, tile.row + 32), slice(tile.col, tile.col + 32)
            assert np.array_equal(scene.read(tile).image, whole[:, rows, cols])


# Valid pixels


def test_a_band_flagged_alpha_is_data_where_it_is_asked_for_and_a_mask_elsewhere(
    write_tiff, pixels, rng
):
    infrared = rng.integers(0, 3, (1, HEIGHT, WIDTH), dtype=np.uint8)
    path = write_tiff("scene.tif", np.concatenate([pixels, infrared]), photometric="rgb")
    flagged(path, ColorInterp.alpha)
    with open_scene(path, reading_of(4, 1)) as scene:
        image, valid = scene.read(WHOLE)
    assert np.array_equal(image[0], infrared[0])
    assert valid.all()
    with open_scene(path) as scene:
        assert np.array_equal(scene.read(WHOLE).valid, infrared[0] > 0)


@pytest.mark.filterwarnings("ignore::rasterio.errors.NodataShadowWarning")
def test_nodata_and_a_mask_file_count_beside_a_band_flagged_alpha_that_is_data(write_tiff, pixels):
    pixels = np.concatenate([pixels, np.full((1, HEIGHT, WIDTH), 7, np.uint8)])
    pixels[:, :9] = 0
    path = write_tiff("scene.tif", pixels, photometric="rgb", nodata=0)
    flagged(path, ColorInterp.alpha)
    with open_scene(path, reading_of(1, 2, 3, 4)) as scene:
        valid = scene.read(WHOLE).valid
    assert not valid[:9].any()
    assert valid[9:].all()
    mask = np.where(pixels[0] % 2, 255, 0).astype(np.uint8)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False):
        path = write_tiff("masked.tif", pixels, photometric="rgb", mask=mask)
    flagged(path, ColorInterp.alpha)
    with open_scene(path, reading_of(1, 2, 3, 4)) as scene:
        assert np.array_equal(scene.read(WHOLE).valid, mask > 0)


def test_of_a_tile_without_a_valid_pixel_only_the_mask_is_read(write_tiff, pixels, monkeypatch):
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[:32, :32] = 0
    path, reads = write_tiff("scene.tif", pixels, mask=mask), []

    class Watched:
        def __init__(self, dataset):
            self.dataset = dataset

        def __getattr__(self, name):
            return getattr(self.dataset, name)

        def read(self, *given, **named):
            reads.append(named["window"])
            return self.dataset.read(*given, **named)

    with open_scene(path) as scene:
        monkeypatch.setattr(scene, "_dataset", Watched(scene._dataset))
        image, valid = scene.read(Tile(0, 0, 32, 32))
        assert (image.shape, image.any(), valid.any(), reads) == ((3, 32, 32), False, False, [])
        assert scene.read(Tile(0, 32, 32, 32)).valid.all()
        assert len(reads) == 1


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_nodata_of_the_config_counts_beside_that_of_the_file(write_tiff, rng, kind):
    pixels = rng.integers(10, 200, (3, HEIGHT, WIDTH)).astype(kind)
    pixels[:, :5] = 0
    pixels[:, 5:9] = 3
    pixels[1, 20:30] = 3  # in one band only
    with open_scene(
        write_tiff("scene.tif", pixels, nodata=0), reading_of(1, 2, 3, nodata=3.0)
    ) as scene:
        valid = scene.read(WHOLE).valid
    assert not valid[:9].any()
    assert valid[9:].all()


def test_what_is_not_finite_in_any_band_is_not_valid(write_tiff, rng):
    pixels = rng.uniform(0, 1, (3, HEIGHT, WIDTH)).astype(np.float32)
    pixels[0, 3, 4], pixels[1, 5, 6], pixels[2, 7, 8] = np.nan, np.inf, -np.inf
    with (
        warnings.catch_warnings(),
        open_scene(write_tiff("s.tif", pixels), reading_of(1, 2, 3, span=(0, 1))) as scene,
    ):
        warnings.simplefilter("error")
        image, valid = scene.read(WHOLE)
    assert np.array_equal(valid, np.isfinite(pixels).all(0))
    assert image[0, 3, 4] == 0


def test_the_huge_nodata_of_float_rasters_is_read_without_a_complaint(write_tiff, rng):
    pixels = rng.uniform(0, 1, (1, HEIGHT, WIDTH))
    pixels[:, :9] = -1.7976931348623157e308
    path = write_tiff("s.tif", pixels, nodata=-1.7976931348623157e308)
    with (
        warnings.catch_warnings(),
        open_scene(path, reading_of(1, span=(0, 1))) as scene,
    ):
        warnings.simplefilter("error")
        valid = scene.read(WHOLE).valid
    assert not valid[:9].any()
    assert valid[9:].all()


def test_a_sample_holds_valid_pixels_only(write_tiff, rng):
    pixels = rng.integers(500, 900, (2, 300, 400)).astype(np.uint16)
    pixels[:, 100:] = 0
    with open_scene(write_tiff("s.tif", pixels, nodata=0), reading_of(2, 1)) as scene:
        assert np.array_equal(scene.sample(), pixels[::-1, :100].reshape(2, -1))
        few = scene.sample(side=30)
        assert few.shape == (2, 300)
        assert few.min() >= 500


# Ground sample distance


def square_metres(count: int, height: int, width: int, rng) -> np.ndarray:
    return rng.integers(1, 60000, (count, height, width)).astype(np.uint16)


@pytest.mark.parametrize("factor", [2, 3, 5])
@pytest.mark.parametrize("turn", [0, 30])
def test_a_whole_factor_of_the_gsd_reads_block_means(write_tiff, rng, factor, turn):
    pixels = rng.uniform(0, 1, (3, 30 * factor, 40 * factor)).astype(np.float32)
    place = Affine(0.5, 0, 412000, 0, -0.5, 5326000) @ Affine.rotation(turn)
    path = write_tiff("s.tif", pixels, transform=place)
    with open_scene(path, Reading((1, 2, 3), ((0, 1),) * 3, gsd=0.5 * factor * 1.0004)) as scene:
        assert (scene.grid.height, scene.grid.width) == (30, 40)
        assert (scene.own_grid.height, scene.own_grid.width) == pixels.shape[1:]
        image, valid = scene.read(Tile(0, 0, 30, 40))
        part = scene.read(Tile(10, 8, 16, 16)).image
    means = pixels.reshape(3, 30, factor, 40, factor).mean((2, 4))
    assert valid.all()
    assert np.abs(image - means * 255).max() <= 0.51
    assert np.array_equal(part, image[:, 10:26, 8:24])


@pytest.mark.parametrize("hidden", ["nodata", "mask", "alpha", "dataset.nodata"])
def test_a_mean_takes_in_valid_pixels_only(write_tiff, rng, hidden):
    pixels = rng.integers(1, 200, (3, 60, 80), dtype=np.uint8)
    gone = np.zeros((60, 80), bool)
    gone[:20] = True  # whole blocks of four
    gone[30:40, 0:80:2] = True  # and parts of blocks
    opaque = np.where(gone, 0, 255).astype(np.uint8)
    seen = pixels.copy()
    seen[:, gone] = 0 if "nodata" in hidden else 255
    reading = Reading(gsd=2.0, nodata=0.0 if hidden == "dataset.nodata" else None)
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        if hidden == "alpha":
            seen = np.concatenate([seen, opaque[None]])
            path = write_tiff("s.tif", seen, photometric="rgb", alpha="yes")
        else:
            options = {"nodata": {"nodata": 0}, "mask": {"mask": opaque}}.get(hidden, {})
            path = write_tiff("s.tif", seen, **options)
    with open_scene(path, reading) as scene:
        image, valid = scene.read(Tile(0, 0, 15, 20))
    weights = (~gone).astype(float).reshape(15, 4, 20, 4)
    shares = weights.sum((1, 3))
    assert np.array_equal(valid, shares > 0)
    sums = (pixels.reshape(3, 15, 4, 20, 4) * weights).sum((2, 4))
    means = sums / np.where(shares > 0, shares, 1)
    assert np.abs(image - means)[:, valid].max() <= 0.51


def test_a_finer_gsd_repeats_pixels(write_tiff, rng):
    pixels = rng.integers(1, 256, (3, 20, 30), dtype=np.uint8)
    with open_scene(write_tiff("s.tif", pixels), Reading(gsd=0.25)) as scene:
        image, valid = scene.read(Tile(0, 0, 40, 60))
    assert valid.all()
    assert np.array_equal(image, pixels.repeat(2, 1).repeat(2, 2))


def test_a_band_flagged_alpha_would_weigh_the_others_and_is_not_resampled(write_tiff, rng):
    path = write_tiff("s.tif", square_metres(4, 40, 60, rng), photometric="rgb")
    flagged(path, ColorInterp.alpha)
    reading = Reading((4, 3, 2, 1), ((0, 65535),) * 4, gsd=1.0)
    with pytest.raises(RasterError, match="alpha band"), open_scene(path, reading):
        pass


def test_resampling_knows_one_nodata_value_only(write_tiff, rng):
    path = write_tiff("s.tif", square_metres(1, 40, 60, rng), nodata=7)
    reading = Reading((1,), ((0, 65535),), nodata=0, gsd=1.0)
    with pytest.raises(RasterError, match="declares nodata 7"), open_scene(path, reading):
        pass


def test_four_bands_of_sixteen_bits_are_resampled_by_their_means(write_tiff, rng):
    pixels = square_metres(4, 40, 60, rng)
    path = write_tiff("s.tif", pixels, photometric="minisblack", alpha="no")
    reading = Reading((4, 3, 2, 1), ((0, 65535),) * 4, gsd=1.0)
    with open_scene(path, reading) as scene:
        image, valid = scene.read(Tile(0, 0, 20, 30))
    means = pixels[::-1].reshape(4, 20, 2, 30, 2).mean((2, 4))
    assert valid.all()
    assert np.abs(image - means / 257).max() <= 0.52


def test_a_single_nan_spoils_its_own_mean_only(write_tiff, rng):
    pixels = rng.uniform(0, 1, (1, 40, 40)).astype(np.float32)
    pixels[0, 5, 9] = np.nan
    with open_scene(write_tiff("s.tif", pixels), Reading((1,), ((0, 1),), gsd=2.0)) as scene:
        valid = scene.read(Tile(0, 0, 10, 10)).valid
    valid[1, 2] = True
    assert valid.all()


def test_a_gsd_needs_a_place_on_the_earth(write_tiff, pixels):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        path = write_tiff("s.tif", pixels, crs=None, transform=None)
    with (
        pytest.raises(RasterError, match=r"no CRS or transform, which dataset\.gsd needs"),
        open_scene(path, Reading(gsd=1.0)),
    ):
        pass
