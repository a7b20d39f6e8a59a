"""The process around a run: threads, signals, and what an error means to whoever started it."""

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

from config import Config

M_ARENA_MAX = -8  # of malloc.h


def set_environment(config: Config) -> None:
    """Thread counts and cache sizes, before the libraries that read them are imported."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    os.environ["OMP_NUM_THREADS"] = str(min(config.resources.omp_threads, share))
    os.environ.setdefault("GDAL_CACHEMAX", "32")  # MB; `utils.block_cache` enlarges it
    share_one_heap()


def share_one_heap() -> None:
    """Have all threads take memory from one heap, where the C library is glibc.

    By itself it gives each thread heaps of its own, which keep what was freed.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM is like Ctrl-C inside. Afterwards a rank is deaf to torchrun, which stops all ranks
    when one ends: it is ending by itself, with its own exit code.

    >>> before = signal.getsignal(signal.SIGTERM)
    >>> with stoppable(): signal.getsignal(signal.SIGTERM).__name__
    'stop'
    >>> signal.getsignal(signal.SIGTERM) == before
    True
    """

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if "RANK" in os.environ else before)


def exit_code_of(error: Exception) -> int | None:
    """The exit code of an error's kind; None for a bug of ours.

    >>> from config import ConfigError
    >>> exit_code_of(ConfigError(["a"])), exit_code_of(PermissionError()), exit_code_of(KeyError())
    (2, 4, None)
    """
    if isinstance(error, OSError) or out_of_memory(error):
        return 4
    return getattr(error, "exit_code", None)


def out_of_memory(error: Exception) -> str:
    """What to say where memory ran out, here or in a worker that the system killed; else nothing.

    >>> out_of_memory(MemoryError()), out_of_memory(KeyError("memory"))
    ('out of memory; lower the batch_size or the workers of this phase', '')
    """
    kind, text = type(error).__name__, str(error)
    remedy = "lower the batch_size or the workers of this phase"
    if kind in ("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in text:
        return f"out of memory; {remedy}"
    if kind == "BrokenProcessPool" or text.startswith("DataLoader worker (pid"):
        return f"a worker process was killed, mostly for want of memory; {remedy}"
    return ""


def one_line(error: Exception) -> str:
    """What an error says, without the traceback that a loader process wraps it in.

    >>> one_line(PermissionError(13, "Permission denied", "tiles"))
    "[Errno 13] Permission denied: 'tiles'"
    """
    text = out_of_memory(error) or str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition("Error: ")[2]
    return text
