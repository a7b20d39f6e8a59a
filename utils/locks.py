"""One run at a time in a folder: the second says who is there, and since when."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from utils.artefacts import sweep, write_artefact
from utils.limits import MEBIBYTE, limited_bytes

LOCK, HOLDER = ".lock", ".lock.json"
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP}  # of file systems that know none


class LockError(Exception):
    """A folder that another run works in."""

    exit_code = 4
    everywhere = True


@contextlib.contextmanager
def alone_in(folder: Path, key: str, make: bool = True) -> Iterator[None]:
    """Hold a folder against other runs; `key` is the setting that names it.

    What killed runs left half written in it is swept. A folder that is missing is made, unless
    `make` is false: then there is nothing to hold. The system frees the lock with the process,
    however that ends. On network file systems that know no locks nothing is held; what is written
    is whole or absent there too.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as name, alone_in(Path(name), "train.weights_dir"):
    ...     sorted(path.name for path in Path(name).iterdir())
    ['.lock', '.lock.json']
    """
    if make:
        folder.mkdir(parents=True, exist_ok=True)
    elif not folder.is_dir():
        yield
        return
    with if_free(folder / LOCK) as free:
        if not free:
            raise LockError(
                f"{folder}: in use by {_holder(folder)}; wait for that run, or name another folder "
                f"({key})"
            )
        sweep(folder)
        told = {"process": os.getpid(), "machine": socket.gethostname(), "since": _now()}
        try:
            write_artefact(folder / HOLDER, json.dumps(told).encode())
            yield
        finally:
            (folder / HOLDER).unlink(missing_ok=True)


@contextlib.contextmanager
def if_free(path: Path) -> Iterator[bool]:
    """Hold a lock file through the block if no other run does, and say whether.

    The lock ends with the process, or there is none: a file instead would outlive what is killed.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     with if_free(Path(folder, ".lock")) as first, if_free(Path(folder, ".lock")) as second:
    ...         first, second
    (True, False)
    """
    lock, free = FileLock(path, fallback_to_soft=False), True
    try:
        lock.acquire(timeout=0)
    except Timeout:
        free = False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield free
    finally:
        lock.release()


def _now() -> str:
    return datetime.now().astimezone().isoformat(" ", "seconds")


def _holder(folder: Path) -> str:
    """Who holds a folder, as far as its note can be read."""
    try:
        told = json.loads(limited_bytes(folder / HOLDER, MEBIBYTE))
        return f"process {told['process']} on {told['machine']} since {told['since']}"
    except (OSError, ValueError, LookupError, TypeError):
        return "another run"
