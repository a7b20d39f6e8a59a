"""Inference: a scene of any size to a class map, streamed by windows from disk to disk.

Overlapping tiles are blended as probabilities: P(y, x) = Σ w·p / Σ w over the tiles that cover a
pixel, w a Hann window that is nowhere zero. Memory holds one band of rows, whatever the height.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import TTA, Inference
from utils.distributed import autocast
from utils.logging import VerbosityLogger
from utils.prepare import batched
from utils.raster import MapWriter, Scene, map_nodata, open_scene
from utils.tiling import Tile, origins, stride_of, tiles

Segment = Callable[[Tensor], Tensor]


def views(tta: TTA) -> list[tuple[int, ...]]:
    """Axes to flip, one entry per view of a tile; the first is the tile as it is.

    >>> views(TTA(horizontal_flip=True, vertical_flip=True))
    [(), (-1,), (-2,), (-2, -1)]
    """
    rows = [(), (-2,)] if tta.vertical_flip else [()]
    cols = [(), (-1,)] if tta.horizontal_flip else [()]
    return [row + col for row in rows for col in cols]


def mean_of_views(segment: Segment, pixels: Tensor, flips: Sequence[tuple[int, ...]]) -> Tensor:
    """Probabilities (B, K, H, W) averaged over flipped views, each flipped back."""
    total = sum(segment(pixels.flip(axes)).flip(axes) for axes in flips)
    return total / len(flips)


def hann(size: int) -> Tensor:
    """A window over one axis, sampled at pixel centres, so that no weight is zero.

    >>> hann(4).round(decimals=4).tolist()
    [0.1464, 0.8536, 0.8536, 0.1464]
    """
    centres = (torch.arange(size, dtype=torch.float64) + 0.5) / size
    return torch.sin(torch.pi * centres) ** 2


def axis_weights(length: int, size: int, stride: int) -> dict[int, Tensor]:
    """Each tile's weights along one axis, by its start, divided by the sum at each pixel.

    The weight of a pixel in a tile is the product of its row's and its column's; since tiles lie on
    a full grid, so is the sum over tiles, and the products of these quotients add up to 1.

    >>> {start: w.tolist() for start, w in axis_weights(3, size=2, stride=1).items()}
    {0: [1.0, 0.5], 1: [0.5, 1.0]}
    """
    starts = origins(length, size, stride)
    total = torch.zeros(max(length, size), dtype=torch.float64)
    for start in starts:
        total[start : start + size] += hann(size)
    return {start: (hann(size) / total[start : start + size]).float() for start in starts}


class Blend:
    """The sum of weighted probabilities over a band of rows, one tile high.

    Tiles come row by row. When one starts lower than the band, the rows above it are finished: they
    leave as class ids, and the rest of the band moves up.
    """

    def __init__(
        self, height: int, width: int, size: int, overlap: float, num_classes: int,
        device: torch.device,
    ) -> None:  # fmt: skip
        stride = stride_of(size, overlap)
        self.height, self.width, self.top = height, width, 0
        self.nodata = map_nodata(num_classes)
        row_weights, col_weights = (axis_weights(n, size, stride) for n in (height, width))
        self._rows = {start: w.to(device)[:, None] for start, w in row_weights.items()}
        self._cols = {start: w.to(device) for start, w in col_weights.items()}
        self._sums = torch.zeros(num_classes, size, max(width, size), device=device)
        self._valid = np.zeros((size, max(width, size)), bool)

    def feed(self, tile: Tile, probabilities: Tensor | None, valid: np.ndarray) -> np.ndarray:
        """Add a tile; returns the rows (n, width) that are finished by now, n often 0.

        probabilities: (K, size, size) on the device, or None for a tile without a valid pixel.
        """
        finished = self.finish(tile.row)
        cols = slice(tile.col, tile.col + tile.width)
        if probabilities is not None:
            weights = self._rows[tile.row] * self._cols[tile.col]
            self._sums[:, :, cols].addcmul_(probabilities, weights)
        self._valid[:, cols] |= valid
        return finished

    def finish(self, row: int) -> np.ndarray:
        """The class ids of the rows above `row` that have not left yet; nodata where not valid."""
        count = min(row, self.height) - self.top
        classes = self._sums[:, :count, : self.width].argmax(0).cpu().numpy()
        classes[~self._valid[:count, : self.width]] = self.nodata
        if count:
            kept = self._sums.shape[1] - count
            self._sums[:, :kept] = self._sums[:, count:].clone()
            self._sums[:, kept:] = 0
            self._valid[:kept] = self._valid[count:].copy()
            self._valid[kept:] = False
            self.top += count
        return classes


class Prediction(NamedTuple):
    """A tile's probabilities (K, size, size), None where it has no valid pixel, and its mask."""

    tile: Tile
    probabilities: Tensor | None
    valid: np.ndarray


def predict_tiles(
    scene: Scene, plan: Sequence[Tile], segment: Segment, batch_size: int, device: torch.device
) -> Iterator[Prediction]:
    """Read tiles, run the network on batches of those that have a valid pixel, keep the order."""
    for group in batched(plan, batch_size):
        pixels = [scene.read(tile) for tile in group]
        seen = [number for number, read in enumerate(pixels) if read.valid.any()]
        found: dict[int, Tensor] = {}
        if seen:
            images = torch.from_numpy(np.stack([pixels[number].image for number in seen]))
            with torch.inference_mode(), autocast(device):
                found = dict(zip(seen, segment(images.to(device)), strict=True))
        for number, (tile, read) in enumerate(zip(group, pixels, strict=True)):
            yield Prediction(tile, found.get(number), read.valid)


def predict_scene(
    section: Inference, segment: Segment, num_classes: int, device: torch.device,
    log: VerbosityLogger,
) -> Path:  # fmt: skip
    """Map the scene `input_tif` to `output_tif`, which gets its name when it is whole."""
    flips = views(section.tta)
    with open_scene(section.input_tif) as scene:
        grid = scene.grid
        plan = tiles(grid.height, grid.width, section.tile_size, section.overlap)
        log.info(
            f"inference: {section.input_tif.name}, {grid.height}×{grid.width} pixels, "
            f"{len(plan)} tiles of {section.tile_size}, {len(flips)} view(s)"
        )
        blend = Blend(
            grid.height, grid.width, section.tile_size, section.overlap, num_classes, device
        )
        predictions = predict_tiles(
            scene, plan, lambda images: mean_of_views(segment, images, flips), section.batch_size,
            device,
        )  # fmt: skip
        with MapWriter(section.output_tif, grid, num_classes) as output:
            work = log.progress(predictions, "inference", total=len(plan), unit="tile", every=50)
            for tile, probabilities, valid in work:
                output.write(blend.feed(tile, probabilities, valid))
            output.write(blend.finish(grid.height))
    return section.output_tif
