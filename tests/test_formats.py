"""Rasters are opened by their ending's driver; headers that claim too much are refused at once."""

import contextlib
import resource
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import tifffile
from rasterio.transform import Affine

from utils.formats import DRIVERS, drivers_of, false_ending, too_large
from utils.opening import RasterError, RefusedError, is_raster, open_raster
from utils.raster import open_scene
from utils.scenes import find_scenes

PIXELS = np.arange(3 * 40 * 50, dtype=np.uint8).reshape(3, 40, 50)


@pytest.fixture
def scene(write_tiff) -> Path:
    return write_tiff("scene.tif", PIXELS)


def test_gdal_has_every_driver_that_an_ending_is_for():
    with rasterio.Env() as environment:
        known = environment.drivers()
    assert {driver for drivers in DRIVERS.values() for driver in drivers} <= set(known)


@pytest.mark.parametrize(
    ("driver", "ending"),
    [("GTiff", ".tif"), ("COG", ".cog"), ("PNG", ".png"), ("JPEG", ".jpeg"), ("ENVI", ".dat"),
     ("ENVI", ".img"), ("HFA", ".img"), ("JP2OpenJPEG", ".jp2"), ("EHdr", ".bil"), ("BMP", ".bmp"),
     ("WEBP", ".webp")],
)  # fmt: skip
def test_a_raster_opens_by_its_ending_in_any_case(scene, tmp_path, driver, ending):
    for name in (f"other{ending}", f"OTHER{ending.upper()}"):
        path = tmp_path / driver / name
        path.parent.mkdir(exist_ok=True)
        rasterio.shutil.copy(scene, path, driver=driver)
        with open_raster(path) as dataset:
            assert (dataset.width, dataset.height) == (50, 40)
            assert dataset.driver == ("GTiff" if driver == "COG" else driver)


@pytest.mark.parametrize(
    ("driver", "ending", "said"),
    [("VRT", ".tif", "is a VRT, but ends in .tif; rename it to end in .vrt"),
     ("VRT", ".png", "is a VRT, but ends in .png"),
     ("PNG", ".tif", "is a PNG, but ends in .tif; rename it to end in .png"),
     ("GTiff", ".jp2", "is a TIFF, but ends in .jp2"),
     ("GTiff", ".vrt", "is a TIFF, but ends in .vrt"),
     ("JPEG", ".img", "is a JPEG, but ends in .img"),
     ("JP2OpenJPEG", ".tif", "is a JPEG 2000, but ends in .tif")],
)  # fmt: skip
def test_a_raster_under_a_false_ending_is_refused_wherever_it_is_found(
    scene, tmp_path, driver, ending, said
):
    rasterio.shutil.copy(scene, tmp_path / "raw", driver=driver)
    path = tmp_path / "in" / f"false{ending}"
    path.parent.mkdir()
    shutil.move(tmp_path / "raw", path)
    for use in (lambda: open_scene(path).__enter__(), lambda: find_scenes(path.parent),
                lambda: is_raster(path)):  # fmt: skip
        with pytest.raises(RefusedError) as caught:
            use()
        assert str(caught.value).startswith(f"{path}: {said}")
        assert "gdal_translate" in str(caught.value)


def test_a_description_of_a_web_service_is_refused(tmp_path):
    path = tmp_path / "map.tif"
    path.write_text("<GDAL_WMS><Service name='TMS'><ServerUrl>http://a/</ServerUrl></Service>")
    with pytest.raises(RefusedError, match="is a web service's description, but ends in .tif"):
        open_raster(path).__enter__()


def test_an_ending_of_no_raster_is_told_with_what_the_file_is(scene, tmp_path):
    path = shutil.copy(scene, tmp_path / "scene.old")
    with pytest.raises(RasterError, match="is a TIFF, but ends in .old; rename it to end in .tif"):
        open_raster(path).__enter__()
    assert not is_raster(path)
    assert [skipped for skipped, _ in find_scenes(tmp_path)[1]] == [path]


@pytest.mark.parametrize("name", ["/vsicurl/http://a/b.tif", "/vsimem/b.tif", "http://a/b.tif"])
def test_what_is_no_file_here_is_never_given_to_gdal(name, monkeypatch):
    monkeypatch.setattr(rasterio, "open", lambda *_, **__: pytest.fail("opened"))
    with pytest.raises(RasterError, match="no such file"):
        open_raster(Path(name)).__enter__()


