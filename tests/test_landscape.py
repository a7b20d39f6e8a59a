"""The painted countryside: the same for a seed, mixed alike in all, lit as it is built."""

from types import SimpleNamespace

import numpy as np
import pytest

from utils import landscape
from utils.landscape import BUILDING, CLASSES, FIELD, ROAD, WATER, WOOD, Landscape, paint

SHARES = {  # the least and the most of what the camera saw
    FIELD: (0.45, 0.65),
    WOOD: (0.12, 0.25),
    ROAD: (0.04, 0.08),
    BUILDING: (0.03, 0.07),
    WATER: (0.04, 0.10),
}


@pytest.fixture(scope="module", params=[3, 14, 159])
def scene(request) -> Landscape:
    return paint(704, 736, seed=request.param)


def test_kinds_and_shapes(scene):
    assert (scene.image.shape, scene.image.dtype) == ((3, 704, 736), np.uint8)
    assert (scene.classes.shape, scene.classes.dtype) == ((704, 736), np.uint8)
    assert (scene.valid.shape, scene.valid.dtype) == ((704, 736), bool)


def test_every_class_holds_its_share(scene):
    counts = np.bincount(scene.classes[scene.valid], minlength=len(CLASSES))
    shares = counts / counts.sum()
    assert len(shares) == len(CLASSES) == len(SHARES)
    outside = {
        CLASSES[name]: share
        for name, share in enumerate(shares)
        if not SHARES[name][0] <= share <= SHARES[name][1]
    }
    assert not outside


def test_the_camera_saw_all_but_a_wedge_at_the_border(scene):
    missing = ~scene.valid
    assert 0.03 <= missing.mean() <= 0.06
    assert np.array_equal(missing, (scene.image == 0).all(axis=0))
    assert scene.image[:, scene.valid].min() > 0
    for lines in (missing, missing.T):  # a half-plane: one run in a line, from its end
        starts = np.diff(lines.astype(np.int8), axis=1, prepend=0) == 1
        assert starts.sum(axis=1).max() <= 1
        assert (lines[:, 0] | lines[:, -1])[lines.any(axis=1)].all()


def test_woods_and_water_are_dark_and_roads_are_grey(scene):
    tone = {
        name: np.median(scene.image[:, scene.valid & (scene.classes == name)], axis=1)
        for name in SHARES
    }
    assert max(tone[WOOD].mean(), tone[WATER].mean()) + 15 < tone[FIELD].mean()
    assert tone[WATER].argmax() == 2
    assert tone[WOOD].argmax() == 1
    assert np.ptp(tone[ROAD]) < 15


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (33, 90), (64, 96), (256, 256), (300, 1100)]
)
def test_any_size(height, width):
    scene = paint(height, width, seed=5)
    assert scene.image.shape == (3, height, width)
    assert scene.classes.shape == scene.valid.shape == (height, width)
    assert scene.valid.mean() > 0.9


@pytest.mark.parametrize("seed", range(4))
def test_a_small_place_has_every_class(seed):
    scene = paint(256, 256, seed)
    assert set(np.unique(scene.classes[scene.valid])) == set(range(len(CLASSES)))


def test_a_seed_is_a_place():
    here, again, elsewhere = paint(256, 256, 1), paint(256, 256, 1), paint(256, 256, 2)
    assert np.array_equal(here.image, again.image)
    assert np.array_equal(here.classes, again.classes)
    assert (here.classes != elsewhere.classes).mean() > 0.2


def test_noise_is_smooth_and_of_unit_height():
    hills = landscape.noise((300, 400), 16, np.random.default_rng(0))
    assert hills.shape == (300, 400)
    assert 0.8 < hills.std() < 1.2
    assert abs(np.diff(hills, axis=0)).max() < 0.5
    assert abs(np.diff(hills, axis=1)).max() < 0.5


def test_box_is_a_mean_over_squares():
    values = np.random.default_rng(0).random((9, 12))
    padded = np.pad(values, 2, mode="edge")
    expected = np.lib.stride_tricks.sliding_window_view(padded, (5, 5)).mean((2, 3))
    assert np.allclose(landscape.box(values, 2), expected, atol=1e-6)


