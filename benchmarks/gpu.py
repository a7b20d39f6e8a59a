"""Tiles per second on a CUDA device with ViT-L/16 of random weights, and the stage that binds.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --batch 16 --threads 8

Each phase is run whole, with constants in place of its network, and its network alone; the slower
of the latter two binds it. The measure for all is the bare forward, compiled, with weights in bf16,
at its best batch. Without a CUDA device it ends with exit code 4.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.meter import Spent
from benchmarks.rows import Row, command_line, report
from benchmarks.scenes import pixels
from benchmarks.workload import (
    backbone_of,
    bare_forward,
    bare_segment,
    encode_of,
    load,
    run_inference,
    run_prepare,
    segmenter_of,
    write_project,
    write_rasters,
)
from models.backbone import DinoBackbone
from utils.distributed import no_cuda
from utils.logging import complain

HEIGHT, WIDTH = 8192, 8192  # 256 tiles, 441 windows
BATCHES = (1, 2, 4, 8, 16, 32, 64)
WHOLE, SHARE = "tiles per second", "share of the bare forward"


def measure(batch: int = 32, threads: int = 8, runs: int = 3) -> list[Row]:
    """Rows for the bare forward and for each phase, its network alone and the rest alone."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        device = {"device": "cuda", "batch_size": batch}
        path = write_project(
            folder, "vitl16", resources={"omp_threads": threads}, prepare=device, inference=device
        )
        load(path)
        config = load(path, write_rasters(folder, HEIGHT, WIDTH))
        backbone = backbone_of(config).to("cuda")
        segmenter = segmenter_of(config, backbone)
        raw = torch.from_numpy(pixels(8)).repeat(-(-batch // 8), 1, 1, 1)[:batch]
        encode, on_device = encode_of(config, backbone), raw.to("cuda")
        alone = {
            "prepare": partial(encode, raw),
            "inference": partial(bare_segment, config, segmenter, on_device),
        }
        bare = bare_rate(backbone)
        rows = [figure_row("bare forward", WHOLE, bare)]
        for phase, run, network in (
            ("prepare", run_prepare, backbone), ("inference", run_inference, segmenter),
        ):  # fmt: skip
            network_rate = rate_of(alone[phase], batch)
            rows += phase_rows(phase, partial(run, config), network, network_rate, bare, runs)
        return rows


def phase_rows(
    phase: str, run: Callable[..., Spent], network: torch.nn.Module, network_rate: float,
    bare: float, runs: int,
) -> list[Row]:  # fmt: skip
    """A phase's tiles per second: whole, its network alone, the rest alone; which one binds."""
    run(network)  # kernels are chosen, files read into memory
    whole, rest = (
        median(spent.tiles / spent.span for spent in (run(model) for _ in range(runs)))
        for model in (network, None)
    )
    binds = "its network" if network_rate < rest else "reading and writing"
    return [
        figure_row(phase, SHARE, whole / bare, unit=""),
        figure_row(phase, f"{WHOLE}, bound by {binds}", whole),
        figure_row(phase, f"{WHOLE}, its network alone", network_rate),
        figure_row(phase, f"{WHOLE}, all but its network", rest),
    ]


def figure_row(phase: str, what: str, measured: float, unit: str = "/s") -> Row:
    """A row without a limit."""
    return Row(f"{phase}: {what}", measured, 0, unit, at_least=True)


def bare_rate(backbone: DinoBackbone) -> float:
    """Tiles per second of the compiled bf16 forward on tiles that are on the device, at best."""
    weights = copy.deepcopy(backbone).bfloat16()
    bare = torch.compile(lambda images: bare_forward(weights, images), dynamic=False)
    raw = torch.from_numpy(pixels(8)).repeat(BATCHES[-1] // 8, 1, 1, 1).to("cuda")
    images = backbone.normalize(raw).bfloat16()
    return max(rate_of(partial(bare, images[:batch]), batch) for batch in BATCHES)


def rate_of(call: Callable[[], object], batch: int, calls: int = 10) -> float:
    """Tiles per second of a call on the device, the first calls left out."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    torch.cuda.synchronize()
    return batch * calls / (time.perf_counter() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the ratio, prepare's share; 4 without a CUDA device."""
    parser = command_line(__doc__)
    parser.add_argument("--batch", type=int, default=32, help="tiles per forward of a phase")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        complain(f"benchmarks.gpu: {no_cuda()}; it measures nothing else")
        return 4
    report(measure(options.batch, options.threads, options.runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
