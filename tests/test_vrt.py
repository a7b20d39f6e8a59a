"""VRTs name files of this machine and nothing else, however they are written."""

from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from rasterio.vrt import WarpedVRT

from utils.opening import RefusedError, open_raster
from utils.vrt import VrtError, sources_of

SOURCE = "<SourceFilename relativeToVRT=\"1\">{}</SourceFilename><SourceBand>1</SourceBand>"
BAND = "<VRTRasterBand dataType=\"Byte\" band=\"1\">{}</VRTRasterBand>"
SIMPLE = "<SimpleSource>{}</SimpleSource>"


def vrt(path: Path, inside: str, start: str = "<VRTDataset rasterXSize='50' rasterYSize='40'>"):
    path.write_text(f"{start}{inside}</VRTDataset>")
    return path


def of(path: Path, name: str) -> Path:
    return vrt(path, BAND.format(SIMPLE.format(SOURCE.format(name))))


@pytest.fixture
def scene(write_tiff) -> Path:
    return write_tiff("scene.tif", np.arange(2000, dtype=np.uint8).reshape(40, 50))


def refused(path: Path) -> str:
    with pytest.raises(RefusedError) as caught:
        open_raster(path).__enter__()
    line = str(caught.value)
    assert line.startswith(f"{path}: ") and line.isprintable()
    assert "gdalbuildvrt" in line or "a source of it cannot be used" in line
    return line


def test_what_gdal_writes_is_read(scene, tmp_path):
    path = tmp_path / "mosaic.vrt"
    rasterio.shutil.copy(scene, path, driver="VRT")
    with rasterio.open(scene) as whole, open_raster(path) as dataset:
        assert (dataset.read() == whole.read()).all()
    assert [source.name for source in sources_of(path)] == ["scene.tif"]


def test_a_warped_vrt_of_a_vrt_is_read(scene, tmp_path):
    rasterio.shutil.copy(scene, tmp_path / "inner.vrt", driver="VRT")
    with (
        rasterio.open(tmp_path / "inner.vrt") as inner,
        WarpedVRT(inner, crs="EPSG:4326") as warped,
    ):
        rasterio.shutil.copy(warped, tmp_path / "outer.vrt", driver="VRT")
    with open_raster(tmp_path / "outer.vrt") as dataset:
        assert dataset.read().any()


@pytest.mark.parametrize(
    "name",
    ["/vsicurl/http://a/b.tif", "/vsis3/bucket/b.tif", "/vsizip/a.zip/b.tif", "http://a/b.tif",
     "vrt://scene.tif", "NETCDF:scene.nc:a", "&lt;VRTDataset/&gt;", "gone.tif", "", ".",
     " scene.tif", "scene.tif ", "WMS:http://a", "a" * 5000, "/etc/hostname", "scene.tif&#x1b;[2J"],
)  # fmt: skip
def test_a_source_that_is_no_raster_here_is_refused(scene, tmp_path, name):
    assert len(refused(of(tmp_path / "a.vrt", name))) < 1000


@pytest.mark.parametrize(
    "inside",
    [BAND.format(SIMPLE.format("<sourcefilename>/vsicurl/http://a</sourcefilename>")),
     BAND.format("<SimpleSource SourceFilename='scene.tif'/>"),
     BAND.format(SIMPLE.format("<SourceFilename>scene<!-- -->.tif</SourceFilename>")),
     BAND.format(SIMPLE.format("<SourceFilename relativeToVRT='01'>scene.tif</SourceFilename>")),
     BAND.format("<PixelFunctionLanguage>Python</PixelFunctionLanguage>"),
     BAND.format("<pixelfunctioncode>import os</pixelfunctioncode>"),
     "<VRTRasterBand subClass='VRTRawRasterBand'/>",
     "<subClass>VRTProcessedDataset</subClass>",
     "<Metadata domain='OVERVIEWS'><MDI key='OVERVIEW_FILE'>http://a</MDI></Metadata>",
     "<GDALWarpOptions><SourceDataset>/vsicurl/a</SourceDataset></GDALWarpOptions>",
     "<RPCTransformer><DEMPath>/vsicurl/a</DEMPath></RPCTransformer>",
     "<OpenOptions><OOI key='a'>b</OOI></OpenOptions>", "<Group name='/'/>",
     "<Other>/vsicurl/http://a</Other>", "<Other at='http://a'/>",
     "<a>" * 40 + "</a>" * 40, "<a>", "\x00", "<a xmlns='b'/>"],
)  # fmt: skip
def test_what_asks_for_more_than_files_is_refused(scene, tmp_path, inside):
    refused(vrt(tmp_path / "a.vrt", inside))


@pytest.mark.parametrize(
    "start",
    ["<!DOCTYPE a [<!ENTITY b \"c\">]><VRTDataset>", "<VRTDataset subClass='VRTProcessedDataset'>"],
)
def test_what_begins_otherwise_is_refused(tmp_path, start):
    refused(vrt(tmp_path / "a.vrt", "", start))


def test_entities_are_not_multiplied(tmp_path):
    bomb = "<!DOCTYPE a [<!ENTITY a0 'aaaaaaaaaa'>"
    bomb += "".join(f"<!ENTITY a{n + 1} '{f'&a{n};' * 10}'>" for n in range(12)) + "]>"
    assert "DOCTYPE" in refused(vrt(tmp_path / "a.vrt", "&a12;", f"{bomb}<VRTDataset>"))


def test_a_circle_and_a_deep_nest_are_refused(scene, tmp_path):
    of(tmp_path / "a.vrt", "b.vrt")
    of(tmp_path / "b.vrt", "a.vrt")
    assert "in a circle" in refused(tmp_path / "a.vrt")
    of(tmp_path / "0.vrt", "scene.tif")
    for number in range(6):
        of(tmp_path / f"{number + 1}.vrt", f"{number}.vrt")
    with open_raster(tmp_path / "3.vrt") as dataset:
        assert dataset.read().any()
    assert "over 4 deep" in refused(tmp_path / "6.vrt")


def test_what_is_refused_inside_is_refused_outside(scene, tmp_path):
    of(tmp_path / "inner.vrt", "/vsicurl/http://a/b.tif")
    assert "inner.vrt in it names the source" in refused(of(tmp_path / "outer.vrt", "inner.vrt"))


def test_a_source_under_a_false_ending_is_refused(scene, tmp_path):
    of(tmp_path / "false.tif", "scene.tif")
    assert "is a VRT, but ends in .tif" in refused(of(tmp_path / "outer.vrt", "false.tif"))


def test_a_vrt_that_changed_is_read_again(scene, tmp_path):
    path = of(tmp_path / "a.vrt", "scene.tif")
    assert len(sources_of(path)) == 1
    of(path, "/vsicurl/http://a/b.tif")
    with pytest.raises(VrtError):
        sources_of(path)
