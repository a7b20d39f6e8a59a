"""Two runs in one folder: the second ends at once, says who is there, and changes nothing."""

import errno
import os
import subprocess
import sys

import project
import pytest
from filelock import FileLock

from utils.artefacts import temporary_of, this_host
from utils.locks import HOLDER, NO_LOCKS, LockError, alone_in, if_free

HOLD = """
import sys
from pathlib import Path
from utils.locks import alone_in
with alone_in(Path(sys.argv[1]), "train.weights_dir"):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def held(tmp_path):
    """A function that has another process hold a folder; returns that process."""
    others = []

    def hold(folder):
        command = [sys.executable, "-c", HOLD, str(folder)]
        other = subprocess.Popen(
            command, env=project.surroundings(), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        others.append(other)
        assert other.stdout.readline() == b"held\n"
        return other

    yield hold
    for other in others:
        other.kill()
        other.communicate()


def test_a_folder_in_use_is_refused_with_its_holder_and_the_key(tmp_path, held):
    other = held(tmp_path)
    said = rf"in use by process {other.pid} on .+ since \d{{4}}-\d\d-\d\d .*\(train\.weights_dir\)$"
    with pytest.raises(LockError, match=said), alone_in(tmp_path, "train.weights_dir"):
        pass


def test_a_lock_ends_with_its_process_however_that_ends(tmp_path, held):
    other = held(tmp_path)
    other.kill()
    other.wait()
    with alone_in(tmp_path, "train.weights_dir"):
        assert (tmp_path / HOLDER).exists()
    assert not (tmp_path / HOLDER).exists()


def test_what_a_killed_run_left_half_written_is_swept(tmp_path):
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"],
                          capture_output=True, text=True, check=True).stdout.strip()  # fmt: skip
    left = tmp_path / f".splits.geojson.{this_host()}.{gone}.0badc0de0badc0de.tmp"
    before = tmp_path / f".splits.geojson.{this_host()}.{os.getpid()}.0badc0de0badc0de.tmp"
    ours = temporary_of(tmp_path / "splits.geojson")
    for path in (left, before, ours):
        path.write_text("half")
    with alone_in(tmp_path, "key"):
        assert not left.exists()
        assert not before.exists()  # of a process that had our number, as in a container
        assert ours.exists()


def test_a_damaged_note_is_no_obstacle(tmp_path, held):
    held(tmp_path)
    (tmp_path / HOLDER).write_text("{")
    with pytest.raises(LockError, match="in use by another run"), alone_in(tmp_path, "key"):
        pass


@pytest.mark.parametrize("number", sorted(NO_LOCKS))
def test_where_the_file_system_knows_no_locks_a_run_goes_on(tmp_path, monkeypatch, number):
    def refuse(self, **_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with alone_in(tmp_path, "train.weights_dir"), if_free(tmp_path / ".status.lock") as free:
        assert free and (tmp_path / HOLDER).exists()


def test_another_objection_of_the_system_is_not_passed_over(tmp_path, monkeypatch):
    def refuse(self, **_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(FileLock, "acquire", refuse)
    with pytest.raises(PermissionError), alone_in(tmp_path, "train.weights_dir"):
        pass
    with pytest.raises(PermissionError), if_free(tmp_path / ".status.lock"):
        pass


@pytest.mark.parametrize(
    ("folder", "key", "off"),
    [
        ("cache", "prepare.processed_dir", ("train", "inference")),
        ("weights", "train.weights_dir", ("prepare", "verify", "inference")),
    ],
)
def test_a_run_in_a_folder_in_use_ends_with_4_and_one_line(
    tmp_path, held, capsys, folder, key, off
):
    config = project.write_project(tmp_path, 130, 140)
    if folder == "weights":
        assert project.run(config, "train.enable=false", "inference.enable=false") == 0
    held(tmp_path / folder)
    capsys.readouterr()
    assert project.run(config, *(f"{phase}.enable=false" for phase in off)) == 4
    lines = [line for line in capsys.readouterr().err.splitlines() if "in use by process" in line]
    assert len(lines) == 1
    assert lines[0].endswith(f"({key})")
    assert not list((tmp_path / folder).glob("*.*t*h"))
