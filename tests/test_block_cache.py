"""GDAL's cache of blocks holds the strips that a row of tiles lies in, and no more."""

import os

import numpy as np
import project
import pytest
import rasterio

from config import load_config
from utils.block_cache import KEY, bytes_of_strips, make_room
from utils.process import set_environment


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A function that says what size a run gives the cache, whether one was set before or not."""

    def run(before=None, **changes):
        if before is None:
            monkeypatch.delenv(KEY, raising=False)
        else:
            monkeypatch.setenv(KEY, before)
        path = project.write_project(tmp_path, **changes)
        config = load_config(path)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        set_environment(config)
        make_room(config)
        return os.environ[KEY]

    return run


def write_strips(path, width, **profile):
    """A scene of 40 rows in strips, of 4 bands of 16 bits."""
    with rasterio.open(
        path, "w", driver="GTiff", height=40, width=width, count=4, dtype="uint16",
        crs=project.CRS, transform=project.grid(40, width).transform, **profile,
    ) as dataset:  # fmt: skip
        dataset.write(np.zeros((4, 40, width), np.uint16))
    return path


def test_scenes_in_tiles_need_no_more_than_the_least(run):
    assert run() == "32"


@pytest.mark.parametrize(("tile_size", "megabytes"), [(512, 166), (256, 84)])
def test_strips_of_a_wide_scene_make_it_larger_by_every_reader(
    run, tmp_path, tile_size, megabytes
):
    path = write_strips(tmp_path / "wide.tif", 20_000, blockysize=8, compress="deflate")
    wide = {"input_tif": str(path), "tile_size": tile_size, "readers": 2}
    assert run(inference=wide) == str(megabytes)  # 2 × (rows + 8) × 20 000 × 8 bytes
    assert run(inference=wide | {"enable": False}) == "32"


def test_it_takes_no_more_than_a_quarter_of_the_memory(run, tmp_path, monkeypatch):
    path = write_strips(tmp_path / "wide.tif", 20_000, compress="deflate")
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 10**5}.get)
    assert run(inference={"input_tif": str(path), "tile_size": 512}) == "102"


def test_a_size_that_the_user_has_set_stays(run, tmp_path):
    path = write_strips(tmp_path / "wide.tif", 20_000, compress="deflate")
    assert run("20", inference={"input_tif": str(path), "tile_size": 512}) == "20"


def test_what_cannot_be_opened_is_left_to_the_phase_that_needs_it(run, tmp_path):
    assert run(inference={"input_tif": "nowhere.tif"}) == "32"
    (tmp_path / "text.tif").write_text("no raster")
    assert run(inference={"input_tif": "text.tif"}) == "32"


def test_bands_stored_one_after_the_other_are_counted_as_well(tmp_path):
    for interleave in ("pixel", "band"):
        path = write_strips(tmp_path / f"{interleave}.tif", 900, interleave=interleave)
        with rasterio.open(path) as dataset:
            high = dataset.block_shapes[0][0]
            assert bytes_of_strips(dataset, high) == 2 * high * 900 * 8
