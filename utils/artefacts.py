"""Files that are whole or absent, whatever happens while they are written.

Nothing is opened for writing under its final name: a file is made under a temporary name in the
same folder, brought to the disk, and then renamed, which replaces an older one at once or not at
all. A symbolic link at that name is replaced, never followed. What killed processes leave behind is
told by its name, and swept by the next run.
"""

import contextlib
import errno
import io
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO, TypeVar

from utils.direct import DirectFile
from utils.limits import limited_bytes

Read = TypeVar("Read")

NAME = re.compile(
    r"^\..*\.(?P<host>[^.]+)\.(?P<pid>[0-9]+)\.(?P<start>[0-9a-f]{8})[0-9a-f]{8}\.tmp"
)
START = secrets.token_hex(4)  # tells this process from one before it that had its number
LONGEST = 60  # characters of the final name in a temporary one: a file's name may have 255 bytes
FORGOTTEN = 86400.0  # seconds after which another machine's temporary file is taken for left over
WAITS = (0.05, 0.2, 0.8)  # seconds before a read that failed is tried again
PASSING = {  # what may be over soon: a server that is away, too much at once
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "EACCES", "ENOMEM", "ENFILE", "EMFILE", "EINTR", "ETIMEDOUT")
    if hasattr(errno, name)
}


def this_host() -> str:
    """The machine's name as temporary files carry it."""
    return re.sub(r"[^A-Za-z0-9-]", "-", socket.gethostname()) or "host"


def temporary_of(path: Path, suffix: str = "") -> Path:
    """A name beside `path` that no other process uses: hidden, with machine, process and chance.

    >>> bool(NAME.match(temporary_of(Path("maps/north.tif")).name))
    True
    """
    told = f"{this_host()}.{os.getpid()}.{START}{secrets.token_hex(4)}"
    stem = f".{path.name[:LONGEST]}.{told}.tmp"
    return path.with_name(f"{stem}{suffix}")


def write_artefact(
    path: Path, write: bytes | Callable[[BinaryIO], None], direct: bool = False
) -> None:
    """Write a file whole: bytes, or what a function writes into it; its folder is made.

    direct: past the system's page cache, for what is large and not read soon.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_artefact(Path(folder, "cache", "manifest.json"), b"{}")
    ...     [path.name for path in Path(folder, "cache").iterdir()]
    ['manifest.json']
    """
    with replacing(path) as temporary:
        descriptor = _open_new(temporary)
        raw = _Told(DirectFile(descriptor) if direct else io.FileIO(descriptor, "wb"))
        try:
            with io.BufferedWriter(raw) as file:
                if isinstance(write, bytes):
                    file.write(write)
                else:
                    write(file)
        except RuntimeError as error:
            if raw.trouble is None:
                raise
            raise raw.trouble from error


class _Told(io.RawIOBase):
    """A file that keeps what the disk objected to: torch.save makes another error of it."""

    trouble: OSError | None = None

    def __init__(self, file: io.RawIOBase) -> None:
        self._file = file

    def writable(self) -> bool:
        return True

    def write(self, data: memoryview) -> int | None:
        try:
            return self._file.write(data)
        except OSError as error:
            self.trouble = error
            raise

    def close(self) -> None:
        try:
            self._file.close()
        finally:
            super().close()


def _open_new(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        return os.open(path, flags, 0o666)
    except FileNotFoundError:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, flags, 0o666)


@contextlib.contextmanager
def replacing(path: Path, suffix: str = "") -> Iterator[Path]:
    """A temporary path to write a file at; it becomes `path` when the block ends without error.

    What the system objects to is told of `path`, which is what the reader knows.
    """
    require_replaceable(path)
    temporary = temporary_of(path, suffix)
    try:
        yield temporary
        publish(temporary, path)
    except OSError as error:
        if error.filename not in (None, str(temporary)):
            raise
        raise named(error, path) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def require_replaceable(path: Path) -> None:
    """Raise OSError where a path is a device or a pipe: a file would take its place.

    >>> require_replaceable(Path(os.devnull))  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    FileExistsError: [Errno 17] a device or pipe, which no file replaces: ...
    """
    if path.exists() and not (path.is_file() or path.is_dir() or path.is_symlink()):
        raise FileExistsError(errno.EEXIST, "a device or pipe, which no file replaces", str(path))


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name, once its content is on the disk."""
    require_replaceable(path)
    sync(temporary)
    temporary.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL or not path.is_dir():  # some file systems sync no folders
            raise
    finally:
        os.close(descriptor)


def patiently(read: Callable[[], Read], path: Path) -> Read:
    """What a read of a file gives; where it fails in a way that may pass, it is tried again.

    >>> patiently(lambda: b"whole", Path("tile.pt"))
    b'whole'
    """
    for wait in WAITS:
        try:
            return read()
        except MemoryError:
            time.sleep(wait)
        except OSError as error:
            if error.errno not in PASSING:
                raise
            time.sleep(wait)
    try:
        return read()
    except MemoryError as error:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), str(path)) from error
    except OSError as error:
        raise named(error, path) from error


def plain_bytes(path: Path, most: int) -> bytes:
    """A file's bytes, read patiently; ValueError where it is no plain file, or larger than that."""
    return patiently(partial(limited_bytes, path, most), path)


def named(error: OSError, path: Path) -> OSError:
    """An error of the system that says which file it is about.

    >>> named(OSError(errno.EIO, "Input/output error"), Path("tile.pt"))
    OSError(5, 'Input/output error')
    >>> named(OSError(errno.EIO, "Input/output error"), Path("tile.pt")).filename
    'tile.pt'
    """
    if error.errno is None:
        return error
    return OSError(error.errno, os.strerror(error.errno), str(path))


def sweep(folder: Path) -> int:
    """Delete what processes that are gone left half written in a folder; returns how much it was.

    Those of this machine are gone if no process has their number, or if it is ours by now, as in
    containers; of another machine's files we only know their age.
    """
    count = 0
    for path in folder.iterdir() if folder.is_dir() else ():
        found = NAME.match(path.name)
        if found is None or not _left_over(path, found):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        count += 1
    return count


def _left_over(path: Path, name: re.Match[str]) -> bool:
    if name["host"] == this_host():
        pid = int(name["pid"])
        return name["start"] != START if pid == os.getpid() else not is_running(pid)
    with contextlib.suppress(FileNotFoundError):
        return time.time() - path.lstat().st_mtime > FORGOTTEN
    return False


def is_running(pid: int) -> bool:
    """Whether a process of this machine has this number.

    >>> is_running(os.getpid()), is_running(2**22 + 1)
    (True, False)
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
