"""Tiling: every pixel is covered, none is counted twice, whatever the sizes."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from utils.tiling import Tile, origins, repeated, stride_of, tiles

sides = st.integers(1, 90)
sizes = st.integers(1, 40)
overlaps = st.floats(0, 0.99)


@given(sides, sides, sizes, overlaps)
def test_every_pixel_is_covered(height, width, size, overlap):
    covered = np.zeros((height, width), bool)
    for tile in tiles(height, width, size, overlap):
        covered[tile.row : tile.row + tile.height, tile.col : tile.col + tile.width] = True
    assert covered.all()


@given(sides, sides, sizes, overlaps)
def test_tiles_have_one_size_and_stay_inside_a_scene_that_holds_them(height, width, size, overlap):
    for tile in tiles(height, width, size, overlap):
        assert (tile.height, tile.width) == (size, size)
        assert tile.row >= 0
        assert tile.col >= 0
        assert tile.row + size <= max(height, size)
        assert tile.col + size <= max(width, size)


@given(sides, sides, sizes, overlaps)
def test_there_are_as_many_tiles_as_strides_fit(height, width, size, overlap):
    stride = stride_of(size, overlap)
    expected = math.prod(
        math.ceil(max(0, length - size) / stride) + 1 for length in (height, width)
    )
    found = tiles(height, width, size, overlap)
    assert len(found) == len(set(found)) == expected


@given(sides, sides, sizes)
def test_what_is_not_repeated_counts_every_pixel_exactly_once(height, width, size):
    counts = np.zeros((height, width), int)
    for tile in tiles(height, width, size):
        rows, cols = repeated(tile)
        assert 0 <= rows < size
        assert 0 <= cols < size
        counts[tile.row + rows : tile.row + size, tile.col + cols : tile.col + size] += 1
    assert (counts == 1).all()


@given(sides, sizes, st.integers(1, 40))
def test_origins_are_increasing_and_leave_no_gap(length, size, stride):
    stride = min(stride, size)
    starts = origins(length, size, stride)
    steps = np.diff(starts)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - size)
    assert ((steps > 0) & (steps <= stride)).all()


@given(sizes, overlaps)
def test_a_stride_is_at_least_a_pixel_and_at_most_a_tile(size, overlap):
    assert 1 <= stride_of(size, overlap) <= size


def test_tiles_come_row_by_row_and_their_names_sort_alike():
    found = tiles(3000, 2000, 512)
    assert found == sorted(found)
    assert [tile.name for tile in found] == sorted(tile.name for tile in found)


def test_a_name_tells_the_place():
    assert Tile(12, 1030, 64, 64).name == "r000012_c001030"
