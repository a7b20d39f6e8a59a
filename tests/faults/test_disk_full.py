"""A full disk at random moments of each phase: one line, nothing harmed, and the next run heals."""

import errno
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import project
import pytest
from forked import Child, forked
from size import figure, sized
from test_kills import Stage

from utils.artefacts import NAME
from utils.cache import check_tile, tile_names, tile_path
from utils.manifest import read_manifest

PHASES = ("prepare", "train", "inference")
LOG = 1 << 13  # bytes that the log and the terminal of a run stay below
KEYS = {
    "train": {"epochs": 2, "batch_size": 2},
    "inference": {"probabilities": "shares.tif", "confidence": "sure.tif", "polygons": "map.gpkg"},
    "logging": {"level": "error"},
}


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Callable[[str], Stage]:
    """A function that gives a project as it is before a phase; its map is of some blocks."""
    root = tmp_path_factory.mktemp("full")
    work = root / "work"
    config = project.write_project(work, 130, 190, **KEYS)
    image, _ = project.land(600, 700, seed=3)
    project.write_scene(work / "unseen.tif", image, project.grid(600, 700, south=5000))
    for phase in PHASES:
        shutil.copytree(work, root / phase)
        assert project.run(config, *project.only(phase)) == 0
    shutil.rmtree(work)
    return lambda phase: Stage(root / phase, work, phase)


def results(stage: Stage) -> dict[str, bytes]:
    """What a run leaves, but for a GeoPackage's bytes, which hold the time."""
    return {
        name: b"" if name.endswith(".gpkg") else content
        for name, content in stage.products().items()
    }


def check_full(code: int, said: str) -> None:
    """One line, and the code of the environment."""
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert (code, len(lines)) == (4, 1), said
    assert "Traceback" not in said
    assert "Logging error" not in said


def check_whole(stage: Stage, before: dict[str, bytes]) -> None:
    """What was there before is as it was; what came is whole."""
    now = results(stage)
    assert {name for name in before if now.get(name) != before[name]} <= {"cache/manifest.json"}
    if (stage.work / "cache" / "manifest.json").exists():
        made = read_manifest(stage.work / "cache")
        for name in tile_names(stage.work / "cache", made):
            check_tile(tile_path(stage.work / "cache", name), made)


def check_healed(stage: Stage, wanted: dict[str, bytes]) -> None:
    """A run with room again ends like one that never lacked it."""
    assert forked(stage.run) == 0
    found = results(stage)
    assert {name for name in found | wanted if found.get(name) != wanted.get(name)} == set()
    assert not [path for path in stage.work.rglob(".*") if NAME.match(path.name)]


def largest_made(stage: Stage) -> int:
    """Bytes of the largest file that a phase leaves."""
    made = [path for path in stage.work.rglob("*")
            if path.is_file() and not (stage.kept / path.relative_to(stage.work)).exists()]
    return max(path.stat().st_size for path in made)  # fmt: skip


@pytest.mark.parametrize("phase", PHASES)
def test_a_file_that_may_not_grow_further_ends_a_phase_in_one_line(stage, phase):
    stage, count = stage(phase), sized(3, 20)
    stage.renew()
    before = results(stage)
    assert forked(stage.run) == 0
    wanted, most = results(stage), largest_made(stage)
    assert most > 2 * LOG
    dice = random.Random(f"limits of {phase}")
    for _ in range(count):
        limit = dice.randrange(LOG, most)

        def limited(limit: int = limit) -> int:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            return stage.run()

        stage.renew()
        child = Child(limited)
        check_full(child.wait(), child.said)
        check_whole(stage, before)
        check_healed(stage, wanted)
    figure(f"disk full in {phase} (RLIMIT_FSIZE)", f"{count} limits: exit 4, one line, all heal")


def filled_by_others(stage: Stage) -> int:
    """A run that finds room enough at its start, which is gone by the time it is needed."""
    shutil.disk_usage = lambda _: SimpleNamespace(free=10**12)
    return stage.run()


def mounted(folder: Path, size: int) -> bool:
    """Mount, or make larger or smaller, a file system in memory; whether that is permitted."""
    told = f"size={size}" + (",remount" if folder.is_mount() else "")
    command = ["mount", "-t", "tmpfs", "-o", told, "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path):
    """A folder with a file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0 or shutil.which("mount") is None or not mounted(folder, 1 << 26):
        pytest.skip("a tmpfs may not be mounted here: that takes root and CAP_SYS_ADMIN")
    yield folder
    subprocess.run(["umount", str(folder)], check=False)


@pytest.mark.parametrize("phase", PHASES)
def test_a_disk_that_is_full_ends_a_phase_in_one_line(stage, phase, small_disk):
    given, count = stage(phase), sized(1, 20)
    stage = Stage(given.kept, small_disk / "work", phase)
    stage.renew()
    before, used = results(stage), shutil.disk_usage(small_disk).used
    assert forked(stage.run) == 0
    wanted, after = results(stage), shutil.disk_usage(small_disk).used
    dice = random.Random(f"disk of {phase}")
    for number in range(count):
        assert mounted(small_disk, 1 << 26)
        stage.renew()
        size = dice.randrange(used + 2 * LOG, after - LOG)
        assert mounted(small_disk, size)
        child = Child(stage.run if number % 2 else partial(filled_by_others, stage))
        check_full(child.wait(), child.said)
        check_whole(stage, before)
        assert mounted(small_disk, 1 << 26)
        check_healed(stage, wanted)
    figure(f"disk full in {phase} (tmpfs)", f"{count} sizes: exit 4, one line, all heal")


def test_a_file_that_is_too_large_is_a_full_disk():
    """EFBIG is what a limit or an old file system says in the place of ENOSPC."""
    from utils.process import exit_code_of

    for code in (errno.EFBIG, errno.ENOSPC, errno.EDQUOT):
        assert exit_code_of(OSError(code, os.strerror(code))) == 4
