"""Runs in a child of the test's process: nothing is imported anew, and it can be killed.

A child has a session of its own, so that whatever it starts can be found by `left_of`, and its
output goes to a file. It ends without a word to pytest: the code is what `call` returns, 1 after an
exception, or minus the signal that ended it.
"""

import contextlib
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import rasterio.shutil
import torch

LONGEST = 60.0  # seconds: what takes longer hangs


class Child:
    """A call that runs in a child process."""

    def __init__(self, call: Callable[[], int]) -> None:
        self._output, name = tempfile.mkstemp()
        Path(name).unlink()
        sys.stdout.flush()
        sys.stderr.flush()
        self.started, self._code = time.monotonic(), None
        self.pid = os.fork()
        if self.pid == 0:
            _live(call, self._output)

    @property
    def said(self) -> str:
        """What it wrote to stdout and stderr so far."""
        length = os.fstat(self._output).st_size
        return os.pread(self._output, length, 0).decode(errors="replace")

    def __del__(self) -> None:
        os.close(self._output)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send it a signal."""
        os.kill(self.pid, number)

    @property
    def code(self) -> int | None:
        """Its exit code, or minus the signal that ended it; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, seconds: float = LONGEST) -> int:
        """Its code when it has ended; one that hangs fails the test."""
        deadline = time.monotonic() + seconds
        while self.code is None and time.monotonic() < deadline:
            time.sleep(0.002)
        if self.code is not None:
            return self.code
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError(f"still there after {seconds} s; it said: {self.said}")


def _live(call: Callable[[], int], output: int) -> None:
    """What the child does, to its end."""
    code = 1
    try:
        os.setsid()
        for number in (1, 2):
            os.dup2(output, number)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
        torch.set_num_threads(1)  # makes torch's pool anew, which two threads must not do at once
        rasterio.shutil.copy = partial(_copy_alone, rasterio.shutil.copy)
        code = call()
    except BaseException:  # noqa: BLE001 - the child of a test ends here, whatever came
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _copy_alone(copy: Callable[..., None], *paths: Path, **options: object) -> None:
    """rasterio.shutil.copy by one thread: those that GDAL keeps do not live on in a child."""
    copy(*paths, **options | {"num_threads": "1"} if "num_threads" in options else options)


def forked(call: Callable[[], int]) -> int:
    """Run a call in a child to its end; what it said is shown where that is no success."""
    child = Child(call)
    code = child.wait()
    if code:
        sys.stderr.write(child.said)
    return code


def killed(call: Callable[[], int], after: float) -> int:
    """Run a call in a child that is killed so many seconds after its start, if it still runs then.

    The code is -9 where it was.
    """
    child = Child(call)
    time.sleep(max(0.0, child.started + after - time.monotonic()))
    child.kill()  # one that has ended is still a zombie: its number is not given away
    return child.wait()


def left_of(session: int) -> list[int]:
    """The processes of a child's session that are still there."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            told = (folder / "stat").read_text().rpartition(") ")[2].split()
            if int(told[3]) == session and told[0] not in "ZX":
                found.append(int(folder.name))
    return found
