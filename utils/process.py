"""The process around a run: threads, signals, parent and workers, and what an error means to
whoever started it."""

import contextlib
import ctypes
import errno
import gc
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from config import Config
from utils.limits import spelt_out

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of malloc.h
FREE_KEPT = 128 << 20  # bytes at the heap's end
LARGE_BLOCK = 32 << 20  # bytes
ONLINE = (  # GDAL's drivers that reach into the net, or open what other drivers do
    "WMS WMTS WCS HTTP EEDA EEDAI PLMOSAIC STACIT STACTA DAAS OGCAPI WFS OAPIF CSW Elasticsearch "
    "Carto AmigoCloud PLSCENES NGW GDALG ADBC"
)
OF_GPU = re.compile(r"CUDA (error: )?out of memory|(CUBLAS|CUDNN)_STATUS_ALLOC_FAILED")
LOOK = 0.5  # seconds between two looks at whether the parent is still there
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)  # Windows has no SIGUSR1
]


def set_environment(config: Config) -> None:
    """Thread counts, cache sizes and limits, before the libraries that read them are imported."""
    os.environ["OMP_NUM_THREADS"] = str(min(config.resources.omp_threads, cores_of_rank()))
    os.environ.setdefault("GDAL_CACHEMAX", "32")  # MB; `utils.block_cache` enlarges it
    stay_local()
    keep_one_heap()
    warnings.filterwarnings("ignore", message="Detected pickle protocol")  # torch, of damaged files


def cores_of_rank() -> int:
    """How many of the processor's cores are this rank's share, one at the least.

    >>> 1 <= cores_of_rank() <= os.cpu_count()
    True
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def stay_local() -> None:
    """Keep GDAL off the net and off Python code, whatever a raster or a file beside it names."""
    skipped = os.environ.get("GDAL_SKIP", "")
    if ONLINE not in skipped:
        os.environ["GDAL_SKIP"] = f"{skipped} {ONLINE}".strip()
    os.environ["CPL_VSIL_CURL_ALLOWED_FILENAME"] = "none"  # so no address is one
    os.environ["GDAL_VRT_ENABLE_PYTHON"] = "NO"


def keep_one_heap() -> None:
    """Have all threads take memory from one heap and leave it what they free, where the C library
    is glibc.

    By itself it gives each thread heaps of its own, which keep what was freed, and gives the end of
    the first one back, so that a network on a CPU has the system make and clear its maps' pages
    anew in each layer. Here up to 128 MB stay; a block of over 32 MB for which that has no room is
    mapped by itself, and goes back when it is freed.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(M_ARENA_MAX, 1)
        libc.mallopt(M_MMAP_THRESHOLD, LARGE_BLOCK)
        libc.mallopt(M_TRIM_THRESHOLD, FREE_KEPT)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Have Python not look for garbage while libraries are imported, nor later in what they made.

    torch and transformers make half a million objects that stay to the end. Each look would go
    through all of them, as would the last one when the process ends: a start takes a third less
    CPU time for it. Garbage that is there afterwards stays, so nothing large should be at hand.

    >>> with importing(): gc.isenabled()
    False
    >>> gc.isenabled()
    True
    """
    watched, known = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > known:
            gc.freeze()
        if watched:
            gc.enable()


class StoppedError(Exception):
    """A signal asked the run to end; what is finished is kept."""

    exit_code = 75
    everywhere = True

    def __init__(self) -> None:
        super().__init__("stopped by a signal; what is finished is kept, run it again to go on")


class Stop:
    """Whether a signal has asked the run to end. Phases look at it between two pieces of work.

    >>> stop = Stop()
    >>> stop.check()
    >>> stop.ask(signal.SIGTERM, None)
    >>> stop.check()
    Traceback (most recent call last):
    utils.process.StoppedError: stopped by a signal; what is finished is kept, run it again to go on
    """

    def __init__(self) -> None:
        self.asked = False
        self.parent: int | None = None  # the number of the torchrun that started this rank

    @property
    def orphaned(self) -> bool:
        """Whether the torchrun that started this rank is gone, and its store with it."""
        return self.parent is not None and os.getppid() != self.parent

    def ask(self, number: int, _: object) -> None:
        """Handle a signal: remember it; a second Ctrl-C ends the process at once."""
        if self.asked and number == signal.SIGINT:
            os._exit(130)
        self.asked = True

    def check(self) -> None:
        """Raise StoppedError where the run is to end."""
        if self.asked:
            raise StoppedError


STOP = Stop()


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Signals only ask the run to end, and so does the end of the torchrun that started a rank.

    Afterwards a rank is deaf to torchrun, which stops all ranks when one ends: it is ending by
    itself, with its own exit code.

    >>> before = signal.getsignal(signal.SIGTERM)
    >>> with stoppable(): signal.getsignal(signal.SIGTERM) == STOP.ask
    True
    >>> signal.getsignal(signal.SIGTERM) == before
    True
    """
    STOP.asked = False
    before = {number: signal.signal(number, STOP.ask) for number in SIGNALS}
    launched = "RANK" in os.environ
    if launched:
        STOP.parent = parent = os.getppid()
        in_thread(lambda: (outlive(parent), STOP.ask(signal.SIGTERM, None)))
    try:
        yield
    finally:
        STOP.parent = None
        for number, handler in before.items():
            deaf = number == signal.SIGTERM and launched
            signal.signal(number, signal.SIG_IGN if deaf else handler)