def bombs():
    """Headers of a few hundred bytes: ImageWidth, ImageLength, SamplesPerPixel, RowsPerStrip."""
    yield "sides", (2**31 - 1, 2**31 - 1, 1, 64), "2147483647 × 2147483647 pixels"
    yield "wide", (2**30, 10, 1, 10), "10 × 1073741824 pixels"
    yield "area", (10**6, 10**6, 1, 1), "1000000 × 1000000 pixels"
    yield "bands", (64, 64, 65535, 64), "65535 bands"
    yield "strip", (60000, 60000, 3, 59999), "blocks of 10799820000 bytes"


def write_header(path: Path, width: int, height: int, bands: int, rows: int) -> Path:
    """A TIFF of one empty strip that claims all this."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8),
            (277, 3, bands), (278, 4, rows), (279, 4, 8), (284, 3, 1)]  # fmt: skip
    entries = b"".join(
        code.to_bytes(2, "little") + kind.to_bytes(2, "little") + (1).to_bytes(4, "little")
        + value.to_bytes(4, "little")
        for code, kind, value in tags
    )
    directory = len(tags).to_bytes(2, "little") + entries + bytes(4)
    path.write_bytes(b"II*\0" + (16).to_bytes(4, "little") + bytes(8) + directory)
    return path


@contextlib.contextmanager
def bounded(more: int) -> Iterator[None]:
    """This process can take only so many bytes more."""
    pages, limits = int(Path("/proc/self/statm").read_text().split()[0]), resource.RLIMIT_AS
    before = resource.getrlimit(limits)
    resource.setrlimit(limits, (pages * resource.getpagesize() + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limits, before)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is bounded by way of /proc")
@pytest.mark.parametrize(("claim", "said"), [c[1:] for c in bombs()], ids=[c[0] for c in bombs()])
def test_a_header_that_claims_too_much_is_refused_with_the_claim_and_the_limit(
    tmp_path, claim, said
):
    path = write_header(tmp_path / "bomb.tif", *claim)
    with bounded(200 * 2**20), pytest.raises(RasterError) as caught:
        open_scene(path).__enter__()
    assert said in str(caught.value) and "at most" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_large_scenes_stay_fine(tmp_path):
    path = tmp_path / "large.tif"
    profile = {"driver": "GTiff", "width": 200_000, "height": 200_000, "count": 3, "tiled": True}
    profile |= {"dtype": "uint8", "sparse_ok": True, "blockxsize": 512, "blockysize": 512}
    with rasterio.open(path, "w", bigtiff="YES", **profile):
        pass
    with open_raster(path) as dataset:
        assert dataset.shape == (200_000, 200_000)
    assert too_large(200_000, 200_000, 4, 200_000 * 4 * 2) is None


def test_opening_and_reading_leaves_nothing_beside_a_raster(scene):
    before = sorted(scene.parent.iterdir())
    with open_scene(scene) as opened:
        opened.sample()
        opened.identity  # noqa: B018
    assert sorted(scene.parent.iterdir()) == before


def test_complex_pixels_of_whole_numbers_are_refused(write_tiff, tmp_path):
    path = tmp_path / "radar.tif"
    profile = {"driver": "GTiff", "width": 9, "height": 9, "count": 3, "dtype": "complex_int16"}
    with rasterio.open(path, "w", **profile):
        pass
    with pytest.raises(RasterError, match="pixels are complex_int16, expected real numbers"):
        open_scene(path).__enter__()


def test_a_tiff_written_by_others_opens(tmp_path):
    path = tmp_path / "plain.tif"
    tifffile.imwrite(path, PIXELS[0])
    with open_raster(path) as dataset:
        assert dataset.count == 1
    assert drivers_of(path) == ("GTiff",) and false_ending(path) is None


@pytest.mark.parametrize(
    "numbers",
    [(0.5, 0, 0, 0, 0, 0), (0.5, 0, 0, 0, float("nan"), 0), (1e300, 0, 0, 0, -1e300, 0),
     (1, 0, float("inf"), 0, -1, 0), (1e-20, 0, 0, 0, -1e-20, 0), (0.5, 0, 1e300, 0, -0.5, 0)],
)  # fmt: skip
def test_pixels_that_lie_nowhere_are_refused(tmp_path, numbers):
    path = tmp_path / "scene.tif"
    profile = {"driver": "GTiff", "width": 9, "height": 9, "count": 1, "dtype": "uint8"}
    with rasterio.open(path, "w", crs="EPSG:32633", transform=Affine(*numbers), **profile):
        pass
    with pytest.raises(RefusedError, match="its pixels lie nowhere on Earth"):
        open_raster(path).__enter__()
