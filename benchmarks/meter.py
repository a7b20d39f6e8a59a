"""Clocks and memory of processes: what a figure on a noisy machine is made of.

Runs that are compared take turns, A B A B, and a figure is a median. CPU seconds are those of all
threads and of child processes that ended; memory is the peak of a process of its own.
"""

import resource
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, TypeVar

Result = TypeVar("Result")
MB = 1e6
PEAKS = 5  # runs of which the lowest peak counts: equal ones differ by 20 MB


def cpu_seconds() -> float:
    """CPU seconds so far of this process, all threads, and of its children that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def peak_bytes() -> int:
    """The most memory that this process ever held.

    Linux tells it of the program itself; ru_maxrss would count what the process was forked from.
    """
    status = Path("/proc/self/status")
    if status.exists():
        lines = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(lines["VmHWM"].split()[0]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Spent(NamedTuple):
    """What a phase took. span and cpu run from the first call of its model to the end.

    inside is the part of span that its model's own calls took, total the CPU seconds of all of the
    phase, peak the process's memory in bytes.
    """

    tiles: int
    span: float
    inside: float
    cpu: float
    total: float
    peak: int

    @property
    def over_forward(self) -> float:
        """Wall-clock time over that in the model's own calls.

        >>> Spent(tiles=24, span=10.2, inside=10.0, cpu=11, total=12, peak=0).over_forward
        1.02
        """
        return self.span / self.inside


class Watched:
    """A model's function that remembers its first call and how long it was inside.

    >>> watched = Watched(lambda tiles: tiles)
    >>> watched([1, 2]), watched([3])
    ([1, 2], [3])
    >>> watched.tiles, watched.calls
    (3, 2)
    """

    def __init__(self, call: Callable[[Any], Result]) -> None:
        self.call = call
        self.tiles = self.calls = 0
        self.inside = self.first = self.first_cpu = 0.0
        self._begun = cpu_seconds()

    def __call__(self, pixels: Any) -> Result:
        if not self.calls:
            self.first, self.first_cpu = time.perf_counter(), cpu_seconds()
        start = time.perf_counter()
        result = self.call(pixels)
        self.inside += time.perf_counter() - start
        self.calls += 1
        self.tiles += len(pixels)
        return result

    def spent(self) -> Spent:
        """What was spent by now, the end of the phase."""
        cpu = cpu_seconds()
        span = time.perf_counter() - self.first
        return Spent(
            self.tiles, span, self.inside, cpu - self.first_cpu, cpu - self._begun, peak_bytes()
        )


def alternate(times: int, *calls: Callable[[], Result]) -> list[list[Result]]:
    """Each call's results, the calls taking turns.

    >>> turns = iter("ABAB")
    >>> alternate(2, lambda: next(turns), lambda: next(turns))
    [['A', 'A'], ['B', 'B']]
    """
    results: list[list[Result]] = [[] for _ in calls]
    for _ in range(times):
        for place, call in zip(results, calls, strict=True):
            place.append(call())
    return results


def slope(small: list[Spent], large: list[Spent]) -> float:
    """CPU seconds per tile without what a run takes whatever its size.

    >>> run = Spent(tiles=4, span=0, inside=0, cpu=0, total=1.04, peak=0)
    >>> round(slope([run], [run._replace(tiles=104, total=2.04)]), 3)
    0.01
    """
    seconds = median(run.total for run in large) - median(run.total for run in small)
    return seconds / (large[0].tiles - small[0].tiles)


def seconds_of(call: Callable[[], object]) -> float:
    """CPU seconds of a call."""
    start = cpu_seconds()
    call()
    return cpu_seconds() - start


def pace_of_machine(runs: int = 200) -> float:
    """CPU milliseconds in which 4 MB, a tile's size, are copied and checksummed.

    Other work on the machine's cores, caches and memory lengthens it, and with it every figure in
    seconds.

    >>> 0 < pace_of_machine(runs=3) < 1000
    True
    """
    tile = bytes(2**22)
    return 1e3 * median(seconds_of(lambda: zlib.crc32(bytearray(tile))) for _ in range(runs))


def best_batch(call: Callable[[int], object], batches: Sequence[int] = (1, 2, 4, 8)) -> int:
    """The batch size at which a network takes the least CPU time per tile."""
    call(batches[0])
    times = {batch: seconds_of(lambda batch=batch: call(batch)) / batch for batch in batches}
    return min(times, key=times.__getitem__)


def apart(call: Callable[..., Result], *arguments: Any) -> Result:
    """A module's function called in a new process: its memory is its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(call, *arguments).result()


def least_peak(phase: Callable[..., Spent], path: Path, rasters: Sequence[str]) -> float:
    """The lowest peak of equal runs in MB: how threads happen to meet is not in it.

    rasters: overrides for the scene; each run is a new process.
    """
    return min(apart(phase, path, rasters).peak for _ in range(PEAKS)) / MB


def growth_of_pace(
    runs: int, phase: Callable[..., Spent], path: Path, rasters: Sequence[Sequence[str]]
) -> float:
    """CPU seconds per tile of a large scene over those of a small one.

    rasters: overrides for the small and the large one; each run is a new process.
    """
    calls = [partial(apart, phase, path, overrides) for overrides in rasters]
    small, large = (
        median(run.cpu / run.tiles for run in spent) for spent in alternate(runs, *calls)
    )
    return large / small


def rows_of(script: str) -> Any:
    """What a module measures; in here, since a new process cannot see into `__main__.py`."""
    return import_module(script).measure()
