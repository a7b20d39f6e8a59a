"""Which tiles train and which validate: by lists, or by contiguous runs of tiles.

Tiles are known by name, `SCENE__rROW_cCOL`; a list may name tiles or whole scenes.
"""

import difflib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from utils.cache import scene_of


class SplitError(Exception):
    """A split that names what is not there, leaves a side empty or puts a tile on both."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Split:
    """Names of the tiles of each side, sorted."""

    train: list[str]
    val: list[str]


def split_by_lists(names: Sequence[str], train_list: Path, val_list: Path) -> Split:
    """The sides that two lists name; tiles that neither names stay out."""
    sides = Split(_named(names, train_list), _named(names, val_list))
    for side, path in ((sides.train, train_list), (sides.val, val_list)):
        if not side:
            raise SplitError(f"{path}: names no tile; give at least one tile or scene")
    if both := sorted(set(sides.train) & set(sides.val)):
        raise SplitError(
            f"{val_list}: {len(both)} tile(s) are in {train_list} too, {both[0]} the first; "
            "each may be on one side only"
        )
    return sides


def _named(names: Sequence[str], path: Path) -> list[str]:
    """The tiles that a list's lines name; `#` starts a comment."""
    if not path.is_file():
        raise SplitError(f"{path}: no such file (dataset.splits)")
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(scene_of(name), []).append(name)
        members[name] = [name]
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SplitError(f"{path}: not a UTF-8 text file ({error})") from error
    chosen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        entry = line.partition("#")[0].strip()
        if entry and entry not in members:
            near = difflib.get_close_matches(entry, members, n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            raise SplitError(f"{path}:{number}: no cached tile or scene is called '{entry}'{hint}")
        chosen.update(members.get(entry, []))
    return sorted(chosen)


def split_by_blocks(names: Sequence[str], val_fraction: float, seed: int) -> Split:
    """Hold out one contiguous run of tiles per scene, seeded.

    A scene's tiles are walked row by row, every other row backwards, so that each tile touches the
    one before it; the run starts at a random tile. Scenes too small for a run of their own are
    held out whole, as many as the fraction asks for.

    >>> names = [f"north__r{row:06d}_c{col:06d}" for row in (0, 512) for col in (0, 512, 1024)]
    >>> split_by_blocks(names, val_fraction=0.4, seed=0).val
    ['north__r000512_c000512', 'north__r000512_c001024']
    """
    if len(names) < 2:
        raise SplitError(f"{len(names)} tile(s) cannot be split in two; prepare more scenes")
    generator = random.Random(seed)
    scenes = [list(group) for _, group in groupby(sorted(names), key=scene_of)]
    generator.shuffle(scenes)
    held: list[str] = []
    seen = 0
    wanted = min(max(val_fraction, 1 / len(names)), 1 - 1 / len(names))
    for scene in scenes:
        seen += len(scene)
        count = round(wanted * seen) - len(held)
        path = serpentine(scene)
        start = generator.randrange(len(path) - count + 1)
        held += path[start : start + count]
    return Split(sorted(set(names) - set(held)), sorted(held))


def serpentine(names: Sequence[str]) -> list[str]:
    """One scene's tiles row by row, every other row backwards.

    >>> serpentine(["a__r0_c0", "a__r0_c1", "a__r1_c0", "a__r1_c1"])
    ['a__r0_c0', 'a__r0_c1', 'a__r1_c1', 'a__r1_c0']
    """
    by_row = groupby(sorted(names), key=lambda name: name.rpartition("_")[0])
    rows = [list(row) for _, row in by_row]
    return [name for number, row in enumerate(rows) for name in (row[::-1] if number % 2 else row)]
