"""Files that go straight to the disk, past the system's page cache.

A cache of tiles is written once, is often larger than the machine's memory and is read only when
all of it is there. Through the page cache each file would cost a copy into pages made anew, and
drive out what is in use. Linux's O_DIRECT spares that, where whole blocks are written from memory
that begins at a block (open(2), "O_DIRECT").
"""

import contextlib
import errno
import io
import os
from fcntl import F_GETFL, F_SETFL, fcntl

import numpy as np

O_DIRECT = getattr(os, "O_DIRECT", 0)  # macOS has none
BLOCK = 4096  # bytes: file systems want multiples of 512 or of this
REFUSED = {errno.EINVAL, errno.EOPNOTSUPP}  # says who has no direct writes
ROOM = 8 << 20  # bytes that are gathered before they are written


class DirectFile(io.RawIOBase):
    """A file open for writing, from its beginning, whose bytes are gathered and written as blocks.

    descriptor: of the open file; closed with this. A file system that has no direct writes, or
    wants larger blocks, gets ordinary ones. Raises OSError like any file, at the latest in close().

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     name = os.path.join(folder, "tile.pt")
    ...     with DirectFile(os.open(name, os.O_WRONLY | os.O_CREAT)) as file:
    ...         count = [file.write(bytes(size)) for size in (100, 4 * 512**2, 3 * 2**20)]
    ...     os.path.getsize(name) == sum(count) == 100 + 4 * 512**2 + 3 * 2**20
    True
    """

    def __init__(self, descriptor: int) -> None:
        self._held = self._size = 0
        self._disk = io.FileIO(descriptor, "wb")
        room = np.empty(ROOM + BLOCK, np.uint8)
        first = -room.ctypes.data % BLOCK
        self._room = room[first : first + ROOM]
        self._set_direct(on=True)

    def _set_direct(self, on: bool) -> bool:
        """Set how the file is written; returns whether that is another way than before."""
        if not O_DIRECT:
            return False
        flags = fcntl(self._disk, F_GETFL)
        wanted = flags | O_DIRECT if on else flags & ~O_DIRECT
        with contextlib.suppress(OSError):
            fcntl(self._disk, F_SETFL, wanted)
        return fcntl(self._disk, F_GETFL) != flags

    def writable(self) -> bool:
        return True

    def write(self, data: bytes | memoryview) -> int:
        """Take all of the data; what fills the room is written."""
        rest = taken = np.frombuffer(data, np.uint8)
        while len(rest):
            part = rest[: ROOM - self._held]
            self._room[self._held : self._held + len(part)] = part
            self._held += len(part)
            rest = rest[len(part) :]
            if self._held == ROOM:
                self._drain(ROOM)
        self._size += len(taken)
        return len(taken)

    def _drain(self, size: int) -> None:
        """Write so many bytes of the room; it is empty then, also after an error."""
        self._held = 0
        rest = memoryview(self._room[:size])
        while rest:
            try:
                rest = rest[self._disk.write(rest) :]
            except OSError as error:
                if error.errno not in REFUSED or not self._set_direct(on=False):
                    raise

    def close(self) -> None:
        """Write what is left, filled up to a block, and cut the file to its size."""
        if self.closed:
            return
        try:
            if self._held:
                whole = -(-self._held // BLOCK) * BLOCK
                self._drain(whole)
                self._disk.truncate(self._size)
        finally:
            self._disk.close()
            super().close()