def in_thread(work: Callable[[], object]) -> None:
    """Have a thread do something that the end of the process need not wait for."""
    threading.Thread(target=work, daemon=True).start()


def outlive(parent: int) -> None:
    """Return when this process's parent, whose number is given, is gone."""
    while os.getppid() == parent:
        time.sleep(LOOK)


def serve_parent() -> None:
    """In a worker process: end with the parent, or when the parent says so; ignore other signals.

    Who ends a job often tells every process of it, and what the parent still has to do before it
    ends needs its workers. The parent may be gone by now, so its number is the one it forked with.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process().pid
    if hasattr(signal, "sigtimedwait"):  # not on macOS: there the parent's word is ignored too
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        in_thread(lambda: (obey(parent), os._exit(0)))
    else:
        in_thread(lambda: (outlive(parent), os._exit(0)))


def obey(parent: int) -> None:
    """Return when the parent, whose number is given, sends SIGTERM or is gone."""
    while os.getppid() == parent:
        told = signal.sigtimedwait({signal.SIGTERM}, LOOK)
        if told is not None and told.si_pid == parent:
            return


def exit_code_of(error: Exception) -> int | None:
    """The exit code of an error's kind; None for a bug of ours.

    >>> from config import ConfigError
    >>> exit_code_of(ConfigError(["a"])), exit_code_of(PermissionError()), exit_code_of(KeyError())
    (2, 4, None)
    """
    if isinstance(error, OSError) or out_of_memory(error):
        return 4
    return getattr(error, "exit_code", None)


def ending_of(error: Exception) -> tuple[int, str]:
    """The exit code of an error and what to say of it in one line.

    >>> ending_of(OSError(28, "No space left on device", "cache/north.pt"))[0]
    4
    """
    code = exit_code_of(error)
    if code is not None:
        return code, one_line(error)
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return 1, (
        f"a bug of ours: {type(error).__name__}: {error}{place}; please report it with the "
        "traceback, which logging.file holds, and logging.level: debug shows"
    )


class WantOfMemoryError(Exception):
    """Memory ran out in a phase; the text names the keys to lower."""

    exit_code = 4


OF_SYSTEM = {
    name: remedy
    for names, remedy in (
        ("ENOSPC EDQUOT EFBIG", "make room there, or name another place"),
        ("EACCES EPERM EROFS", "grant it, or name another place"),
        ("EISDIR ENOTDIR EEXIST", "remove what is in the way, or name another place"),
        ("EIO ESTALE ETIMEDOUT ENXIO", "look at the disk, or the way to it"),
        ("EMFILE ENFILE", "let more files be open (ulimit -n)"),
        ("ENOMEM", "end other programs"),
    )
    for name in names.split()
}
REMEDIES = {
    "prepare": "lower prepare.batch_size, then prepare.readers",
    "verify": "lower verify.workers",
    "train": "lower train.batch_size (train.grad_accum_steps makes up for it), then "
    "train.num_workers",
    "inference": "lower inference.batch_size, then inference.max_memory",
}


@contextlib.contextmanager
def within_memory(phase: str) -> Iterator[None]:
    """Where memory runs out in a phase, the error names the keys that lower what it takes.

    >>> with within_memory("verify"): raise MemoryError
    Traceback (most recent call last):
    utils.process.WantOfMemoryError: verify: out of memory; lower verify.workers
    """
    try:
        yield
    except Exception as error:
        if reason := out_of_memory(error):
            raise WantOfMemoryError(f"{phase}: {reason}; {REMEDIES[phase]}") from error
        raise


def out_of_memory(error: Exception) -> str:
    """What ran out: memory, here or in a worker that was killed, or threads; nothing if neither.

    >>> out_of_memory(MemoryError()), out_of_memory(KeyError("memory"))
    ('out of memory', '')
    >>> out_of_memory(RuntimeError("can't start new thread"))
    'the system gave no further thread'
    """
    kind, text = type(error).__name__, str(error)
    if kind == "OutOfMemoryError" or (isinstance(error, RuntimeError) and OF_GPU.search(text)):
        return "out of GPU memory"
    if kind == "MemoryError" or "DefaultCPUAllocator" in text:
        return "out of memory"
    if kind == "BrokenProcessPool":
        return "a worker process was killed, mostly for want of memory"
    if text == "can't start new thread":
        return "the system gave no further thread"
    return ""


def one_line(error: Exception) -> str:
    """What an error says, in one line.

    >>> one_line(PermissionError(13, "Permission denied", "tiles"))
    'tiles: Permission denied; grant it, or name another place, and run again'
    """
    named = (getattr(error, name, None) for name in ("filename", "filename2"))
    places = [os.fsdecode(each) for each in named if isinstance(each, str | bytes | os.PathLike)]
    if isinstance(error, OSError) and places and error.strerror:
        remedy = OF_SYSTEM.get(errno.errorcode.get(error.errno, ""), "look at that place")
        return spelt_out(f"{' -> '.join(places)}: {error.strerror}; {remedy}, and run again")
    return spelt_out(out_of_memory(error) or str(error).strip())
