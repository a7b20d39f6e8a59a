"""The process around a run: threads, signals, and what an error means to whoever started it."""

import contextlib
import ctypes
import json
import os
import signal
import socket
import traceback
import warnings
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from config import Config
from utils.artefacts import write_artefact
from utils.limits import spelt_out

STATES = {
    0: "done",
    1: "failed: a bug of the program",
    2: "failed: configuration",
    3: "failed: input data or artefact",
    4: "failed: environment",
    5: "failed: training diverged",
    75: "stopped, run again",
}
M_ARENA_MAX = -8  # of malloc.h
ONLINE = (  # GDAL's drivers that reach into the net, or open what other drivers do
    "WMS WMTS WCS HTTP EEDA EEDAI PLMOSAIC STACIT STACTA DAAS OGCAPI WFS OAPIF CSW Elasticsearch "
    "Carto AmigoCloud PLSCENES NGW GDALG ADBC"
)
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1")
    if hasattr(signal, name)  # Windows has no SIGUSR1
]


def set_environment(config: Config) -> None:
    """Thread counts, cache sizes and limits, before the libraries that read them are imported."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    os.environ["OMP_NUM_THREADS"] = str(min(config.resources.omp_threads, share))
    os.environ.setdefault("GDAL_CACHEMAX", "32")  # MB; `utils.block_cache` enlarges it
    stay_local()
    share_one_heap()
    warnings.filterwarnings("ignore", message="Detected pickle protocol")  # torch, of damaged files


def stay_local() -> None:
    """Keep GDAL off the net and off Python code, whatever a raster or a file beside it names."""
    skipped = os.environ.get("GDAL_SKIP", "")
    if ONLINE not in skipped:
        os.environ["GDAL_SKIP"] = f"{skipped} {ONLINE}".strip()
    os.environ["CPL_VSIL_CURL_ALLOWED_FILENAME"] = "none"  # so no address is one
    os.environ["GDAL_VRT_ENABLE_PYTHON"] = "NO"


def share_one_heap() -> None:
    """Have all threads take memory from one heap, where the C library is glibc.

    By itself it gives each thread heaps of its own, which keep what was freed.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


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
    """Signals only ask the run to end. Afterwards a rank is deaf to torchrun, which stops all ranks
    when one ends: it is ending by itself, with its own exit code.

    >>> before = signal.getsignal(signal.SIGTERM)
    >>> with stoppable(): signal.getsignal(signal.SIGTERM) == STOP.ask
    True
    >>> signal.getsignal(signal.SIGTERM) == before
    True
    """
    STOP.asked = False
    before = {number: signal.signal(number, STOP.ask) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            deaf = number == signal.SIGTERM and "RANK" in os.environ
            signal.signal(number, signal.SIG_IGN if deaf else handler)


def forget_signals() -> None:
    """In a worker process: end when the parent says so, leave Ctrl-C to the parent."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def write_status(folder: Path, code: int | None, message: str = "") -> None:
    """Write status.json, for batch scripts: how a run ended, or that it goes on (code None).

    Not where the folder cannot be written to: the exit code and the log say the same.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_status(Path(folder), 75, "stopped by a signal")
    ...     json.loads(Path(folder, "status.json").read_text())["state"]
    'stopped, run again'
    """
    told = {
        "state": "running" if code is None else STATES[code],
        "exit_code": code,
        "message": message,
        "process": os.getpid(),
        "machine": socket.gethostname(),
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
    }
    with contextlib.suppress(OSError):
        write_artefact(folder / "status.json", f"{json.dumps(told, indent=2)}\n".encode())


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

    >>> ending_of(PermissionError(13, "Permission denied", "tiles"))
    (4, "[Errno 13] Permission denied: 'tiles'")
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
    return spelt_out(text)
