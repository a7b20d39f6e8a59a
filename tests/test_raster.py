"""Scenes and maps: whatever GDAL reads arrives as it is; a map is whole or not there."""

import resource
import signal
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from hypothesis import example, given, settings
from hypothesis import strategies as st
from project import ROOT
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import Affine

from utils.raster import (
    BLOCK,
    MapWriter,
    RasterError,
    check_structure,
    file_identity,
    find_scenes,
    north_up,
    open_scene,
    read_whole,
)
from utils.tiling import Tile, tiles

HEIGHT, WIDTH = 70, 90
WHOLE = Tile(0, 0, HEIGHT, WIDTH)
GRID = north_up("EPSG:32633", 412000, 5326000, 0.5, 700, 600)


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
    ("band_type", "count", "said"),
    [("uint16", 3, "pixels are uint16"), ("float32", 3, "float32"), ("uint8", 1, "1 band(s)")],
)
def test_pixels_that_are_not_rgb_bytes_are_refused_in_one_line(write_tiff, band_type, count, said):
    path = write_tiff("scene.tif", np.ones((count, 8, 8), band_type))
    with pytest.raises(RasterError) as caught, open_scene(path):
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
    assert [path.name for path in found] == sorted(
        ["north.TIF", "picture.png", "south.tif", "Ödland 2.tiff"]
    )
    assert [path.name for path, _ in skipped] == ["notes.txt", "text.tif"]
    assert all("not a raster" in reason for _, reason in skipped)


def test_a_damaged_tiff_in_the_folder_is_an_error_and_not_skipped(write_tiff, pixels, tmp_path):
    path = write_tiff("cut.tif", pixels)
    path.write_bytes(path.read_bytes()[:60])  # not even its directory is whole
    with pytest.raises(RasterError, match="cut.tif"):
        find_scenes(tmp_path)


def test_two_scenes_of_one_name_are_refused(write_tiff, pixels, tmp_path):
    write_tiff("north.tif", pixels)
    write_tiff("north.tiff", pixels)
    with pytest.raises(RasterError, match="north"):
        find_scenes(tmp_path)


def test_a_missing_folder_or_file_is_named(tmp_path):
    with pytest.raises(RasterError, match="raw_images_dir"):
        find_scenes(tmp_path / "nowhere")
    with (
        pytest.raises(RasterError, match=r"gone\.tif: no such file"),
        open_scene(tmp_path / "gone.tif"),
    ):
        pass


def test_a_scene_is_another_one_when_its_file_or_mask_changes(write_tiff, pixels):
    path = write_tiff("scene.tif", pixels)
    before = file_identity(path)
    with rasterio.open(path) as dataset:
        dataset.stats(indexes=1)
    path.with_name("scene.tif.aux.xml").write_text("<PAMDataset></PAMDataset>")
    assert file_identity(path) == before
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as dataset:
        dataset.write_mask(np.zeros((HEIGHT, WIDTH), np.uint8))
    assert file_identity(path) != before


def test_a_vrt_is_another_scene_when_a_source_changes(write_tiff, pixels):
    path = write_tiff("source.tif", pixels)
    mosaic = path.with_name("scene.vrt")
    rasterio.shutil.copy(path, mosaic, driver="VRT")
    before = file_identity(mosaic)
    write_tiff("source.tif", pixels[:, ::-1], compress="deflate")
    assert file_identity(mosaic) != before


# The map


def write_map(path: Path, rows: np.ndarray, sizes: list[int], num_classes: int = 6) -> None:
    grid = GRID._replace(height=len(rows))
    with MapWriter(path, grid, num_classes) as writer:
        start = 0
        for size in sizes:
            writer.write(rows[start : start + size])
            start += size


@pytest.mark.parametrize(
    ("num_classes", "dtype", "nodata"), [(6, "uint8", 255), (300, "uint16", 65535)]
)
def test_a_map_has_its_own_profile(tmp_path, rng, num_classes, dtype, nodata):
    rows = rng.integers(0, num_classes, (700, 600))
    write_map(tmp_path / "maps" / "map.tif", rows, [700], num_classes)
    with rasterio.open(tmp_path / "maps" / "map.tif") as dataset:
        assert dataset.driver == "GTiff"
        assert (dataset.count, dataset.dtypes[0], dataset.nodata) == (1, dtype, nodata)
        assert dataset.block_shapes == [(BLOCK, BLOCK)]
        assert dataset.profile["tiled"]
        assert dataset.profile["compress"] == "deflate"
        assert (dataset.crs, dataset.transform) == (GRID.crs, GRID.transform)
        assert np.array_equal(dataset.read(1), rows)


