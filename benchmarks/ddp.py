"""Training on two gloo ranks beside one: CPU time per sample.

    python -m benchmarks.ddp

unet_v2 on cached features of ViT-S/16's size; each rank takes batches as large as the lone one's.
"""

import os
import socket
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.meter import alternate
from benchmarks.rows import Row, command_line, report
from benchmarks.workload import (
    Epochs,
    load,
    run_prepare,
    run_training,
    write_project,
    write_rasters,
)


def measure(runs: int = 2) -> list[Row]:
    """CPU seconds per sample of two ranks over those of one."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        train = {"batch_size": 2, "num_workers": 0, "epochs": 2}
        path = write_project(folder, "vits16", train=train, prepare={"tile_size": 256})
        load(path)
        overrides = write_rasters(folder, 1024, 1024 + 256)
        run_prepare(load(path, overrides))
        one, two = alternate(
            runs, partial(per_sample, path, overrides, 1), partial(per_sample, path, overrides, 2)
        )
    ratio = median(two) / median(one)
    return [Row("two gloo ranks: CPU per sample over one rank", ratio, 1.12)]


def per_sample(path: Path, overrides: Sequence[str], ranks: int) -> float:
    """CPU seconds per sample of the second epoch, of all ranks together."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ProcessPoolExecutor(ranks, get_context("spawn")) as pool:
        jobs = [pool.submit(epoch, path, overrides, rank, ranks, port) for rank in range(ranks)]
        spent = [job.result() for job in jobs]
    return sum(cpu for cpu, _ in spent) / sum(samples for _, samples in spent)


def epoch(
    path: Path, overrides: Sequence[str], rank: int, ranks: int, port: int
) -> tuple[float, int]:
    """CPU seconds and samples of this rank's second epoch."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1"} | {key: str(v) for key, v in names.items()}
    together = ("resources.distributed=true", "resources.dist_backend=gloo") if ranks > 1 else ()
    epochs = Epochs()
    run_training(load(path, [*overrides, *together]), epochs)
    return epochs.spent[-1].cpu, epochs.spent[-1].samples


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the ratio."""
    parser = command_line(__doc__)
    parser.add_argument("--runs", type=int, default=2)
    report(measure(parser.parse_args(arguments).runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