def test_blend_moves_towards_the_other_colour():
    mixed = landscape.blend(np.zeros((3, 1, 2)), (100, 50, 0), np.array([[0.5, 1.0]]))
    assert mixed[:, 0].T.tolist() == [[50, 25, 0], [100, 50, 0]]


def test_a_parcel_is_halved_across_its_long_side():
    south, east = (axis.ravel() for axis in np.mgrid[:20.0, :100.0])
    across, along = landscape.halve(south, east, 0.0, np.random.default_rng(0))
    assert np.ptp(across) == pytest.approx(99, abs=0.1)
    assert np.ptp(along) == pytest.approx(19, abs=0.1)
    assert 0.35 < (across > 0).mean() < 0.65


def test_parcels_are_small_and_lie_beside_enough_road():
    valid = np.ones((600, 500), bool)
    ground = landscape.divide(valid, paved=15_000, rng=np.random.default_rng(0))
    sizes = np.bincount(ground.parcel.ravel()) * landscape.GSD**2
    borders = ground.parcel[:, 1:] != ground.parcel[:, :-1]
    assert sizes.min() > 0
    assert sizes.max() <= landscape.LARGEST_PARCEL
    assert 15_000 <= (ground.road > 0).sum() <= 25_000
    assert (ground.edge[:, 1:][borders] < 1).all()


def test_the_river_runs_through_the_middle():
    row, col = np.mgrid[:101.0, :101.0]
    across = landscape.river(row, col, course=np.zeros(3))
    assert across[50, 50] == 0
    assert across[0, 50] < 0 < across[100, 50]


def test_houses_stand_square_to_their_road():
    road = -np.mgrid[:200.0, :200.0][0] * landscape.GSD  # a road along the upper border
    window, height, plot = landscape.house(road, 100, 90, np.random.default_rng(2))
    rows, cols = np.nonzero(height)
    filled = (height > 0).sum() / (np.ptp(rows) + 1) / (np.ptp(cols) + 1)
    assert road[window].shape == height.shape == plot.shape
    assert (plot | (height == 0)).all() and plot.sum() > (height > 0).sum()
    assert filled > 0.6
    assert 60 < (height > 0).sum() * landscape.GSD**2 < 900


def test_the_highest_crown_wins():
    crowns = np.full((3, 3, 3), 5.0)  # nine trees at row 5, col 5, with a radius of 5 pixels
    values = np.arange(9.0).reshape(3, 3)
    top, number = landscape.canopy(crowns, values, droop=0.5, ragged=np.zeros((11, 10)))
    assert top.shape == number.shape == (11, 10)
    assert (top[5, 5], number[5, 5]) == (8, 8)
    assert top[5, 9] == pytest.approx(8 * (1 - 0.5 * 16 / 25))
    assert (top[0, 0], number[0, 0]) == (-np.inf, -1)


def test_no_tree_stands_in_water_roads_or_houses():
    surfaces = {"hedge": 0.0, "parcel": 0, "road": -9.0}
    ground = SimpleNamespace(**{k: np.full((30, 30), v) for k, v in surfaces.items()})
    depth, roofs = np.full((30, 30), -50.0), np.full((30, 30), -1)
    ground.road[:, :5], depth[:, 10:15], roofs[20:25, 20:25] = 1.0, 3.0, 7
    stems = tuple(np.indices((30, 30)))
    wanted = landscape.rank(ground, depth, roofs, stems, np.random.default_rng(0))
    bare = (ground.road > 0) | (depth > 0) | (roofs >= 0)
    assert (wanted[bare] == -np.inf).all()
    assert np.isfinite(wanted[:15, 16:]).all()


def test_a_shadow_is_as_long_as_the_sun_is_low():
    wall = np.where(np.arange(30)[:, None] == 5, 4.4, np.zeros((30, 30)))
    dark = landscape.shadow(wall)[:, -1] > 0.5
    length = 4.4 / landscape.SUN_FALL * landscape.SUN[0] / landscape.GSD
    assert dark.sum() == pytest.approx(length, abs=1.5)
    assert not dark[:6].any() and dark[6]
