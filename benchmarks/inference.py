"""Inference beside its network: overhead, own CPU time per tile, memory, number of windows.

    python -m benchmarks.inference                       all figures, ViT-S/16 of random weights
    python -m benchmarks.inference --only null --runs 7  own CPU time per tile
"""

import itertools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.meter import (
    MB,
    alternate,
    apart,
    best_batch,
    growth_of_pace,
    least_peak,
    seconds_of,
    slope,
)
from benchmarks.rows import Row
from benchmarks.scenes import pixels
from benchmarks.workload import (
    TILE,
    backbone_of,
    bare_segment,
    load,
    map_anew,
    null_map,
    rows_of_parts,
    run_inference,
    run_parts,
    segmenter_of,
    write_project,
    write_rasters,
)
from utils.tiling import stride_of

SMALL, MIDDLE, LARGE = 1024, 4096, 10240
NOISE = 8  # MB by which the lowest peaks of equal runs may differ


def forward_rows(folder: Path, name: str, runs: int) -> list[Row]:
    """A run with its network, over the network's own calls and over the bare network."""
    path = write_project(folder, name)
    config = load(path, write_rasters(folder, 1664, 1664))  # 16 windows, two whole batches
    segmenter = segmenter_of(config, backbone_of(config))
    images = torch.from_numpy(pixels(8))
    batch = best_batch(lambda count: bare_segment(config, segmenter, images[:count]))

    def floor() -> float:
        parts = range(16 // batch)
        bare = lambda: [bare_segment(config, segmenter, images[:batch]) for _ in parts]  # noqa: E731
        return seconds_of(bare) / 16

    spent, floors = alternate(runs, lambda: run_inference(config, segmenter), floor)
    per_tile = median(run.cpu / run.tiles for run in spent)
    return [
        Row("inference: total over own forward", median(run.over_forward for run in spent), 1.03),
        Row("inference: over the bare network", per_tile / median(floors), 1.08),
    ]


def tiny_rows(folder: Path, name: str, runs: int) -> list[Row]:
    """A run with the tiny backbone over its network's own calls."""
    config = load(write_project(folder, "tiny"), write_rasters(folder, 1664, 1664))
    segmenter = segmenter_of(config, backbone_of(config))
    spent = [run_inference(config, segmenter) for _ in range(runs)]
    ratio = median(run.over_forward for run in spent)
    return [Row("inference, tiny backbone: total over own forward", ratio, 1.08)]


def null_rows(folder: Path, name: str, runs: int) -> list[Row]:
    """Own CPU time per tile: the slope between two scenes."""
    path = write_project(folder, name)
    configs = [load(path, write_rasters(folder, side, side)) for side in (SMALL, MIDDLE)]
    calls = [lambda config=config: run_inference(config) for config in configs]
    alternate(1, *calls)  # the first run of each reads files that are not in memory yet
    small, large = alternate(2 * runs + 1, *calls)
    return [Row("inference: own CPU per tile", 1e3 * slope(small, large), 14, "ms")]


def memory_rows(folder: Path, name: str, runs: int) -> list[Row]:
    """Peak memory of scenes that are larger, taller, or wide with many classes."""
    path = write_project(folder, name)

    def peak(height: int, width: int) -> float:
        return least_peak(null_map, path, write_rasters(folder, height, width))

    square = peak(LARGE, LARGE) - peak(MIDDLE, MIDDLE)
    tall = peak(2 * LARGE, MIDDLE) - peak(LARGE, MIDDLE)  # GDAL's cache of blocks is full in both
    path = write_project(folder, "tiny", model={"num_classes": 50, "head": "linear"})
    wide = apart(map_anew, path, write_rasters(folder, SMALL, 20000)).peak / MB
    return [
        Row("inference: memory of a 10k² scene over a 4k² one", square, 150, "MB"),
        Row(f"inference: memory of a scene twice as tall, {NOISE} of it noise", tall, NOISE, "MB"),
        Row("inference: memory of a scene 20k wide, 50 classes", wide, 2000, "MB"),
    ]


def pace_rows(folder: Path, name: str, runs: int) -> list[Row]:
    """Time per tile of a large scene over a middling one, without overlap: tiles of as much map."""
    path = write_project(folder, "tiny", model={"head": "linear"}, inference={"overlap": 0.0})
    rasters = [write_rasters(folder, side, side) for side in (MIDDLE, LARGE)]
    growth = growth_of_pace(runs, map_anew, path, rasters)
    return [Row("inference: time per tile of a 10k² scene over a 4k² one", growth, 1.05)]


def windows_rows(folder: Path, name: str, runs: int) -> list[Row]:
    """Windows that the network saw too often or not at all, over scenes of several shapes."""
    path = write_project(folder, name)
    wrong = 0
    for height, width in itertools.product((300, 512, 513, 1408), (512, 897, 1400)):
        config = load(path, write_rasters(folder, height, width))
        wrong += abs(run_inference(config).tiles - windows(height, width, 0.25))
    return [Row("inference: windows too many or too few", wrong, 0)]


def windows(height: int, width: int, overlap: float) -> int:
    """How many windows cover a scene.

    >>> windows(4096, 4096, 0.25), windows(300, 10240, 0.0)
    (121, 20)
    """
    stride = stride_of(TILE, overlap)
    return math.prod(max(0, math.ceil((n - TILE) / stride)) + 1 for n in (height, width))


PARTS = {
    "forward": forward_rows,
    "tiny": tiny_rows,
    "null": null_rows,
    "memory": memory_rows,
    "pace": pace_rows,
    "windows": windows_rows,
}


def measure() -> list[Row]:
    """All rows, as `python -m benchmarks` wants them."""
    return rows_of_parts(PARTS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the ratio."""
    return run_parts(__doc__, PARTS, arguments)


if __name__ == "__main__":
    sys.exit(main())