@settings(max_examples=15)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=8))
@example([BLOCK, BLOCK])
@example([BLOCK - 1, 2, BLOCK])
def test_rows_in_any_number_make_the_same_file(tmp_path_factory, sizes):
    rows = np.random.default_rng(len(sizes)).integers(0, 6, (sum(sizes), 600))
    folder = tmp_path_factory.mktemp("maps")
    write_map(folder / "parts.tif", rows, sizes)
    write_map(folder / "whole.tif", rows, [len(rows)])
    parts, whole = (read_whole(folder / name)[0] for name in ("parts.tif", "whole.tif"))
    assert np.array_equal(parts, rows)
    assert np.array_equal(whole, rows)
    assert (folder / "parts.tif").stat().st_size == (folder / "whole.tif").stat().st_size


def test_a_failure_leaves_neither_map_nor_temporary(tmp_path):
    with pytest.raises(KeyboardInterrupt), MapWriter(tmp_path / "map.tif", GRID, 6) as writer:
        writer.write(np.zeros((600, 600), np.uint8))
        assert len(list(tmp_path.iterdir())) == 1
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_an_older_map_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "map.tif"
    write_map(path, np.ones((700, 600), np.uint8), [700])
    old = path.read_bytes()
    with pytest.raises(ValueError, match="no"), MapWriter(path, GRID, 6) as writer:
        writer.write(np.zeros((512, 600), np.uint8))
        assert path.read_bytes() == old
        raise ValueError("no")
    assert path.read_bytes() == old
    write_map(path, np.zeros((700, 600), np.uint8), [700])
    assert not read_whole(path).any()
    assert list(tmp_path.iterdir()) == [path]


def test_a_map_that_lacks_rows_gets_no_name(tmp_path):
    with (
        pytest.raises(ValueError, match="512 rows of 700"),
        MapWriter(tmp_path / "map.tif", GRID, 6) as writer,
    ):
        writer.write(np.zeros((520, 600), np.uint8))
    assert list(tmp_path.iterdir()) == []


FILL_DISK = """
import sys
from pathlib import Path
import numpy as np
from utils.raster import MapWriter, north_up
grid = north_up("EPSG:32633", 412000, 5326000, 0.5, 700, 600)
try:
    with MapWriter(Path(sys.argv[1]), grid, 200) as writer:
        writer.write(np.random.default_rng(0).integers(0, 200, (700, 600)))
except OSError as error:
    sys.exit(4)
"""


def test_a_disk_that_fills_up_while_the_map_is_closed_leaves_no_map(tmp_path):
    command = [sys.executable, "-c", FILL_DISK, str(tmp_path / "map.tif")]

    def run(limit: int) -> int:
        def limited() -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a failed write, as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        return subprocess.run(
            command, cwd=ROOT, preexec_fn=limited, capture_output=True, check=False
        ).returncode

    assert run(1 << 30) == 0
    size = (tmp_path / "map.tif").stat().st_size
    (tmp_path / "map.tif").unlink()
    for limit in (size - 1, size - 20_000, size // 2, 1000):
        assert run(limit) == 4
        assert list(tmp_path.iterdir()) == []


def test_gdal_decides_whether_a_map_may_need_bigtiff(tmp_path, monkeypatch):
    options, rasterio_open = {}, rasterio.open

    def spy(*arguments, **given):
        options.update(given)
        return rasterio_open(*arguments, **given)

    monkeypatch.setattr(rasterio, "open", spy)
    write_map(tmp_path / "map.tif", np.zeros((16, 600), np.uint8), [16])
    assert options["bigtiff"] == "IF_SAFER"


def test_structure_is_checked_in_tiffs_of_any_name(write_tiff, pixels):
    path = write_tiff("scene.bin", pixels)
    check_structure(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RasterError, match="truncated"):
        check_structure(path)
