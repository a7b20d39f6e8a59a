"""Blending: overlapping tiles become one field of probabilities, a band of rows at a time.

P(y, x) = Σ w·p / Σ w over the tiles that cover a pixel, with a weight that is nowhere zero. Memory
holds the rows that two rows of tiles share, whatever the scene's height.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.tiling import Tile, origins, stride_of


def centres(size: int) -> Tensor:
    """Pixel centres along one axis of a tile, in (0, 1).

    >>> centres(4).tolist()
    [0.125, 0.375, 0.625, 0.875]
    """
    return (torch.arange(size, dtype=torch.float64) + 0.5) / size


def hann(size: int) -> Tensor:
    """A raised sine.

    >>> hann(4).round(decimals=4).tolist()
    [0.1464, 0.8536, 0.8536, 0.1464]
    """
    return torch.sin(torch.pi * centres(size)) ** 2


def gaussian(size: int) -> Tensor:
    """A bell with a standard deviation of an eighth of the tile (as nnU-Net's): e⁻⁸ at the rim.

    >>> gaussian(4).round(decimals=4).tolist()
    [0.0111, 0.6065, 0.6065, 0.0111]
    """
    return torch.exp(-0.5 * ((centres(size) - 0.5) * 8) ** 2)


def linear(size: int) -> Tensor:
    """A triangle.

    >>> linear(4).tolist()
    [0.25, 0.75, 0.75, 0.25]
    """
    return 1 - (2 * centres(size) - 1).abs()


def constant(size: int) -> Tensor:
    """The same weight everywhere: a plain mean, with steps where tiles end.

    >>> constant(2).tolist()
    [1.0, 1.0]
    """
    return torch.ones(size, dtype=torch.float64)


WINDOWS: dict[str, Callable[[int], Tensor]] = {
    "hann": hann,
    "gaussian": gaussian,
    "linear": linear,
    "constant": constant,
}


def axis_weights(length: int, size: int, stride: int, window: str = "hann") -> dict[int, Tensor]:
    """Each tile's weights along one axis, by its start, divided by the sum at each pixel.

    The weight of a pixel in a tile is the product of its row's and its column's; since tiles lie on
    a full grid, so is the sum over tiles, and the products of these quotients add up to 1.

    >>> {start: w.tolist() for start, w in axis_weights(3, size=2, stride=1).items()}
    {0: [1.0, 0.5], 1: [0.5, 1.0]}
    """
    weights = WINDOWS[window](size)
    starts = origins(length, size, stride)
    total = torch.zeros(max(length, size), dtype=torch.float64)
    for start in starts:
        total[start : start + size] += weights
    return {start: (weights / total[start : start + size]).float() for start in starts}


class Part(NamedTuple):
    """Finished pixels: their place in the scene, probabilities (classes, height, width) on the
    device, valid (height, width)."""

    place: Tile
    probabilities: Tensor
    valid: np.ndarray


class Strip(NamedTuple):
    """Columns of a scene that are blended together, `stop` excluded.

    >>> Strip(512, 1024).meets(Tile(0, 384, 512, 512)), Strip(0, 512).meets(Tile(0, 512, 9, 9))
    (True, False)
    """

    start: int
    stop: int

    def meets(self, tile: Tile) -> bool:
        """Whether a tile has a pixel in these columns."""
        return tile.col < self.stop and tile.col + tile.width > self.start


def strips(width: int, bytes_per_column: float, most: float, multiple: int) -> list[Strip]:
    """Columns in strips of at most `most` bytes, about equally wide.

    All but the last are multiples of `multiple` wide, and none is narrower than that.

    >>> strips(10_000, bytes_per_column=1000, most=10**8, multiple=512)
    [Strip(start=0, stop=10000)]
    >>> strips(10_000, bytes_per_column=1000, most=6_000_000, multiple=512)
    [Strip(start=0, stop=5120), Strip(start=5120, stop=10000)]
    """
    blocks = -(-width // multiple)
    allowed = max(1, int(most // (bytes_per_column * multiple)))
    step = -(-blocks // -(-blocks // allowed)) * multiple
    return [Strip(start, min(start + step, width)) for start in range(0, width, step)]


def carried_rows(height: int, size: int, stride: int) -> int:
    """The most rows that a row of tiles shares with the next one.

    >>> carried_rows(1024, size=512, stride=384), carried_rows(512, size=512, stride=384)
    (384, 0)
    """
    starts = origins(height, size, stride)
    return max((first + size - second for first, second in pairwise(starts)), default=0)


class Blend:
    """Sums of weighted probabilities, of the pixels that later tiles still add to.

    Tiles come row by row, in a row from left to right; with each one the pixels from its corner to
    the next tiles' ones are finished. What waits to the right of them stays in `_sums`, one tile
    large, what waits below in `_carry`, as high as two rows of tiles overlap.

    strip: the columns that are wanted; tiles that do not meet them are not fed.
    """

    def __init__(
        self,
        height: int,
        width: int,
        size: int,
        overlap: float,
        num_classes: int,
        device: torch.device,
        window: str = "hann",
        strip: Strip | None = None,
    ) -> None:
        stride = stride_of(size, overlap)
        self.size, self.strip = size, strip or Strip(0, width)
        rows, cols = (axis_weights(n, size, stride, window) for n in (height, width))
        met = [col for col in cols if self.strip.meets(Tile(0, col, size, size))]
        self._rows = {start: weights.to(device)[:, None] for start, weights in rows.items()}
        self._cols = {start: cols[start].to(device) for start in met}
        starts = list(rows)
        self._below = dict(zip(starts, [*starts[1:], height], strict=True))
        self._right = dict(zip(met, [*met[1:], self.strip.stop], strict=True))
        self._shared = {row: above + size - row for above, row in pairwise(starts)}
        self._steps = {col: col - left for left, col in pairwise(met)}
        self._left, self._last = met[0], starts[-1]
        self._carry = torch.zeros(
            num_classes, carried_rows(height, size, stride), met[-1] + size - met[0], device=device
        )
        self._sums, self._spare = torch.zeros(2, num_classes, size, size, device=device)

    def feed(self, tile: Tile, probabilities: Tensor | None, valid: np.ndarray) -> Part | None:
        """Add a tile; returns the pixels that it finishes, None where none of them is wanted.

        probabilities: (classes, size, size) on the device, None for a tile without a valid pixel;
        valid: (size, size). The part's probabilities hold until the next tile is fed.
        """
        self._move_to(tile)
        if probabilities is not None:
            self._sums.addcmul_(probabilities, self._rows[tile.row] * self._cols[tile.col])
        height, right = self._below[tile.row] - tile.row, self._right[tile.col]
        if tile.row != self._last:
            kept = self._sums[:, height:, : right - tile.col]
            self._carry[:, : kept.shape[1], tile.col - self._left : right - self._left] = kept
        first = max(self.strip.start, tile.col)
        if right <= first:
            return None
        inside = np.s_[:height, first - tile.col : right - tile.col]
        place = Tile(tile.row, first, height, right - first)
        return Part(place, self._sums[:, *inside], valid[inside])

    def _move_to(self, tile: Tile) -> None:
        """Make `_sums` those of a tile's pixels: from the tile before, from above, else 0."""
        kept, shared = 0, self._shared.get(tile.row, 0)
        if tile.col != self._left:
            step = self._steps[tile.col]
            kept = self.size - step
            self._spare[:, :, :kept] = self._sums[:, :, step:]
            self._sums, self._spare = self._spare, self._sums
        col = tile.col - self._left
        self._sums[:, :shared, kept:] = self._carry[:, :shared, col + kept : col + self.size]
        self._sums[:, shared:, kept:] = 0
