"""Files written past the page cache: the same bytes, whatever pieces and disk they meet."""

import errno
import io
import mmap
import os
import random
import re
from fcntl import F_GETFL, F_SETFL, fcntl

import pytest
import torch

from utils import direct
from utils.artefacts import write_artefact
from utils.cache import tile_path, write_tile
from utils.direct import BLOCK, O_DIRECT, DirectFile

ROOM = 4 * BLOCK
SIZES = [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, ROOM - 1, ROOM, ROOM + 1, 3 * ROOM, 3 * ROOM + 777]


@pytest.fixture(autouse=True)
def small_room(monkeypatch):
    monkeypatch.setattr(direct, "ROOM", ROOM)


def opened(path):
    return DirectFile(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL))


def pieces(size, seed):
    """Random bytes, cut at random."""
    dice = random.Random(seed)
    cuts = sorted(dice.randint(0, size) for _ in range(dice.randint(0, 9)))
    whole = dice.randbytes(size)
    return [whole[start:end] for start, end in zip([0, *cuts], [*cuts, size], strict=True)]


def is_in_memory(path):
    """Whether the system holds a file's first byte, which it then gives without the disk."""
    with path.open("rb") as file:
        try:
            return bool(os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT))
        except BlockingIOError:
            return False


def require_direct_writes(folder):
    """Skip where files are held in memory whatever is asked for, or nothing tells."""
    ordinary, plain = folder / "ordinary", folder / "plain"
    ordinary.write_bytes(bytes(BLOCK))
    try:
        descriptor = os.open(plain, os.O_WRONLY | os.O_CREAT | O_DIRECT)
        os.write(descriptor, mmap.mmap(-1, BLOCK))
        os.close(descriptor)
        told = is_in_memory(ordinary) and not is_in_memory(plain)
    except (OSError, AttributeError):
        told = False
    if not told:
        pytest.skip("no direct writes here, or nothing that tells what is held in memory")


@pytest.fixture
def disk(monkeypatch):
    """A disk that does something else, `do`, for the write with the number `at`."""

    class Disk(io.FileIO):
        at, do = -1, None
        writes = 0

        def write(self, data):
            self.writes += 1
            assert len(data) % BLOCK == 0 or self.writes > self.at > 0
            return self.do(data) if self.writes == self.at else super().write(data)

    monkeypatch.setattr("io.FileIO", Disk)
    return Disk


def fails(code):
    def do(self, data):
        raise OSError(code, os.strerror(code))

    return do


def takes(size):
    """Write but a part, as a disk does that is nearly full: not always whole blocks."""

    def do(self, data):
        flags = fcntl(self, F_GETFL)
        fcntl(self, F_SETFL, flags & ~O_DIRECT)
        count = os.write(self.fileno(), data[:size])
        fcntl(self, F_SETFL, flags)
        return count

    return do


@pytest.mark.parametrize("size", SIZES)
def test_a_file_has_the_bytes_given_however_they_are_cut(tmp_path, size):
    for seed in range(20):
        path, parts = tmp_path / f"{seed}.pt", pieces(size, seed)
        with opened(path) as file:
            assert [file.write(part) for part in parts] == [len(part) for part in parts]
        assert path.read_bytes() == b"".join(parts)


def test_what_is_written_directly_is_not_held_in_memory(tmp_path):
    require_direct_writes(tmp_path)
    path = tmp_path / "tile.pt"
    write_artefact(path, lambda file: file.write(bytes(ROOM + 1)), direct=True)
    assert not is_in_memory(path)
    assert path.read_bytes() == bytes(ROOM + 1)
    write_tile(tmp_path, "tile", torch.zeros(3, 64, 64), torch.zeros(64, 64))
    assert not is_in_memory(tile_path(tmp_path, "tile"))


def test_a_file_system_without_direct_writes_gets_ordinary_ones(tmp_path, monkeypatch):
    def refuse(file, command, *flags):
        if command == F_SETFL:
            raise OSError(errno.EINVAL, "Invalid argument")
        return fcntl(file, command, *flags)

    monkeypatch.setattr(direct, "fcntl", refuse)
    check_written(tmp_path / "tile.pt")
    monkeypatch.setattr(direct, "O_DIRECT", 0)
    check_written(tmp_path / "other.pt")


@pytest.mark.skipif(not O_DIRECT, reason="this system has no direct writes")
@pytest.mark.parametrize("at", [1, 3, 4])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_a_direct_write_gets_ordinary_ones(tmp_path, disk, at, code):
    disk.at, disk.do = at, fails(code)
    check_written(tmp_path / "tile.pt")


@pytest.mark.parametrize(("at", "size"), [(1, BLOCK), (2, 1000), (4, 1)])
def test_a_disk_that_takes_a_part_is_given_the_rest(tmp_path, disk, at, size):
    disk.at, disk.do = at, takes(size)
    check_written(tmp_path / "tile.pt")


def check_written(path):
    """Three rooms full, and a fourth write of what is left."""
    parts = pieces(3 * ROOM + 777, seed=1)
    with opened(path) as file:
        for part in parts:
            file.write(part)
    assert path.read_bytes() == b"".join(parts)


@pytest.mark.parametrize("at", [1, 4])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_what_the_disk_objects_to_is_told_and_the_file_closed(tmp_path, disk, at, code):
    disk.at, disk.do = at, fails(code)
    file = opened(tmp_path / "tile.pt")
    with pytest.raises(OSError, match=re.escape(os.strerror(code))), file:
        for part in pieces(3 * ROOM + 777, seed=1):
            file.write(part)
    assert file.closed
    assert file._disk.closed


@pytest.mark.parametrize("at", [1, 2])
def test_a_full_disk_under_torch_is_told_of_the_files_own_name(tmp_path, disk, at):
    """The first write is within torch.save, which makes an error of its own of it."""
    disk.at, disk.do = at, fails(errno.ENOSPC)
    path = tmp_path / "tile.pt"
    tensor = torch.zeros(ROOM, dtype=torch.uint8)
    with pytest.raises(OSError, match="No space left") as caught:
        write_artefact(path, lambda file: torch.save(tensor, file), direct=True)
    assert caught.value.filename == str(path)
    assert not list(tmp_path.iterdir())
