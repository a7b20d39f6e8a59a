"""Blending: a blend is the dense mosaic of its tiles in float64."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from utils.blending import WINDOWS, Blend, Strip, axis_weights, carried_rows, strips
from utils.tiling import Tile, origins, stride_of, tiles

CPU = torch.device("cpu")
OVERLAPS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97)

sides = st.integers(1, 75)
sizes = st.sampled_from([8, 16, 32])
overlaps = st.sampled_from(OVERLAPS)
LINES = {  # weights along one axis, written out
    "hann": lambda x: np.sin(np.pi * x) ** 2,
    "gaussian": lambda x: np.exp(-0.5 * ((x - 0.5) / 0.125) ** 2),
    "linear": lambda x: 1 - abs(2 * x - 1),
    "constant": lambda x: np.ones_like(x),
}


def dense_mosaic(probabilities, height, width, size, overlap, window="hann"):
    """Σ w·p / Σ w over tiles, in float64 and without tricks; probabilities by (row, col)."""
    stride = stride_of(size, overlap)
    classes = len(next(iter(probabilities.values())))
    sums = np.zeros((classes, max(height, size), max(width, size)))
    weights = np.zeros(sums.shape[1:])
    line = LINES[window]((np.arange(size) + 0.5) / size)
    weight = np.outer(line, line)
    for row in origins(height, size, stride):
        for col in origins(width, size, stride):
            place = np.s_[row : row + size, col : col + size]
            sums[:, *place] += weight * probabilities[row, col]
            weights[place] += weight
    return (sums / weights)[:, :height, :width]


def fed(blend, found, shape, valid=None):
    """The probabilities and the mask that a blend gives for tiles' probabilities by (row, col).

    Every pixel of the strip is finished once.
    """
    size = blend.size
    mosaic = np.full((3, *shape), np.nan)
    seen, times = np.zeros(shape, bool), np.zeros(shape, int)
    for (row, col), answer in found.items():
        tile = Tile(row, col, size, size)
        if not blend.strip.meets(tile):
            continue
        mask = np.ones((size, size), bool) if valid is None else valid[row, col]
        part = blend.feed(tile, answer, mask)
        if part is not None:
            rows = slice(part.place.row, part.place.row + part.place.height)
            cols = slice(part.place.col, part.place.col + part.place.width)
            mosaic[:, rows, cols] = part.probabilities.numpy()
            seen[rows, cols] = part.valid
            times[rows, cols] += 1
    assert (times[:, blend.strip.start : blend.strip.stop] == 1).all()
    assert times.sum() == shape[0] * (blend.strip.stop - blend.strip.start)
    return mosaic, seen


def random_tiles(height, width, size, overlap, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    plan = tiles(height, width, size, overlap)
    shape = (classes, size, size)
    return {(t.row, t.col): (3 * torch.randn(shape, generator=generator)).softmax(0) for t in plan}


@settings(max_examples=80, deadline=None)
@given(sides, sides, sizes, overlaps, st.integers(0, 9), st.sampled_from(sorted(WINDOWS)))
@example(height=3, width=70, size=32, overlap=0.5, seed=0, window="hann")  # lower than a tile
@example(height=70, width=3, size=32, overlap=0.5, seed=0, window="hann")  # narrower
@example(height=1, width=1, size=8, overlap=0.9, seed=0, window="gaussian")
@example(height=64, width=64, size=32, overlap=0.97, seed=0, window="linear")
@example(height=33, width=65, size=32, overlap=0.0, seed=0, window="constant")
def test_a_blend_is_the_dense_mosaic_of_the_same_probabilities(
    height, width, size, overlap, seed, window
):
    found = random_tiles(height, width, size, overlap, 3, seed)
    wanted = dense_mosaic(
        {place: part.double().numpy() for place, part in found.items()},
        height, width, size, overlap, window,
    )  # fmt: skip
    blend = Blend(height, width, size, overlap, 3, CPU, window)
    probabilities, valid = fed(blend, found, (height, width))
    assert np.abs(probabilities - wanted).max() < 1e-5
    assert valid.all()


@settings(max_examples=40, deadline=None)
@given(sides, sides, sizes, overlaps)
def test_constants_blend_to_constants(height, width, size, overlap):
    constant = torch.tensor([0.2, 0.5, 0.3])[:, None, None].expand(3, size, size)
    found = {(tile.row, tile.col): constant for tile in tiles(height, width, size, overlap)}
    blend = Blend(height, width, size, overlap, 3, CPU)
    probabilities, _ = fed(blend, found, (height, width))
    assert np.abs(probabilities - constant[:, :1, :1].numpy()).max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3000),
    st.sampled_from([16, 64, 512]),
    st.floats(0, 0.999),
    st.sampled_from(sorted(WINDOWS)),
)
def test_weights_are_never_zero_and_add_up_to_one_at_each_pixel(length, size, overlap, window):
    weights = axis_weights(length, size, stride_of(size, overlap), window)
    total = torch.zeros(max(length, size), dtype=torch.float64)
    for start, weight in weights.items():
        assert weight.min() > 0
        total[start : start + size] += weight
    assert (total - 1).abs().max() < 1e-5


@pytest.mark.parametrize("name", WINDOWS)
def test_a_window_is_symmetric_and_positive_even_in_the_corner_of_a_big_tile(name):
    window = WINDOWS[name](512).float()
    assert torch.allclose(window, window.flip(0), rtol=1e-5)
    assert window[0] ** 2 > 0


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_a_blend_takes_no_more_memory_for_a_higher_scene(overlap):
    def held(height):
        blend = Blend(height, 100, 32, overlap, 4, CPU)
        for tile in tiles(height, 100, 32, overlap):
            if tile.row > 4 * 32:
                break
            blend.feed(tile, torch.full((4, 32, 32), 0.25), np.ones((32, 32), bool))
        return sum(each.numel() for each in (blend._sums, blend._spare, blend._carry))

    stride = stride_of(32, overlap)
    shared = carried_rows(20_000, 32, stride)
    assert held(20_000) == held(20_000 + 900 * stride) == 2 * 4 * 32 * 32 + 4 * shared * 100
    assert shared <= 32


def test_pixels_leave_with_the_last_tile_that_reaches_them():
    blend = Blend(height=100, width=40, size=32, overlap=0.5, num_classes=2, device=CPU)
    half = torch.full((2, 32, 32), 0.5)
    found = [
        blend.feed(tile, half, np.ones((32, 32), bool)).place for tile in tiles(100, 40, 32, 0.5)
    ]
    assert found[:2] == [Tile(0, 0, 16, 8), Tile(0, 8, 16, 32)]
    assert [place.height for place in found[1::2]] == [16, 16, 16, 16, 4, 32]


@settings(max_examples=80, deadline=None)
@given(sides, sides, sizes, overlaps, st.integers(0, 9), st.data())
def test_a_strip_of_a_blend_is_that_part_of_the_whole_bit_for_bit(
    height, width, size, overlap, seed, data
):
    found = random_tiles(height, width, size, overlap, 3, seed)
    whole, _ = fed(Blend(height, width, size, overlap, 3, CPU), found, (height, width))
    start = data.draw(st.integers(0, width - 1))
    strip = Strip(start, data.draw(st.integers(start + 1, width)))
    blend = Blend(height, width, size, overlap, 3, CPU, strip=strip)
    part, _ = fed(blend, found, (height, width))
    assert np.array_equal(part[..., slice(*strip)], whole[..., slice(*strip)])


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 9000), st.integers(1, 400), st.integers(1, 2_000_000), sizes)
def test_strips_cover_the_width_once_within_what_they_may_take(width, column, most, multiple):
    found = strips(width, column, most, multiple)
    assert [strip.start for strip in found] == [0, *(strip.stop for strip in found[:-1])]
    assert found[-1].stop == width
    assert all(strip.start % multiple == 0 < strip.stop - strip.start for strip in found)
    for strip in found:
        assert strip.stop - strip.start <= max(multiple, most // column)


@settings(max_examples=30, deadline=None)
@given(sides, sides, overlaps, st.integers(0, 9))
def test_only_pixels_that_are_valid_somewhere_are_valid_in_the_end(height, width, overlap, seed):
    size = 16
    mask = np.random.default_rng(seed).random((max(height, size), max(width, size))) < 0.3
    found = random_tiles(height, width, size, overlap, 3, seed)
    valid = {(r, c): mask[r : r + size, c : c + size] for r, c in found}
    found = {place: part if valid[place].any() else None for place, part in found.items()}
    _, seen = fed(Blend(height, width, size, overlap, 3, CPU), found, (height, width), valid)
    assert np.array_equal(seen, mask[:height, :width])
