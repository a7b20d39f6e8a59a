"""Archives as torch.save writes them: read without running code, and whole before they are used."""

import io
import pickle
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.artefacts import plain_bytes
from utils.limits import MEBIBYTE

FOLDER = 0x10  # among a zip member's attributes
LARGEST = 4096 * MEBIBYTE  # of a file of weights
# what torch and zipfile raise on bytes that are not what torch.save wrote
DAMAGE = (
    pickle.UnpicklingError, zipfile.BadZipFile, zlib.error, struct.error, EOFError, LookupError,
    ValueError, TypeError, AttributeError, ArithmeticError, AssertionError, RuntimeError,
)  # fmt: skip


def check_members(archive: zipfile.ZipFile, size: int) -> None:
    """Raise ValueError where a zip of so many bytes holds more than that, or what is compressed.

    torch.save and numpy.savez store as it is: anything else is foreign, and may swell.
    """
    members = archive.infolist()
    if any(each.compress_type != zipfile.ZIP_STORED or each.flag_bits & 1 for each in members):
        raise ValueError("holds compressed or encrypted members")
    if any(each.external_attr & FOLDER for each in members):
        raise ValueError("a member is marked as a folder, of which torch reads no bytes")
    if sum(max(each.file_size, each.compress_size) for each in members) > size:
        raise ValueError("its members claim more bytes than the file has")


def checked_zip(stored: bytes) -> io.BytesIO:
    """A zip archive's bytes (torch.save writes one) as a file, after every member met its checksum.

    Raises what zipfile raises on damage, and ValueError where a checksum is wrong.
    """
    file = io.BytesIO(stored)
    with zipfile.ZipFile(file) as archive:
        check_members(archive, len(stored))
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"checksum of {broken} is wrong")
    file.seek(0)
    return file


def load_plain(path: Path) -> Any:
    """What torch.save wrote to a file of weights, once every byte met its checksum.

    Raises ValueError with the reason where it cannot be had, OSError where the read fails.
    """
    try:
        stored = plain_bytes(path, LARGEST)  # what fails from here on is the content's fault
        content = torch.load(checked_zip(stored), map_location="cpu", weights_only=True)
        check_whole(content)
    except DAMAGE as error:
        raise ValueError(reason_of(error, path)) from error
    return content


def reason_of(error: Exception, path: Path) -> str:
    """Why content cannot be loaded, in a line; torch tells a want of memory in words only.

    >>> reason_of(ValueError("checksum of data/0 is wrong"), Path("tile.pt"))
    'checksum of data/0 is wrong'
    """
    reason = str(error).partition("\n")[0]
    if "allocate memory" in reason:
        raise MemoryError(f"{path}: {reason}") from error
    return reason[:120]


def check_whole(content: Any) -> None:
    """Raise ValueError where a tensor has more values than its memory, as an expanded one has, or
    no memory at all.

    >>> check_whole({"weight": [torch.zeros(1).expand(9, 9)]})
    Traceback (most recent call last):
    ValueError: a tensor of 81 values is stored as 1
    """
    if isinstance(content, Tensor):
        if content.is_meta:
            raise ValueError("a tensor has no values")
        stored = content.untyped_storage().nbytes() // content.element_size()
        if content.numel() > stored:
            raise ValueError(f"a tensor of {content.numel()} values is stored as {stored}")
    elif isinstance(content, Mapping):
        check_whole(list(content.values()))
    elif isinstance(content, list | tuple):
        for each in content:
            check_whole(each)
