"""Blending: overlapping tiles become one field of probabilities, a band of rows at a time.

P(y, x) = Σ w·p / Σ w over the tiles that cover a pixel, with a weight that is nowhere zero. Memory
holds one band, one tile high, whatever the scene's height.
"""

from collections.abc import Callable
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


class Rows(NamedTuple):
    """Finished rows: probabilities (classes, n, width) on the device, valid (n, width)."""

    probabilities: Tensor
    valid: np.ndarray


class Blend:
    """The sum of weighted probabilities over a band of rows, one tile high.

    Tiles come row by row. When one starts lower than the band, the rows above it are finished: they
    leave, and the rest of the band moves up.
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
    ) -> None:
        stride = stride_of(size, overlap)
        self.height, self.width, self.top = height, width, 0
        rows, cols = (axis_weights(n, size, stride, window) for n in (height, width))
        self._rows = {start: weights.to(device)[:, None] for start, weights in rows.items()}
        self._cols = {start: weights.to(device) for start, weights in cols.items()}
        self._sums = torch.zeros(num_classes, size, max(width, size), device=device)
        self._valid = np.zeros((size, max(width, size)), bool)

    def feed(self, tile: Tile, probabilities: Tensor | None, valid: np.ndarray) -> Rows:
        """Add a tile; returns the rows that are finished by now, often none.

        probabilities: (classes, size, size) on the device, None for a tile without a valid pixel.
        """
        finished = self.finish(tile.row)
        cols = slice(tile.col, tile.col + tile.width)
        if probabilities is not None:
            weights = self._rows[tile.row] * self._cols[tile.col]
            self._sums[:, :, cols].addcmul_(probabilities, weights)
        self._valid[:, cols] |= valid
        return finished

    def finish(self, row: int) -> Rows:
        """The rows above `row` that have not left yet."""
        count = min(row, self.height) - self.top
        finished = Rows(
            self._sums[:, :count, : self.width].clone(), self._valid[:count, : self.width].copy()
        )
        if count:
            kept = self._sums.shape[1] - count
            self._sums[:, :kept] = self._sums[:, count:].clone()
            self._sums[:, kept:] = 0
            self._valid[:kept] = self._valid[count:].copy()
            self._valid[kept:] = False
            self.top += count
        return finished
