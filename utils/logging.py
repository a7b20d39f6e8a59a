"""What a run says: levelled messages, timed blocks, progress. The only room that prints.

Messages go to standard error, so that standard output stays free for what a command is asked for
(`--print-config`, the demo's report). With `logging.file` every line is written there as well.
"""

import contextlib
import errno
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO, TypeVar

from tqdm import tqdm

from utils.limits import spelt_out

Item = TypeVar("Item")

LEVELS = {"error": logging.ERROR, "info": logging.INFO, "debug": logging.DEBUG}
SILENT = logging.CRITICAL + 1
STOPPED = 75  # the exit code of a run that a signal ended
# tqdm's own lock is one among processes: whoever is killed while holding it would stop the others
tqdm.set_lock(threading.RLock())


def say(text: str = "") -> None:
    """Print on standard output: the answer of a command, not part of the log.

    >>> say("backbone: ./backbone")
    backbone: ./backbone
    """
    print(text, file=sys.stdout, flush=True)  # noqa: T201


def complain(text: str) -> None:
    """Print lines on standard error, where no logger exists yet or any more."""
    lines = "\n".join(spelt_out(line) for line in text.split("\n"))
    print(lines, file=sys.stderr, flush=True)  # noqa: T201


def launched_rank() -> int:
    """The rank torchrun gave this process; 0 where it was started without. Only rank 0 talks."""
    return int(os.environ.get("RANK", "0"))


def duration(seconds: float) -> str:
    """A span of time as people read it.

    >>> duration(0.1234), duration(75.4), duration(7325)
    ('0.12 s', '1 min 15 s', '2 h 02 min')
    """
    if seconds < 59.95:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class _OneLine(logging.Formatter):
    """A record as one line, whatever a file name or an error text brings along."""

    def format(self, record: logging.LogRecord) -> str:
        return spelt_out(super().format(record))


class _BesideBars(logging.StreamHandler):
    """Writes a line without tearing a progress bar that stands on the same terminal."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=self.stream)
        self.flush()


class _ToFile(logging.FileHandler):
    """Writes lines to a file, and does without where the disk is full: that is told elsewhere."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802  logging's name
        """Pass over what logging would print a traceback for."""


