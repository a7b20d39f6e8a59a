"""Places of pixels: those that GDAL's exact warper and a walk with PROJ find, from any window."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rasterio.crs import CRS
from rasterio.enums import Resampling
from rasterio.io import MemoryFile
from rasterio.transform import Affine, from_bounds
from rasterio.vrt import WarpedVRT
from rasterio.warp import transform
from rasterio.windows import Window

from utils import warping
from utils.grids import Grid
from utils.tiling import Tile, tiles
from utils.warping import SQUARE, Overlay, Places, Stored, gather

NEAR = 1e-5  # pixels of the raster below: a place this close to a border may fall to either side
OUTSIDE = -1
WGS84 = CRS.from_epsg(4326)
PAIRS = {  # the scene's CRS, the label's, and a place in degrees
    "zone and degrees": (32633, 4326, 13.8, 48.1),
    "zone and web mercator": (32633, 3857, 13.8, 48.1),
    "web mercator and zone": (3857, 32719, -70.6, -33.4),
    "degrees and zone": (4326, 32647, 100.5, 13.7),
    "neighbouring zones": (32633, 32632, 12.01, 52.0),
    "two data": (27700, 32630, -1.2, 52.3),
    "equal area and conic": (3035, 2154, 4.8, 46.2),
    "polar and degrees": (3413, 4326, -40, 75),
    "one": (32633, 32633, 13.8, 48.1),
}


def grid_at(epsg, lon, lat, gsd, height, width, turn=0.0, south_up=False) -> Grid:
    """A grid around a place; gsd in metres, whatever the CRS's unit."""
    crs = CRS.from_epsg(epsg)
    (x,), (y,) = transform(WGS84, crs, [lon], [lat])
    size = gsd / 111_320 if crs.is_geographic else gsd
    down = size if south_up else -size
    place = Affine.translation(x, y) @ Affine.rotation(turn) @ Affine.scale(size, down)
    return Grid(crs, place @ Affine.translation(-width / 2, -height / 2), height, width)


def numbers_of(raster: Grid) -> np.ndarray:
    """Another value in each pixel, so that no wrong place goes unseen."""
    return np.arange(raster.height * raster.width, dtype=np.int32).reshape(raster[2:])


def window_of(tile: Tile, grid: Grid) -> tuple[slice, slice]:
    bottom, right = tile.row + tile.height, tile.col + tile.width
    return slice(tile.row, min(bottom, grid.height)), slice(tile.col, min(right, grid.width))


def laid(grid: Grid, raster: Grid, tile: Tile | None = None) -> np.ndarray:
    """The raster's numbers under a tile's pixels, OUTSIDE where there are none."""
    tile = tile or Tile(0, 0, grid.height, grid.width)
    numbers = numbers_of(raster)
    found = np.full((tile.height, tile.width), -2)
    for part, places in Overlay(grid, raster).parts(tile):
        assert places is not None
        values, valid = gather(places, raster, reader(numbers))
        rows, cols = part.row - tile.row, part.col - tile.col
        inside = found[rows : rows + part.height, cols : cols + part.width]
        assert (inside == -2).all()
        inside[:] = values
        if valid is not None:
            inside[~valid] = OUTSIDE
    return found


def reader(numbers: np.ndarray):
    """Windows of an array, none of them empty or past its border."""

    def read(window: Window) -> Stored:
        rows, cols = (slice(*bounds) for bounds in window.toranges())
        assert 0 <= rows.start < rows.stop <= numbers.shape[0]
        assert 0 <= cols.start < cols.stop <= numbers.shape[1]
        return Stored(numbers[rows, cols], None)

    return read


def warped(grid: Grid, raster: Grid) -> np.ndarray:
    """The same by GDAL's warper at a tolerance next to none."""
    with MemoryFile() as file:
        with file.open(
            driver="GTiff", count=1, dtype="int32", height=raster.height, width=raster.width,
            crs=raster.crs, transform=raster.transform,
        ) as dataset:  # fmt: skip
            dataset.write(numbers_of(raster), 1)
        with file.open() as dataset, WarpedVRT(
            dataset, crs=grid.crs, transform=grid.transform, height=grid.height, width=grid.width,
            resampling=Resampling.nearest, nodata=OUTSIDE, tolerance=1e-6,
        ) as view:  # fmt: skip
            return view.read(1)


