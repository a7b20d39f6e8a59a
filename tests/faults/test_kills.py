"""kill -9 at random moments of each phase; the same command again ends like an unbroken run."""

import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import project
import pytest
from bits import content_of
from forked import LONGEST, Child, forked, left_of
from size import figure, sized

from utils.artefacts import NAME

KEYS = {
    "model": {"head": "unet"},
    "prepare": {"batch_size": 2},
    "verify": {"workers": 2},
    "train": {"batch_size": 2, "epochs": 2, "checkpoint_minutes": 1e-9, "ema_decay": 0.9},
    "inference": {
        "batch_size": 2, "tta": {"horizontal_flip": True},
        "input_tif": ["unseen.tif", "scenes"], "output_tif": "maps", "confidence": "sure",
    },
}
END = {"verify": 3}  # the exit code of a phase that finds bad tiles and may not make them again
OWN = {  # of each run: times, the process's number
    "run.log", "status.json", ".status.lock", ".lock", ".lock.json",
}  # fmt: skip


class Stage:
    """A project just before a phase; every run of it is made in one and the same folder."""

    def __init__(self, kept: Path, work: Path, phase: str) -> None:
        self.kept, self.work, self.phase = kept, work, phase

    def renew(self) -> None:
        """Bring the project to where the phase begins."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.copytree(self.kept, self.work)

    def run(self) -> int:
        """Run the phase alone."""
        return project.run(self.work / "config.yml", *project.only(self.phase))

    def products(self) -> dict[str, bytes]:
        """Every file of the project but what is each run's own."""
        paths = (path for path in self.work.rglob("*") if path.is_file() and path.name not in OWN)
        return {str(path.relative_to(self.work)): content_of(path) for path in paths}


def stages(
    root: Path, size: tuple[int, int], keys: dict[str, Any], cut: slice
) -> Callable[[str], Stage]:
    """The project before each phase.

    Before verify some of the cache's tiles are cut short; before inference there are older maps,
    made with another setting.
    """
    work = root / "work"
    config = project.write_project(work, *size, **keys)
    for phase in project.PHASES:
        if phase == "inference":
            assert project.run(config, *project.only(phase), "inference.blend=linear") == 0
        shutil.copytree(work, root / phase)
        if phase == "verify":
            for path in sorted((root / phase / "cache").glob("*.pt"))[cut]:
                path.write_bytes(path.read_bytes()[:-600])
        assert phase == "verify" or project.run(config, *project.only(phase)) == 0
    return lambda phase: Stage(root / phase, work, phase)


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Callable[[str], Stage]:
    """A function that gives the project as it is before a phase."""
    return stages(tmp_path_factory.mktemp("kills"), (190, 250), KEYS, slice(None, None, 3))


def wait_for(child: Child, phase: str) -> None:
    """Wait until a child says that a phase began."""
    deadline = time.monotonic() + LONGEST
    while f"{phase}: started" not in child.said:
        assert child.code is None and time.monotonic() < deadline, child.said
        time.sleep(0.001)


def seconds_of(child: Child, phase: str) -> float:
    """How long a child that is not disturbed takes for the phase."""
    wait_for(child, phase)
    start = time.monotonic()
    assert child.wait() == END.get(phase, 0), child.said
    return time.monotonic() - start


def killed_inside(stage: Stage, after: float) -> bool:
    """Start the phase in a child, kill it so many seconds into it; whether it was not over yet."""
    child = Child(stage.run)
    wait_for(child, stage.phase)
    time.sleep(after)
    child.kill()
    code = child.wait()
    assert code in (END.get(stage.phase, 0), -9), child.said
    deadline = time.monotonic() + 10
    while left_of(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left_of(child.pid) == []
    return code == -9 and f"{stage.phase}: f" not in child.said  # finished or failed


@pytest.mark.parametrize("phase", project.PHASES)
def test_a_killed_phase_run_again_leaves_what_an_unbroken_one_leaves(stage, phase):
    stage, count = stage(phase), sized(5, 100)
    stage.renew()
    whole = seconds_of(Child(stage.run), phase)
    wanted = stage.products()
    before = {str(path.relative_to(stage.kept)) for path in stage.kept.rglob("*")}
    made = {name for name in wanted if name not in before}
    assert made or phase in ("verify", "inference")
    dice, inside = random.Random(f"kill -9 in {phase}"), 0
    for _ in range(count):
        stage.renew()
        inside += killed_inside(stage, dice.uniform(0, 0.8 * whole))
        assert forked(stage.run) == END.get(phase, 0)
        assert stage.products() == wanted
        assert not [path for path in stage.work.rglob(".*") if NAME.match(path.name)]
        assert not list(stage.work.rglob(".lock.json"))
    assert inside >= sized(1, count // 4)
    figure(f"kill -9 in {phase}", f"{count}, {inside} of them inside the phase: all equal")
