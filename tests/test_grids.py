"""Where pixels lie: their size on the ground, and the same ground in other pixels."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.transform import Affine

from utils.grids import Grid, ground_gsd, north_up, resized


@pytest.mark.parametrize(
    ("crs", "left", "top", "gsd", "metres"),
    [
        ("EPSG:32633", 412000, 5326000, 0.5, 0.5),  # scale factor 0.9997 here
        ("EPSG:32645", 500000, 3000000, 10, 10),
        ("EPSG:3857", 9500000, 3200000, 0.1493, 0.1493 * np.cos(np.radians(27.6))),
        ("EPSG:3857", 0, 8400000, 10, 10 * np.cos(np.radians(59.99))),
        ("EPSG:2263", 990000, 200000, 1, 0.3048),  # feet
    ],
)
def test_the_ground_gsd_is_in_metres_whatever_the_crs(crs, left, top, gsd, metres):
    assert ground_gsd(north_up(crs, left, top, gsd, 400, 300)) == pytest.approx(metres, rel=0.004)


def test_the_ground_gsd_of_degrees_is_the_mean_of_both_sides():
    grid = north_up("EPSG:4326", 15, 60, 1e-5, 1000, 1000)
    assert ground_gsd(grid) == pytest.approx(1.1133 * np.cos(np.radians(60)) ** 0.5, rel=0.004)


def test_the_ground_gsd_of_a_turned_or_south_up_grid_is_that_of_its_pixels():
    utm = CRS.from_epsg(32633)
    for turned in (Affine.rotation(33), Affine.scale(1, -1)):
        place = Affine(0.5, 0, 412000, 0, -0.5, 5326000) @ turned
        assert ground_gsd(Grid(utm, place, 200, 300)) == pytest.approx(0.5, rel=0.001)


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(0.05, 20))
def test_a_resized_grid_covers_the_same_ground(height, width, factor):
    grid = north_up("EPSG:32633", 412000, 5326000, 0.5, height, width)
    found = resized(grid, factor)
    assert found.footprint().bounds == pytest.approx(grid.footprint().bounds, abs=1e-6)
    assert found.height == max(1, round(height / factor))