def walked(grid: Grid, raster: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The same by PROJ alone, pixel by pixel, and which centres lie clear of a border."""
    rows, cols = np.mgrid[: grid.height, : grid.width]
    x, y = grid.transform @ (cols.ravel() + 0.5, rows.ravel() + 0.5)
    if grid.crs != raster.crs:
        x, y = map(np.array, transform(grid.crs, raster.crs, x, y))
    cols, rows = places = np.stack(~raster.transform @ (x, y))
    inside = (rows >= 0) & (rows < raster.height) & (cols >= 0) & (cols < raster.width)
    found = np.full(len(rows), OUTSIDE)
    numbers = numbers_of(raster)
    found[inside] = numbers[rows[inside].astype(int), cols[inside].astype(int)]
    clear = (np.abs(places - np.rint(places)) > NEAR).all(0)
    return found.reshape(grid[2:]), clear.reshape(grid[2:])


@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1), shape=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    fineness=st.sampled_from([0.21, 0.5, 1.0, 1.37, 3.3, 19.0]),
    turns=st.tuples(st.sampled_from([0, 10, -77]), st.sampled_from([0, 0, 30, 181])),
    south_up=st.booleans(), apart=st.sampled_from([0, 0.6, 3]),
)  # fmt: skip
def test_places_are_those_of_the_exact_warper(pair, seed, shape, fineness, turns, south_up, apart):
    first, second, lon, lat = PAIRS[pair]
    rng = np.random.default_rng(seed)
    gsd = rng.choice([0.1, 0.5, 10.0])
    grid = grid_at(first, lon, lat, gsd, *shape, turns[0])
    height, width = np.ceil(np.array(shape) * rng.uniform(0.3, 1.5, 2) / fineness).astype(int)
    degree = 1 / 111_320
    east, north = rng.uniform(-1, 1, 2) * apart * gsd * np.array(shape) / 2 * degree
    raster = grid_at(
        second, lon + east, lat + north, gsd * fineness, int(height), int(width), turns[1],
        south_up,
    )  # fmt: skip
    found, (expected, clear) = laid(grid, raster), walked(grid, raster)
    assert np.array_equal(found[clear], expected[clear])
    if min(*grid[2:], *raster[2:]) > 8:  # on smaller ones the warper misses what there is
        assert np.array_equal(found[clear], warped(grid, raster)[clear])


@pytest.mark.parametrize("pair", [*PAIRS, "one, turned"])
def test_a_window_has_the_places_that_the_whole_grid_has_there(pair):
    first, second, lon, lat = PAIRS[pair.partition(",")[0]]
    grid = grid_at(first, lon, lat, 0.5, 2 * SQUARE + 70, SQUARE + 31, 12 * ("turned" in pair))
    raster = grid_at(second, lon + 1e-3, lat, 0.37, 700, 500)
    whole = laid(grid, raster)
    assert 0 < (whole == OUTSIDE).mean() < 1
    edges = [Tile(SQUARE - 1, SQUARE - 1, 2, 2), Tile(SQUARE, SQUARE, 1, 1), Tile(0, 5, 582, 1)]
    for tile in [*tiles(*grid[2:], 200, 0.3), *tiles(*grid[2:], SQUARE), *edges]:
        height, width = min(tile.height, grid.height), min(tile.width, grid.width)
        tile = Tile(tile.row, tile.col, height, width)
        assert np.array_equal(laid(grid, raster, tile), whole[window_of(tile, grid)])


def test_proj_is_asked_for_the_same_squares_by_every_window(monkeypatch):
    grid = grid_at(32633, 13.8, 48.1, 0.5, 2 * SQUARE + 70, SQUARE + 31)
    overlay = Overlay(grid, grid_at(4326, 13.8, 48.1, 0.37, 700, 500))
    squares = {
        Tile(row, col, min(SQUARE, grid.height - row), min(SQUARE, grid.width - col))
        for row in (0, SQUARE, 2 * SQUARE)
        for col in (0, SQUARE)
    }
    exact, asked = overlay._exact, []
    monkeypatch.setattr(overlay, "_exact", lambda square: asked.append(square) or exact(square))
    windows = [Tile(0, 0, *grid[2:]), Tile(SQUARE - 9, SQUARE - 9, 20, 30), Tile(300, 40, 50, 60)]
    for tile in windows:
        asked.clear()
        met = np.zeros(grid[2:], int)
        for part, _ in overlay.parts(tile):
            met[window_of(part, grid)] += 1
        assert met.sum() == met[window_of(tile, grid)].sum() == tile.height * tile.width
        assert met.max() == 1
        assert set(asked) <= squares
        assert len(asked) == len(set(asked))


@pytest.mark.parametrize("turn", [0, 30])
def test_a_centre_on_a_border_lies_in_the_pixel_right_of_it_and_below(turn):
    grid = grid_at(32633, 13.8, 48.1, 0.3, 400, 300, turn)
    raster = Grid(grid.crs, grid.transform @ Affine.scale(0.5), 800, 600)
    rows, cols = np.mgrid[:400, :300] * 2 + 1
    assert np.array_equal(laid(grid, raster), numbers_of(raster)[rows, cols])


@pytest.mark.parametrize("turn", [0, 30, 12.3, -71.9])
def test_equal_grids_read_each_window_as_it_is(turn):
    grid = grid_at(32633, 13.8, 48.1, 0.3, 700, 600, turn)
    raster = Grid(grid.crs, grid.transform @ Affine.translation(-7, -3), 800, 650)
    asked = []

    def read(window: Window) -> Stored:
        asked.append(window)
        return reader(numbers_of(raster))(window)

    [(_, places)] = Overlay(grid, raster).parts(Tile(60, 50, 64, 64))
    values, valid = gather(places, raster, read)
    assert asked == [Window(57, 63, 64, 64)]
    assert valid is None
    assert np.array_equal(values, numbers_of(raster)[63:127, 57:121])


def test_grids_turned_alike_have_one_row_for_each_row():
    for turn in range(1, 90):
        grid = grid_at(32633, 13.8, 48.1, 0.3, 70, 60, turn)
        raster = grid_at(32633, 13.8, 48.1, 1.7, 30, 20, turn)
        [(_, places)] = Overlay(grid, raster).parts(Tile(0, 0, 70, 60))
        assert (places.rows.shape, places.cols.shape) == ((70, 1), (1, 60))


@pytest.mark.parametrize("pair", ["zone and degrees", "one"])
def test_a_raster_much_finer_than_the_grid_is_read_in_bounded_parts(pair, monkeypatch):
    first, second, lon, lat = PAIRS[pair]
    grid, raster = grid_at(first, lon, lat, 9, 60, 50), grid_at(second, lon, lat, 0.5, 1000, 800)
    whole = laid(grid, raster)
    monkeypatch.setattr(warping, "LARGEST_READ", 900)
    asked = []

    def bounded(window: Window) -> Stored:
        asked.append(window.width * window.height)
        return reader(numbers_of(raster))(window)

    found = [
        gather(places, raster, bounded)
        for _, places in Overlay(grid, raster).parts(Tile(0, 0, 60, 50))
    ]
    assert max(asked) <= 900
    assert np.array_equal(np.where(found[0].valid, found[0].values, OUTSIDE), whole)


@pytest.mark.parametrize(("second", "gsd"), [(32633, 1e-6), (3857, 0.1)])
def test_a_place_far_beyond_the_raster_is_just_beyond_it(second, gsd):
    grid = grid_at(32633, 13.8, 48.1, 0.5, 90, 80)
    far = grid_at(second, -120 if second == 3857 else 16, -40, gsd, 7, 5)
    for _, places in Overlay(grid, far).parts(Tile(0, 0, 90, 80)):
        assert set(np.unique(places.rows)) <= {-1, 7}
        assert set(np.unique(places.cols)) <= {-1, 5}
    assert (laid(grid, far) == OUTSIDE).all()


def test_data_types_survive_where_a_window_lies_outside_in_part():
    raster = Grid(None, Affine.identity(), 3, 3)
    for dtype in (np.uint8, np.float32, np.int64):
        numbers = np.full((3, 3), 7, dtype)
        places = Places(np.array([[-1], [0], [3]], np.int32), np.array([[-1, 1, 3]], np.int32))
        values, valid = gather(places, raster, reader(numbers))
        assert values.dtype == dtype
        assert valid.tolist() == [[False] * 3, [False, True, False], [False] * 3]
        assert values[1, 1] == 7


# What PROJ makes uneven

WORLD = from_bounds(-180, -90, 180, 90, 360, 180)


@pytest.mark.parametrize("kind", ["180 degrees", "pole", "rim"])
def test_squares_that_a_polynomial_does_not_meet_have_no_places(kind):
    raster = Grid(WGS84, WORLD, 180, 360)
    grid = {
        "180 degrees": grid_at(32660, 179.9, 60, 30, 600, 700),
        "pole": grid_at(3413, 0, 90, 3000, 600, 700),
        "rim": Grid(
            CRS.from_string("+proj=geos +h=35786023 +lon_0=-75 +sweep=x"),
            Affine(2e4, 0, -6e6, 0, -2e4, 6e6), 600, 600,
        ),
    }[kind]  # fmt: skip
    overlay = Overlay(grid, raster)
    assert not overlay.complete
    parts = list(overlay.parts(Tile(0, 0, *grid[2:])))
    assert any(places is None for _, places in parts)
    assert kind == "pole" or len(parts) == 9
    expected, clear = walked(grid, raster) if kind != "rim" else (None, None)
    for part, places in parts:
        if places is not None and kind != "rim":  # PROJ refuses a rim's pixels all at once
            values, _ = gather(places, raster, reader(numbers_of(raster)))
            inside = window_of(part, grid)
            assert np.array_equal(values[clear[inside]], expected[inside][clear[inside]])


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("gsd", [0.1, 1.0, 30.0])
def test_common_pairs_of_systems_need_no_warper(pair, gsd):
    first, second, lon, lat = PAIRS[pair]
    overlay = Overlay(grid_at(first, lon, lat, gsd, 512, 512), grid_at(second, lon, lat, gsd, 9, 9))
    assert all(places is not None for _, places in overlay.parts(Tile(0, 0, 512, 512)))


def test_a_small_scene_of_large_pixels_needs_no_warper():
    overlay = Overlay(grid_at(32633, 13.8, 48.1, 30_000, 9, 7), Grid(WGS84, WORLD, 180, 360))
    assert all(places is not None for _, places in overlay.parts(Tile(0, 0, 9, 7)))
