"""Files of ours that certify themselves, but say something else: whole, with right checksums.

One entry at any depth is another value. Nobody can tell a plausible lie; but whatever is said, a
run ends with the exit code of its kind and one line, or goes on, and is never a bug of ours.
"""

import copy
import json
import math
import random
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import project
import pytest
import torch
from forked import Child, forked
from size import figure, sized

from utils.manifest import COPY, MANIFEST, checksum_of

LONGEST = 60  # seconds that a run may take
KNOWN = {0, 2, 3, 4, 5}
ODD = [
    None, True, False, -1, 0, 1, 2, 7, 2**31, 2**63, -(2**40), 10**400, 0.5, -0.5, 1e300, math.nan,
    math.inf, "", "odd", "north", "../../odd", "\ud800", "\n\x1b[2J", [], [1], [[]], ["odd"], {},
    {"odd": 1}, (), torch.zeros(0), torch.zeros(2, 3), torch.ones(1, dtype=torch.int64),
]  # fmt: skip


def places_in(content: Any, path: tuple = ()) -> Iterator[tuple]:
    """The way to every value that nested dicts and lists hold."""
    if isinstance(content, dict):
        inner = list(content.items())
    else:
        inner = list(enumerate(content)) if isinstance(content, list | tuple) else []
    for key, value in inner:
        yield (*path, key)
        yield from places_in(value, (*path, key))


def told_otherwise(content: Any, path: tuple, value: Any) -> Any:
    """A copy with another value at a place."""
    if not path:
        return value
    first, *rest = path
    changed = list(content) if isinstance(content, tuple) else copy.copy(content)
    changed[first] = told_otherwise(content[first], tuple(rest), value)
    return tuple(changed) if isinstance(content, tuple) else changed


def lie_about(content: Any, dice: random.Random) -> tuple[str, Any]:
    """The content with another value, an entry less or one more somewhere; and what it is."""
    tops: dict[Any, list[tuple]] = {}
    for path in places_in(content):
        tops.setdefault(path[0], []).append(path)
    path = dice.choice(tops[dice.choice(sorted(tops, key=str))])  # a tensor more is no more likely
    value = dice.choice(ODD)
    return f"{path}: {value!r}", told_otherwise(content, path, value)


def save_manifest(path: Path, content: dict[str, Any]) -> None:
    told = {key: value for key, value in content.items() if key != "checksum"}
    path.write_text(json.dumps(told | {"checksum": checksum_of(told)}))


def save_weights(path: Path, content: Any) -> None:
    torch.save(content, path)


def liars_of(folder: Path) -> list[tuple[str, Path, Callable, Callable, str]]:
    """The files that lie: what reads and writes each, and the phase that believes it."""
    weights, manifest = folder / "weights", folder / "cache" / MANIFEST
    load = partial(torch.load, weights_only=True)
    return [
        ("state", weights / "linear_last.pth", load, save_weights, "train"),
        ("checkpoint", weights / "linear_best.pth", load, save_weights, "inference"),
        ("manifest", manifest, lambda path: json.loads(path.read_text()), save_manifest, "train"),
        ("manifest", manifest, lambda path: json.loads(path.read_text()), save_manifest, "prepare"),
    ]  # fmt: skip


def make(folder: Path) -> int:
    """A project that was stopped in its training, once it had mapped."""
    keys = {"train": {"epochs": 3, "batch_size": 2}, "inference": {"format": "gtiff"}}
    config = project.write_project(folder, 100, 130, ("north", "south"), **keys)
    assert project.run(config, "logging.level=error", "train.epochs=2") == 0
    assert project.run(config, "train.epochs=3", "train.resume=never", *project.only("train")) == 0
    return 0


def work(folder: Path, first: int, count: int, seed: int, journal: Path) -> int:
    """Lie from number `first` on; the odd ones out are noted."""
    config, liars = folder / "config.yml", liars_of(folder)
    state, spare = folder / "weights" / "linear_last.pth", folder / "cache" / COPY
    kept = {path: path.read_bytes() for _, path, *_ in liars}
    with journal.open("a", encoding="utf-8") as file:
        for number in range(first, count):
            name, path, load, save, phase = liars[number % len(liars)]
            dice = random.Random(f"{seed} {number}")
            for other, content in kept.items():
                other.write_bytes(content)
            try:
                lie, content = lie_about(load(path), dice)
                save(path, content)
            except (TypeError, ValueError, UnicodeError):  # JSON holds no tensor
                continue
            if phase == "train" and name == "manifest":
                state.unlink()
            spare.unlink(missing_ok=True)  # the manifest would be healed by it
            file.write(json.dumps([number, "begun", f"{name}, {phase}: {lie}"]) + "\n")
            file.flush()
            signal.alarm(LONGEST)
            settings = (*project.only(phase), "logging.level=error", "train.epochs=3")
            code = project.run(config, *settings)
            signal.alarm(0)
            file.write(json.dumps([number, code, f"{name}, {phase}: {lie}"]) + "\n")
    return 0


@pytest.fixture(scope="module")
def mapped(tmp_path_factory) -> Path:
    """The project; made in a child: threads that GDAL leaves would be missed by those to come."""
    folder = tmp_path_factory.mktemp("mapped")
    assert forked(partial(make, folder)) == 0
    return folder


def test_a_file_that_lies_is_believed_or_refused_and_no_bug_of_ours(mapped, tmp_path):
    count, journal, seed = sized(24, 4000), tmp_path / "journal", 7
    told: dict[int, tuple[int | str, str]] = {}
    kept = {path: path.read_bytes() for _, path, *_ in liars_of(mapped)}
    code, reached = 1, 0
    while code and reached < count:
        child = Child(partial(work, mapped, reached, count, seed, journal))
        code = child.wait(7200)
        lines = [json.loads(line) for line in journal.read_text(encoding="utf-8").splitlines()]
        told |= {number: (ending, lie) for number, ending, lie in lines}
        last = max(told, default=-1)
        assert not code or last >= reached, child.said  # else it is the test that fails
        reached = last + 1
        for path, content in kept.items():
            path.write_bytes(content)
    wrong = [each for each in told.values() if each[0] not in KNOWN]
    refused = sum(ending != 0 for ending, _ in told.values())
    figure("lies", f"{len(told)} told with right checksums: {refused} refused, {len(wrong)} bugs")
    assert not wrong
    assert refused > len(told) / 3
