"""Loading cached tiles: CPU time per sample, and how long a training step waits for its batch.

    python -m benchmarks.loader
    python -m benchmarks.loader --only samples --runs 9
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.meter import seconds_of
from benchmarks.rows import Row, command_line, report
from benchmarks.workload import (
    Epochs,
    load,
    run_prepare,
    run_training,
    train_batches,
    write_project,
    write_rasters,
)
from config import Config


def cached(folder: Path, backbone: str, height: int, width: int, **train: object) -> Config:
    """A cache of constant features of a backbone's size, and the configuration to train on it."""
    path = write_project(folder, backbone, train=train)
    load(path)  # the environment, before the first raster is opened
    config = load(path, write_rasters(folder, height, width))
    run_prepare(config)
    return config


def sample_rows(folder: Path, runs: int) -> list[Row]:
    """CPU time per sample of an epoch, loaded and turned in this process."""
    rows = []
    for channels, backbone, limit in ((384, "vits16", 2), (1024, "wide", 4)):
        config = cached(folder, backbone, 2048, 3072 + 512, num_workers=0)
        batches = train_batches(config)

        def epoch(batches=batches) -> int:
            return sum(len(batch.name) for batch in batches)

        count = epoch()
        seconds = median(seconds_of(epoch) for _ in range(30 * runs + 1))  # of a tenth of a second
        what = f"loader: CPU per sample of {channels} channels"
        rows.append(Row(what, 1e3 * seconds / count, limit, "ms"))
    return rows


def stall_rows(folder: Path, runs: int) -> list[Row]:
    """The share of an epoch in which the steps of unet_v2 wait for a loading thread."""
    settings = {"num_workers": 1, "epochs": 2, "batch_size": 2}
    epochs = Epochs()
    run_training(cached(folder, "vits16", 2048, 2048 + 512, **settings), epochs)
    last = epochs.spent[-1]
    return [Row("loader: training step over its part without the loader", last.over_steps, 1.01)]


PARTS = {"stall": stall_rows, "samples": sample_rows}


def measure(runs: int = 3, parts: Sequence[str] = tuple(PARTS)) -> list[Row]:
    """The rows of the parts asked for."""
    rows: list[Row] = []
    for part in parts:
        with TemporaryDirectory() as folder:
            rows += PARTS[part](Path(folder), runs)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the ratio."""
    parser = command_line(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", choices=list(PARTS), action="append", help="repeatable")
    options = parser.parse_args(arguments)
    report(measure(options.runs, options.only or tuple(PARTS)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
