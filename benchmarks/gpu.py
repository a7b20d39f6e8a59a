"""Tiles per second on a CUDA device with ViT-L/16 of random weights, and the stage that binds.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --batch 16 --threads 8

Each phase is run whole, with constants in place of its network, and its network alone; the slower
of the latter two binds it. The measure for all is the bare forward, compiled, with weights in bf16,
at its best batch; phases compile their networks too (resources.compile). The device's peak is what
a product of large bf16 matrices reaches; a phase's share of it counts its network's operations.
Without a CUDA device it ends with exit code 4.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import torch

from benchmarks.head import operations_of
from benchmarks.meter import Spent
from benchmarks.rows import Row, command_line, report
from benchmarks.scenes import pixels
from benchmarks.workload import (
    backbone_of,
    bare_forward,
    bare_segment,
    encode_of,
    load,
    manifest_of,
    run_inference,
    run_prepare,
    segmenter_of,
    write_project,
    write_rasters,
)
from models.backbone import DinoBackbone
from utils.devices import no_cuda
from utils.logging import complain
from utils.sources import find_sources

SIDE = 8192  # pixels: 256 tiles, 441 windows
MATRIX = 8192
BATCHES = (1, 2, 4, 8, 16, 32, 64)
WHOLE, SHARE, TARGET = "tiles per second", "share of the bare forward", 0.8


def measure(
    batch: int = 32, threads: int = 8, runs: int = 3, device: str = "cuda",
    backbone: str = "vitl16", side: int = SIDE, batches: Sequence[int] = BATCHES,
    matrix: int = MATRIX,
) -> list[Row]:  # fmt: skip
    """Rows for the bare forward and for each phase, its network alone and the rest alone."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        place = {"device": device, "batch_size": batch}
        resources = {"omp_threads": threads, "compile": True}
        path = write_project(
            folder, backbone, resources=resources, prepare=place, inference=place
        )
        config = load(path, write_rasters(folder, side, side))
        network = backbone_of(config).to(device)
        segmenter = segmenter_of(config, network)
        raw = np.tile(pixels(8), (-(-batch // 8), 1, 1, 1))[:batch]
        encode = encode_of(config, manifest_of(config, find_sources(config), network), network)
        on_device = torch.from_numpy(raw).to(device)
        alone = {
            "prepare": partial(encode, raw),
            "inference": partial(bare_segment, config, segmenter, on_device),
        }
        bare = bare_rate(network, torch.device(device), batches)
        peak = peak_of(torch.device(device), matrix)
        rows = [
            figure_row("bare forward", WHOLE, bare),
            figure_row("device", "operations of bf16 at its peak", peak / 1e12, "T/s"),
        ]
        for phase, run, model in (
            ("prepare", run_prepare, network), ("inference", run_inference, segmenter),
        ):  # fmt: skip
            operations = operations_of(alone[phase]) / batch
            network_rate = rate_of(alone[phase], batch, torch.device(device))
            rows += phase_rows(
                phase, partial(run, config), model, network_rate, bare, peak / operations, runs
            )
        return rows


def phase_rows(
    phase: str, run: Callable[..., Spent], network: torch.nn.Module, network_rate: float,
    bare: float, peak: float, runs: int,
) -> list[Row]:  # fmt: skip
    """A phase's tiles per second: whole, its network alone, the rest alone; which one binds.

    bare, peak: tiles per second of the bare forward, and at the device's peak.
    """
    run(network)  # kernels are chosen, files read into memory
    whole, rest = (
        median(spent.tiles / spent.span for spent in (run(model) for _ in range(runs)))
        for model in (network, None)
    )
    binds = "its network" if network_rate < rest else "reading and writing"
    return [
        Row(f"{phase}: {SHARE}", whole / bare, TARGET, at_least=True),
        figure_row(phase, "share of the bf16 peak", whole / peak, ""),
        figure_row(phase, f"{WHOLE}, bound by {binds}", whole),
        figure_row(phase, f"{WHOLE}, its network alone", network_rate),
        figure_row(phase, f"{WHOLE}, all but its network", rest),
    ]


def figure_row(phase: str, what: str, measured: float, unit: str = "/s") -> Row:
    """A row without a limit."""
    return Row(f"{phase}: {what}", measured, 0, unit, at_least=True)


def peak_of(device: torch.device, side: int = MATRIX) -> float:
    """Operations per second of a product of two square bf16 matrices.

    >>> peak_of(torch.device("cpu"), side=64) > 0
    True
    """
    matrix = torch.randn(side, side, device=device).bfloat16()
    return 2 * side**3 * rate_of(lambda: matrix @ matrix, 1, device)


def bare_rate(
    backbone: DinoBackbone, device: torch.device, batches: Sequence[int] = BATCHES
) -> float:
    """Tiles per second of the compiled bf16 forward on tiles that are on the device, at best."""
    weights = copy.deepcopy(backbone).bfloat16()
    bare = torch.compile(lambda images: bare_forward(weights, images), dynamic=False)
    raw = np.tile(pixels(8), (-(-max(batches) // 8), 1, 1, 1))
    images = backbone.normalize(torch.from_numpy(raw).to(device)).bfloat16()
    return max(rate_of(partial(bare, images[:batch]), batch, device) for batch in batches)


def rate_of(call: Callable[[], object], batch: int, device: torch.device, calls: int = 10) -> float:
    """Tiles per second of a call on the device, the first calls left out."""
    for _ in range(3):
        call()
    finish(device)
    start = time.perf_counter()
    for _ in range(calls):
        call()
    finish(device)
    return batch * calls / (time.perf_counter() - start)


def finish(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
