"""Room on the disk: what a phase is about to write, compared with what is free."""

import contextlib
import shutil
import stat
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class SpaceError(Exception):
    """Less room on a disk than what is to be written there."""

    exit_code = 4


class Need(NamedTuple):
    """Bytes that will be written in a folder, and the setting that names it."""

    folder: Path
    key: str
    size: int


def nearest(folder: Path) -> Path:
    """A folder, or the one above it that exists where it is yet to be made.

    >>> nearest(Path("no", "such", "folder")).as_posix()
    '.'
    """
    while not folder.exists():
        folder = folder.parent
    return folder


def free_at(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(nearest(folder)).free


def require_space(needs: Sequence[Need], what: str) -> None:
    """Raise SpaceError where a disk has less room than all that is to be written on it.

    >>> require_space([Need(Path("."), "paths.processed_dir", 0)], "0 tiles")
    """
    by_disk: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        by_disk[nearest(need.folder).stat().st_dev].append(need)
    for group in by_disk.values():
        needed, free = sum(need.size for need in group), free_at(group[0].folder)
        if needed > free:
            keys = ", ".join(dict.fromkeys(need.key for need in group))
            raise SpaceError(
                f"{group[0].folder}: {what} need up to {size_text(needed)}, {size_text(free)} are "
                f"free; make room, or name a folder on another disk ({keys})"
            )


def size_text(size: int) -> str:
    """Bytes as people read them.

    >>> size_text(900), size_text(9_437_184), size_text(5 * 10**12)
    ('900 bytes', '9.4 MB', '5.0 TB')
    """
    for unit, name in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def bytes_below(folder: Path) -> int:
    """Bytes of the files in a folder, where another run may be at work; 0 where there is none."""
    total = 0
    for path in folder.glob("*"):
        with contextlib.suppress(FileNotFoundError):  # renamed since it was listed
            found = path.stat()
            total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total
