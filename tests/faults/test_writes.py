"""Every write, rename, sync and removal of each phase fails once; the next run heals it all."""

import contextlib
import errno
import itertools
import json
import os
import random
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import project
import pyogrio.raw
import pytest
import rasterio
import rasterio.shutil
from forked import Child, forked
from pyogrio.errors import DataSourceError
from size import figure, sized
from test_kills import END, Stage, stages

from utils import artefacts
from utils.artefacts import NAME

HOW = ("before", "after", "ENOSPC", "EIO", "EACCES")  # killed before or after, or the system's no
KEYS = {
    "prepare": {"batch_size": 2},
    "train": {"epochs": 1, "batch_size": 2, "ema_decay": 0.9},
    "inference": {"batch_size": 2, "confidence": "sure.tif", "polygons": "map.geojson"},
}


class Disk:
    """Counts what a phase asks of the disk; the call with the number `at` goes wrong.

    calls: a file that the kinds of all calls are written to at the end.
    """

    def __init__(self, at: int = -1, how: str = "") -> None:
        self.at, self.how = at, how
        self.kinds: list[str] = []
        self._numbers = itertools.count()

    def call(
        self, kind: str, do: Callable, *given: Any, error: type = OSError, **named: Any
    ) -> Any:
        """Do what is asked, or fail in its place."""
        number = next(self._numbers)
        self.kinds.append(kind)
        if number != self.at:
            return do(*given, **named)
        if self.how in ("before", "after"):
            with contextlib.suppress(OSError):  # such as the removal of what is not there
                if self.how == "after":
                    do(*given, **named)
            os.kill(os.getpid(), signal.SIGKILL)
        code = getattr(errno, self.how)
        if kind == "write" and code == errno.ENOSPC:
            do(bytes(given[0])[: len(given[0]) // 2])  # what still fits
        raise OSError(code, os.strerror(code)) if error is OSError else error(os.strerror(code))

    def struck(self, kind: str, do: Callable, error: type = OSError) -> Callable:
        """A function that may fail when it is called."""
        return lambda *given, **named: self.call(kind, do, *given, error=error, **named)

    def fit(self) -> None:
        """Put this in the way of everything that this process writes."""
        for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
            setattr(os, name, self.struck(name, getattr(os, name)))
        making = self.struck("create", os.open)
        plain = os.open
        os.open = lambda path, flags, *rest, **named: (
            making if flags & os.O_CREAT else plain)(path, flags, *rest, **named)  # fmt: skip
        artefacts._Told = told_on(self)
        opened = rasterio.open
        rasterio.open = lambda path, mode="r", **named: (
            Raster(self, self.call("raster", opened, path, mode, **named))
            if mode == "w" else opened(path, mode, **named))  # fmt: skip
        rasterio.shutil.copy = self.struck("copy", rasterio.shutil.copy)
        pyogrio.raw.write = self.struck("vectors", pyogrio.raw.write, DataSourceError)
        Path.write_text = self.struck("text", Path.write_text)


def told_on(disk: Disk) -> type:
    """The class of files that artefacts are written through, with a disk that fails under it."""

    class Told(artefacts._Told):
        def write(self, data):
            try:
                return disk.call("write", super().write, data)
            except OSError as error:
                self.trouble = error
                raise

    return Told


class Raster:
    """A raster that is being written, whose writes and whose end may fail."""

    def __init__(self, disk: Disk, dataset: Any) -> None:
        self.__dict__.update(disk=disk, dataset=dataset)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.dataset, name)
        return self.disk.struck(f"raster.{name}", found) if name in ("write", "close") else found

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.dataset, name, value)


@pytest.fixture(scope="module")
def stage(tmp_path_factory) -> Callable[[str], Stage]:
    """A function that gives a small project as it is before a phase."""
    return stages(tmp_path_factory.mktemp("writes"), (100, 130), KEYS, slice(2, 3))


def calls_of(stage: Stage, notes: Path) -> list[str]:
    """The kinds of all calls of a run that is not disturbed."""

    def watched() -> int:
        disk = Disk()
        disk.fit()
        code = stage.run()
        notes.open("w").write(json.dumps(disk.kinds))
        return code

    stage.renew()
    assert forked(watched) == END.get(stage.phase, 0)
    return json.loads(notes.read_text())


def strike(stage: Stage, at: int, how: str) -> tuple[int, str]:
    """A run of which one call goes wrong: its exit code and what it said."""

    def hit() -> int:
        Disk(at, how).fit()
        return stage.run()

    stage.renew()
    child = Child(hit)
    return child.wait(), child.said


def is_temporary(name: str) -> bool:
    """Whether a file is one that was being written, or lies in such a folder or in a journal."""
    return any(NAME.match(part) or part.endswith(".resume") for part in Path(name).parts)


def check_ending(stage: Stage, code: int, said: str, how: str, wanted: dict[str, bytes]) -> None:
    """Killed, or one line and the code of the environment, or none the worse for it."""
    if how in ("before", "after"):
        assert code == -signal.SIGKILL, said
        return
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in said, said
    if code in (0, END.get(stage.phase, 0)):
        assert len(lines) == (code > 0), said
        # what could not be removed is swept by the next run
        left = {name: each for name, each in stage.products().items() if not is_temporary(name)}
        assert left == wanted, said
    else:
        assert code == 4, said
        assert len(lines) == 1, said


@pytest.mark.parametrize("phase", project.PHASES)
def test_whatever_call_fails_the_next_run_ends_like_an_unbroken_one(stage, phase, tmp_path):
    stage = stage(phase)
    kinds = calls_of(stage, tmp_path / "kinds.json")
    wanted = stage.products()
    dice = random.Random(f"writes of {phase}")
    points = [(at, how) for at in range(len(kinds)) for how in HOW]
    points = dice.sample(points, sized(5, len(points)))
    codes: Counter[int] = Counter()
    for at, how in points:
        code, said = strike(stage, at, how)
        place = f"{how} at call {at}, {kinds[at]}"
        try:
            check_ending(stage, code, said, how, wanted)
            assert forked(stage.run) == END.get(phase, 0)
            healed = stage.products()
            odd = {each for each in healed | wanted if healed.get(each) != wanted.get(each)}
            assert odd == set()
            assert not [path for path in stage.work.rglob(".*") if NAME.match(path.name)]
        except AssertionError as error:
            raise AssertionError(f"{place}: {error}") from error
        codes[code] += 1
    assert codes[4] + codes[-signal.SIGKILL] >= len(points) / 3
    told = f"{len(points)} faults among {len(kinds)} calls, in {len(HOW)} ways: all heal"
    figure(f"a write of {phase} fails", f"{told}, {codes[4]} with one line")