class VerbosityLogger:
    """Levelled messages on a stream, teed to a file: `[LEVEL] message`.

    level: error | info | debug. timestamps: put the local time before each line. file: a path whose
    folder is made; lines are appended. silent: say nothing but how the run ends (for ranks other
    than the first).

    >>> log = VerbosityLogger("info", timestamps=False, stream=sys.stdout)
    >>> log.info("36 tiles"); log.debug("tile r000000_c000000")
    [INFO] 36 tiles
    """

    def __init__(
        self,
        level: str = "info",
        timestamps: bool = True,
        file: Path | None = None,
        stream: TextIO | None = None,
        silent: bool = False,
    ) -> None:
        self.stream = stream or sys.stderr
        self.silent = silent
        self._logger = logging.Logger("dinov3seg", SILENT if silent else LEVELS[level])
        self._file: logging.Handler | None = None
        if silent:
            return
        stamp = "%(asctime)s " if timestamps else ""
        line = _OneLine(f"{stamp}[%(levelname)s] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
        self._add(_BesideBars(self.stream), line)
        if file is not None:
            if file.is_fifo():  # opening it would wait for a reader
                raise FileExistsError(errno.EEXIST, "a pipe, no log file", str(file))
            file.parent.mkdir(parents=True, exist_ok=True)
            self._file = _ToFile(file, encoding="utf-8")
            self._add(self._file, line)

    def _add(self, handler: logging.Handler, line: logging.Formatter) -> None:
        handler.setFormatter(line)
        self._logger.addHandler(handler)

    def error(self, message: str) -> None:
        """Say why something failed; shown at every level."""
        self._logger.error("%s", message)

    def fail(self, message: str, error: BaseException) -> None:
        """Say why the run ends: `error: message` on the stream, whatever the level.

        The traceback goes to the file, and at level debug to the stream as well.
        """
        tqdm.write(spelt_out(f"error: {message}"), file=self.stream)
        self.stream.flush()
        self._to_file(logging.ERROR, message)
        for line in "".join(traceback.format_exception(error)).splitlines():
            if self._logger.isEnabledFor(logging.DEBUG):
                self.debug(line)
            else:
                self._to_file(logging.DEBUG, line)

    def _to_file(self, level: int, message: str) -> None:
        if self._file is not None:
            self._file.handle(self._logger.makeRecord("", level, "", 0, message, (), None))

    def warning(self, message: str) -> None:
        """Say what looks wrong but does not stop the run; shown from info on."""
        self._logger.warning("%s", message)

    def info(self, message: str) -> None:
        """Say what the run does and finds."""
        self._logger.info("%s", message)

    def debug(self, message: str) -> None:
        """Say what helps to find a fault."""
        self._logger.debug("%s", message)

    def close(self) -> None:
        """Flush and close the log file."""
        for handler in list(self._logger.handlers):
            self._logger.removeHandler(handler)
            with contextlib.suppress(OSError):  # a full disk, which has been told
                handler.close()

    def progress(
        self,
        items: Iterable[Item],
        label: str,
        total: int | None = None,
        unit: str = "batch",
        every: int = 10,
    ) -> Iterator[Item]:
        """Pass the items on while a bar (on a terminal) or a line every `every` items says how far.

        >>> log = VerbosityLogger("error", stream=sys.stdout)
        >>> sum(log.progress([1, 2, 3], "adding"))
        6
        """
        if total is None and hasattr(items, "__len__"):
            total = len(items)
        if not self._logger.isEnabledFor(logging.INFO):
            yield from items
        elif self.stream.isatty():
            shown = spelt_out(label)
            yield from tqdm(items, shown, total, unit=unit, file=self.stream, leave=False)
        else:
            yield from self._lines(items, label, total, unit, every)

    def _lines(
        self, items: Iterable[Item], label: str, total: int | None, unit: str, every: int
    ) -> Iterator[Item]:
        start = time.monotonic()
        for count, item in enumerate(items, start=1):
            yield item
            if count % every == 0 and count != total:
                rate = count / max(time.monotonic() - start, 1e-9)
                self.info(progress_line(label, count, total, unit, rate))


def progress_line(label: str, count: int, total: int | None, unit: str, rate: float) -> str:
    """How far a loop has come: count, items per second, time left.

    >>> progress_line("prepare", 50, 200, "tile", rate=5.0)
    'prepare: 50/200 tiles, 5.0 tiles/s, 30.0 s left'
    >>> progress_line("prepare", 50, None, "tile", rate=5.0)
    'prepare: 50 tiles, 5.0 tiles/s'
    """
    units = f"{unit}es" if unit.endswith("ch") else f"{unit}s"
    if total is None:
        return f"{label}: {count} {units}, {rate:.1f} {units}/s"
    left = duration((total - count) / rate)
    return f"{label}: {count}/{total} {units}, {rate:.1f} {units}/s, {left} left"


class TimedBlock:
    """Says when a piece of work starts, ends or fails, and how long it took.

    >>> log = VerbosityLogger("info", timestamps=False, stream=sys.stdout)
    >>> with TimedBlock(log, "verify") as block: pass  # doctest: +ELLIPSIS
    [INFO] verify: started
    [INFO] verify: finished in ... s
    """

    def __init__(self, log: VerbosityLogger, label: str) -> None:
        self.log = log
        self.label = label
        self.seconds = 0.0

    def __enter__(self) -> "TimedBlock":
        self._start = time.monotonic()
        self.log.info(f"{self.label}: started")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.seconds = time.monotonic() - self._start
        if error is None:
            self.log.info(f"{self.label}: finished in {duration(self.seconds)}")
        else:
            how = "stopped" if getattr(error, "exit_code", None) == STOPPED else "failed"
            self.log.info(f"{self.label}: {how} after {duration(self.seconds)}")
