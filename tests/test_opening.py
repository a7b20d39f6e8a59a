"""Rasters opened safely: what a file is, and whether its structure holds; see also test_formats."""

import numpy as np
import pytest
import rasterio
import rasterio.shutil

from utils.opening import RasterError, check_structure, file_identity

HEIGHT, WIDTH = 70, 90


@pytest.fixture
def pixels(rng) -> np.ndarray:
    return rng.integers(1, 256, (3, HEIGHT, WIDTH), dtype=np.uint8)


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


def test_structure_is_checked_in_tiffs_of_any_name(write_tiff, pixels):
    path = write_tiff("scene.bin", pixels)
    check_structure(path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RasterError, match="truncated"):
        check_structure(path)
