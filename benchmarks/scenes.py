"""Scenes and labels of any size, made block by block from a few painted ones.

Waves of ground with noise, so that pixels are about as hard to deflate as an aerial image's, and a
label that follows the waves.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import rasterio
from rasterio.crs import CRS
from rasterio.transform import Affine

from utils.grids import Grid, north_up, warp_outline

BLOCK = 512
UTM, GSD, WEST, NORTH = "EPSG:32633", 0.5, 412000, 5326000
DEGREES = "EPSG:4326"  # another CRS than the scene's
PAINTED = 8  # different blocks
Paint = Callable[[int], np.ndarray]


def scene_grid(height: int, width: int) -> Grid:
    """Where a scene's pixels lie."""
    return north_up(UTM, WEST, NORTH, GSD, height, width)


def label_grid(scene: Grid, crs: str) -> Grid:
    """A grid in another CRS that covers a scene in about as many pixels.

    >>> label_grid(scene_grid(1024, 2048), DEGREES)[2:]
    (1024, 2048)
    """
    outline = warp_outline(scene.footprint(), scene.crs, CRS.from_string(crs))
    left, bottom, right, top = outline.bounds
    sides = (right - left) / scene.width, (bottom - top) / scene.height
    transform = Affine(sides[0], 0, left, 0, sides[1], top)
    return Grid(CRS.from_string(crs), transform, scene.height, scene.width)


def waves(number: int) -> np.ndarray:
    """Heights (512, 512) of a painted block, -1 to 1."""
    phase = np.random.default_rng(number).uniform(0, 6, 3)
    row, col = np.mgrid[:BLOCK, :BLOCK]
    found = np.sin(row / 37 + phase[0]) + np.sin(col / 53 + phase[1])
    return (found + np.sin((row + col) / 71 + phase[2])) / 3


def image_block(number: int) -> np.ndarray:
    """Pixels (3, 512, 512) uint8 of a painted block."""
    noise = np.random.default_rng(number).normal(0, 6, (3, BLOCK, BLOCK))
    tint = np.array([90, 110, 70])[:, None, None]
    return (tint + 60 * waves(number) + noise).clip(1, 255).astype(np.uint8)


def label_block(number: int, classes: int = 2) -> np.ndarray:
    """Classes (1, 512, 512) uint8 of a painted block.

    >>> np.unique(label_block(0, classes=3)).tolist()
    [0, 1, 2]
    """
    edges = np.linspace(-0.6, 0.6, classes + 1)[1:-1]
    return np.digitize(waves(number), edges).astype(np.uint8)[None]


def pixels(count: int) -> np.ndarray:
    """A batch (count, 3, 512, 512) uint8 of painted blocks, as a network is given it."""
    return np.stack([image_block(number) for number in range(count)])


def write_blocks(path: Path, grid: Grid, paint: Paint) -> Path:
    """Write a raster of blocks in a row of which each is the next painted one."""
    painted = [paint(number) for number in range(PAINTED)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path, "w", driver="GTiff", count=len(painted[0]), height=grid.height, width=grid.width,
        dtype="uint8", crs=grid.crs, transform=grid.transform, tiled=True, blockxsize=BLOCK,
        blockysize=BLOCK, compress="deflate", zlevel=1, num_threads=2, bigtiff="IF_SAFER",
    ) as dataset:  # fmt: skip
        for number, (_, window) in enumerate(dataset.block_windows(1)):
            block = painted[number * 5 % PAINTED]
            dataset.write(block[:, : window.height, : window.width], window=window)
    return path


def write_scene(path: Path, height: int, width: int) -> Path:
    """Write an RGB scene of any size."""
    return write_blocks(path, scene_grid(height, width), image_block)


def write_labels(
    path: Path, height: int, width: int, crs: str = UTM, classes: int = 2
) -> Path:
    """Write labels that cover the scene of that size, on its grid or in another CRS."""
    grid = scene_grid(height, width)
    if crs != UTM:
        grid = label_grid(grid, crs)
    return write_blocks(path, grid, lambda number: label_block(number, classes))
