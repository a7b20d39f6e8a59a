"""Artefacts are whole or absent: names, links, failures, and what killed processes leave."""

import errno
import os
import stat
import subprocess
import sys
import time

import project
import pytest

from utils.artefacts import (
    NAME,
    PASSING,
    WAITS,
    patiently,
    plain_bytes,
    replacing,
    sweep,
    temporary_of,
    this_host,
    write_artefact,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_by_bytes_or_by_what_a_function_writes(tmp_path):
    path = tmp_path / "made" / "here" / "file.bin"
    write_artefact(path, b"old")
    write_artefact(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert names(path.parent) == ["file.bin"]


def test_a_failure_half_way_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.bin"
    write_artefact(path, b"old")

    def fail(file):
        file.write(b"half of the n")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_artefact(path, fail)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_disk_that_fails_at_the_last_moment_leaves_the_old_file(tmp_path, monkeypatch, step):
    path = tmp_path / "file.bin"
    write_artefact(path, b"old")

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(step, fail)
    with pytest.raises(OSError, match="Input/output"):
        write_artefact(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_content_reaches_the_disk_before_the_name_and_the_name_before_we_go_on(
    tmp_path, monkeypatch
):
    events, fsync, replace = [], os.fsync, type(tmp_path).replace

    def noted_fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def noted_replace(self, target):
        events.append("name")
        return replace(self, target)

    monkeypatch.setattr("os.fsync", noted_fsync)
    monkeypatch.setattr(type(tmp_path), "replace", noted_replace)
    write_artefact(tmp_path / "file.bin", b"x")
    assert events == ["file", "name", "folder"]


def test_a_link_at_the_final_name_is_replaced_and_its_target_left_alone(tmp_path):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    path = tmp_path / "file.bin"
    path.symlink_to(victim)
    write_artefact(path, b"ours")
    assert victim.read_bytes() == b"precious"
    assert (path.is_symlink(), path.read_bytes()) == (False, b"ours")


def test_a_link_at_the_temporary_name_is_never_written_through(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_bytes(b"precious")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    temporary_of(tmp_path / "file.bin").symlink_to(victim)
    with pytest.raises(FileExistsError):
        write_artefact(tmp_path / "file.bin", b"ours")
    assert victim.read_bytes() == b"precious"


def test_names_of_any_length_and_host_fit_and_are_told_again(tmp_path, monkeypatch):
    for host in ("gpu-1.cluster.example", "rechner ü", ""):
        monkeypatch.setattr("socket.gethostname", lambda host=host: host)
        path = tmp_path / ("ä" * 120 + ".tif")
        write_artefact(path, b"x")
        assert NAME.match(temporary_of(path).name)["host"] == this_host()
        assert len(os.fsencode(temporary_of(path, ".gpkg").name)) <= 255


def test_a_file_written_by_a_library_gets_its_name_when_the_block_ends(tmp_path):
    path = tmp_path / "map.gpkg"
    with replacing(path, ".gpkg") as temporary:
        assert temporary.suffix == ".gpkg"
        temporary.write_bytes(b"x")
        assert not path.exists()
    assert names(tmp_path) == ["map.gpkg"]


KILLED = """
import os, sys
from pathlib import Path
from utils.artefacts import temporary_of, write_artefact
temporary_of(Path(sys.argv[1], "folder")).mkdir()
write_artefact(Path(sys.argv[1], "file.bin"), lambda file: os.kill(os.getpid(), 9))
"""


def test_what_a_killed_process_left_is_swept_and_nothing_else(tmp_path):
    keep = [".hidden", "file.tmp", ".notes.tmp", "tile.pt", ".a.b.12.tmp"]
    for name in keep:
        (tmp_path / name).write_bytes(b"x")
    ours = temporary_of(tmp_path / "being-written")
    ours.write_bytes(b"x")
    command = [sys.executable, "-c", KILLED, tmp_path]
    subprocess.run(command, env=project.surroundings(), check=False)
    assert len(names(tmp_path)) == len(keep) + 3
    assert sweep(tmp_path) == 2
    assert names(tmp_path) == sorted([*keep, ours.name])


def test_another_machines_file_is_swept_when_it_is_a_day_old(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    path = temporary_of(tmp_path / "file.bin")
    monkeypatch.undo()
    path.write_bytes(b"x")
    assert sweep(tmp_path) == 0
    before = time.time() - 25 * 3600
    os.utime(path, (before, before))
    assert sweep(tmp_path) == 1
    assert sweep(tmp_path / "no-such-folder") == 0


# Reads that fail


def failing(error, times):
    """A read that fails a number of times; how often it was tried is its length."""
    tries = []

    def read():
        tries.append(1)
        if len(tries) <= times:
            raise error
        return b"whole"

    return read, tries


@pytest.mark.parametrize("code", [*sorted(PASSING), None])
def test_what_may_pass_is_tried_again_a_few_times_and_then_told(tmp_path, monkeypatch, code):
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    error = MemoryError() if code is None else OSError(code, os.strerror(code))
    read, tries = failing(error, len(WAITS))
    assert patiently(read, tmp_path / "tile.pt") == b"whole"
    assert waited == list(WAITS) == sorted(WAITS)
    read, tries = failing(error, 99)
    with pytest.raises(OSError, match="tile.pt") as caught:
        patiently(read, tmp_path / "tile.pt")
    assert caught.value.errno == (code or errno.ENOMEM)
    assert len(tries) == len(WAITS) + 1


@pytest.mark.parametrize("error", [FileNotFoundError(2, "none"), IsADirectoryError(21, "folder")])
def test_what_will_not_pass_is_told_at_once(tmp_path, error):
    read, tries = failing(error, 99)
    with pytest.raises(type(error)):
        patiently(read, tmp_path / "tile.pt")
    assert len(tries) == 1


def test_what_a_disk_objected_to_is_told_of_the_files_own_name(tmp_path):
    """torch.save makes an error of its own of it."""
    path = tmp_path / "tile.pt"

    def write(file):
        file.raw.trouble = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise RuntimeError("unexpected pos 960 vs 854")

    with pytest.raises(OSError, match="No space left") as caught:
        write_artefact(path, write)
    assert caught.value.filename == str(path)
    with pytest.raises(RuntimeError, match="a bug"):
        write_artefact(path, lambda _: (_ for _ in ()).throw(RuntimeError("a bug")))
    assert names(tmp_path) == []


def test_a_file_that_is_too_large_or_none_is_not_read(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"four")
    assert plain_bytes(path, 4) == b"four"
    with pytest.raises(ValueError, match="larger than 3 bytes"):
        plain_bytes(path, 3)
    with pytest.raises(ValueError, match="not a plain file"):
        plain_bytes(tmp_path, 99)
