"""Which kind of cache is the quicker one here: measured for about two seconds, then predicted.

Features cost one forward of the backbone and are loaded in every epoch; tiles are much smaller, but
cost a forward each time they are met. Files are loaded beside the training where there are
`train.num_workers`. What the head takes is the same for both and left out.
"""

import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from config import Train
from utils.artefacts import temporary_of
from utils.cache import load_tile, tile_path, write_tile
from utils.devices import most_at_once
from utils.distributed import Runtime
from utils.logging import VerbosityLogger
from utils.manifest import Manifest
from utils.quantize import as_cached

FORWARD, FILE = 0.8, 0.2  # seconds to measure the backbone, a write or a load

Backbone = Callable[[Tensor], Sequence[Tensor]]  # as it will run: on its device, compiled or not


class FilePace(NamedTuple):
    """Seconds to write and to load one tile's file, and its bytes."""

    write: float
    load: float
    size: int


class Pace(NamedTuple):
    """Seconds of one tile in the backbone, and what its file takes with features and without."""

    forward: float
    features: FilePace
    tiles: FilePace


class Forecast(NamedTuple):
    """What a kind of cache takes in all: seconds and bytes."""

    seconds: float
    size: int


def forecasts(pace: Pace, tiles: int, epochs: int, workers: int = 0) -> dict[str, Forecast]:
    """Both kinds of cache, for so many tiles, epochs and loaders beside the training.

    >>> pace = Pace(1.0, FilePace(0.5, 0.25, 9), FilePace(0.125, 0.125, 1))
    >>> {kind: each.seconds for kind, each in forecasts(pace, tiles=2, epochs=4).items()}
    {'features': 5.0, 'tiles': 9.25}
    >>> forecasts(pace, tiles=2, epochs=4, workers=2)["tiles"].seconds
    8.25
    """
    forward, features, bare = pace
    once = forward + features.write + epochs * step_of(features.load, 0.0, workers)
    each_time = bare.write + epochs * step_of(bare.load, forward, workers)
    return {
        "features": Forecast(tiles * once, tiles * features.size),
        "tiles": Forecast(tiles * each_time, tiles * bare.size),
    }


def step_of(load: float, forward: float, workers: int) -> float:
    """Seconds of a tile in training: loaded in turn with its forward, or beside it by workers.

    >>> step_of(4.0, 3.0, workers=0), step_of(4.0, 3.0, workers=1), step_of(4.0, 3.0, workers=4)
    (7.0, 4.0, 3.0)
    """
    return max(load / workers, forward) if workers else load + forward


def quicker(found: dict[str, Forecast], free: int) -> str:
    """The kind that takes less time; features only if they fit into the bytes that are free.

    >>> found = {"features": Forecast(5.0, 900), "tiles": Forecast(9.0, 100)}
    >>> quicker(found, free=1000), quicker(found, free=800)
    ('features', 'tiles')
    """
    fits = found["features"].size <= free
    return "features" if fits and found["features"].seconds <= found["tiles"].seconds else "tiles"


def settle_cache(
    manifest: Manifest, folder: Path, backbone: Backbone, device: torch.device,
    batch_size: int, tiles: int, section: Train, run: Runtime, log: VerbosityLogger,
) -> Manifest:  # fmt: skip
    """The manifest with a kind of cache in the place of `auto`: the first rank measures."""
    kind = manifest.cache
    if run.is_main and kind == "auto":
        folder.mkdir(parents=True, exist_ok=True)
        pace = measure(manifest, folder, backbone, device, batch_size, tiles)
        epochs = section.epochs
        found = forecasts(pace, tiles, epochs, section.num_workers)
        free = shutil.disk_usage(folder).free
        kind = quicker(found, free)
        for line in lines_of(pace, found, free, tiles, epochs):
            log.info(f"prepare: {line}")
        log.info(f"prepare: dataset.cache is {kind}")
    return replace(manifest, cache=run.agree(kind))


def lines_of(
    pace: Pace, found: dict[str, Forecast], free: int, tiles: int, epochs: int
) -> list[str]:
    """What was measured and what follows, in words."""
    files = [f"{each.write * 1e3:.1f} and {each.load * 1e3:.1f} ms" for each in pace[1:]]
    told = [
        f"{epochs * tiles / each.seconds:.1f} tiles/s and {each.size / 1e9:.2f} GB"
        for each in (found["features"], found["tiles"])
    ]
    return [
        f"measured for a tile: {pace.forward * 1e3:.1f} ms in the backbone, {files[0]} to write "
        f"and load it with features, {files[1]} without",
        f"{epochs} epochs of {tiles} tiles: {told[0]} with features, {told[1]} without; "
        f"{free / 1e9:.1f} GB are free",
    ]


def measure(
    manifest: Manifest, folder: Path, backbone: Backbone, device: torch.device,
    batch_size: int, tiles: int,
) -> Pace:  # fmt: skip
    """Run the backbone on random pixels; write and load a file of either kind in the folder."""
    count, size = min(batch_size, most_at_once(device) or batch_size), manifest.tile_size
    shape = (count, len(manifest.bands), size, size)
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)

    def forward() -> list[Tensor]:
        with torch.inference_mode():
            levels = backbone(pixels.to(device))
        float(levels[-1].sum())  # the device is done
        return levels

    encoded = as_cached(forward(), manifest.feature_dtype)  # this call may compile: it is not timed
    parts = {part: [level[0] for level in levels] for part, levels in encoded.items()}
    label = torch.zeros(size, size, dtype=manifest.label_dtype)
    scratch = temporary_of(folder / "pace")  # swept by the next run, should this one be killed
    scratch.mkdir()
    try:
        files = [
            file_pace(scratch, name, tiles, image=pixels[0], label=label, **held)
            for name, held in (("features", parts), ("tiles", {}))
        ]
    finally:
        shutil.rmtree(scratch)
    return Pace(seconds_of(forward, FORWARD) / count, *files)


def file_pace(folder: Path, name: str, tiles: int, **parts: Any) -> FilePace:
    """What writing and loading a tile's file takes, from the disk where memory cannot hold all."""
    path = tile_path(folder, name)
    written = seconds_of(lambda: write_tile(folder, name, **parts), FILE)
    size = path.stat().st_size
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cold = tiles * size > memory / 2 and hasattr(os, "posix_fadvise")

    def load() -> None:
        if cold:
            forget(path)
        load_tile(path)

    return FilePace(written, seconds_of(load, FILE), size)


def forget(path: Path) -> None:
    """Let the system drop a file's pages from memory, once they are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def seconds_of(work: Callable[[], Any], budget: float) -> float:
    """Seconds that work takes: the median of the calls that fit a budget, one at the least.

    >>> calls = []
    >>> 0 < seconds_of(lambda: calls.append(1), budget=0.01) < 0.01, len(calls) > 2
    (True, True)
    """
    taken: list[float] = []
    while sum(taken) < budget:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken)
