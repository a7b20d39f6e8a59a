"""Prepare beside its backbone: overhead, own CPU time per tile, memory, size of the cache.

    python -m benchmarks.prepare                       all figures, ViT-S/16 of random weights
    python -m benchmarks.prepare --only null --runs 7  own CPU time per tile and the cache's size
"""

import copy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch

from benchmarks.meter import alternate, best_batch, growth_of_pace, least_peak, seconds_of, slope
from benchmarks.rows import Row
from benchmarks.scenes import DEGREES, pixels
from benchmarks.workload import (
    TILE,
    backbone_of,
    bare_forward,
    cache_files,
    dtype_of,
    load,
    null_prepare,
    prepare_anew,
    rows_of_parts,
    run_parts,
    run_prepare,
    write_project,
    write_rasters,
)
from config import Config
from models.backbone import DinoBackbone

SMALL, MIDDLE, LARGE = 1024, 4096, 10240  # whole tiles, so that each has as many pixels of its own


def forward_rows(folder: Path, name: str, runs: int) -> list[Row]:
    """A run with its network, over the network's own calls and over the bare forward."""
    height, width = 4096, 3072  # 48 tiles, six whole batches
    path = write_project(folder, name)
    config = load(path, write_rasters(folder, height, width))
    backbone = backbone_of(config)
    floor = floor_of(config, backbone)
    spent, floors = alternate(runs, lambda: run_prepare(config, backbone), floor)
    per_tile = median(run.cpu / run.tiles for run in spent)
    return [
        Row("prepare: total over own forward", median(run.over_forward for run in spent), 1.03),
        Row("prepare: over the bare forward", per_tile / median(floors), 1.10),
    ]


def floor_of(config: Config, backbone: DinoBackbone) -> Callable[[], float]:
    """A function that measures CPU seconds per tile of the bare forward at its best batch."""
    dtype = dtype_of(config)
    bare = copy.deepcopy(backbone).to(dtype)
    images = backbone.normalize(torch.from_numpy(pixels(8))).to(dtype)
    batch = best_batch(lambda count: bare_forward(bare, images[:count]))

    def floor() -> float:
        parts = range(24 // batch)
        return seconds_of(lambda: [bare_forward(bare, images[:batch]) for _ in parts]) / 24

    return floor


def null_rows(folder: Path, name: str, runs: int) -> list[Row]:
    """Own CPU time per tile: the slope between two scenes; and the cache's bytes."""
    path = write_project(folder, name)
    configs = [
        load(path, write_rasters(folder, side, side, **crs))
        for crs in ({}, {"crs": DEGREES})
        for side in (SMALL, MIDDLE)
    ]
    calls = [lambda config=config: run_prepare(config) for config in configs]
    alternate(1, *calls)  # the first run of each reads files that are not in memory yet
    same, same_large, other, other_large = alternate(6 * runs + 1, *calls)
    unit = "ms"
    return [
        Row("prepare: own CPU per tile", 1e3 * slope(same, same_large), 7, unit),
        Row("prepare: own CPU per tile, labels in another CRS",
            1e3 * slope(other, other_large), 12, unit),
        Row("prepare: bytes per tile over features + 4 per pixel", cache_share(configs[-1]), 1.01),
    ]  # fmt: skip


def cache_share(config: Config) -> float:
    """The largest tile's bytes over those of its features, three of an image and one of a label."""
    sizes, spec = cache_files(config)
    cells = (TILE // spec.patch_size) ** 2
    plain = len(spec.layers) * spec.channels * cells * 2 + 4 * TILE**2
    return max(sizes) / plain


def growth_rows(folder: Path, name: str, runs: int) -> list[Row]:
    """Peak memory, and time per tile with a tiny backbone, of a large scene and a middling one."""
    rasters = [write_rasters(folder, side, side) for side in (MIDDLE, LARGE)]
    path = write_project(folder, name)
    middling, large = (least_peak(null_prepare, path, overrides) for overrides in rasters)
    path = write_project(folder, "tiny")
    growth = growth_of_pace(runs, prepare_anew, path, rasters)
    return [
        Row("prepare: memory of a 10k² scene over a 4k² one", large - middling, 25, "MB"),
        Row("prepare: time per tile of a 10k² scene over a 4k² one", growth, 1.05),
    ]


PARTS = {"forward": forward_rows, "null": null_rows, "growth": growth_rows}


def measure() -> list[Row]:
    """All rows, as `python -m benchmarks` wants them."""
    return rows_of_parts(PARTS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the ratio."""
    return run_parts(__doc__, PARTS, arguments)


if __name__ == "__main__":
    sys.exit(main())
