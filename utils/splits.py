"""Which tiles train and which validate: by lists, by polygons, or in blocks of ground.

Tiles are known by name, `SCENE__rROW_cCOL`; a list may name tiles or whole scenes. However a split
came about, it is audited: no ground may be on both sides.
"""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import shapely

from config import Splits
from utils.blocks import apart, block_side, hold_outs, tile_side
from utils.footprints import APART, TOUCH, Footprints, overlapping, smallest_distance
from utils.limits import MEBIBYTE, limited_bytes
from utils.logging import VerbosityLogger
from utils.manifest import scene_of
from utils.vectors import is_vector, read_shapes

LARGEST = 256 * MEBIBYTE  # of a list: some millions of names
LONGEST = 255  # characters of a name


class SplitError(Exception):
    """A split that names what is not there, leaves a side empty or puts a tile on both."""

    exit_code = 3


@dataclass(frozen=True, slots=True)
class Split:
    """Names of the tiles of each side, sorted; the others were left out for a reason."""

    train: list[str]
    val: list[str]
    test: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    def sides(self) -> dict[str, str]:
        """The side of each tile, by name.

        >>> Split(["a__r000000_c000000"], ["b__r000000_c000000"]).sides()
        {'a__r000000_c000000': 'train', 'b__r000000_c000000': 'val'}
        """
        named = {"train": self.train, "val": self.val, "test": self.test, "dropped": self.dropped}
        return {name: side for side, names in named.items() for name in names}


def require_list(path: Path) -> None:
    """Raise SplitError where a file that a split is made by is missing.

    >>> require_list(Path("none.txt"))
    Traceback (most recent call last):
    utils.splits.SplitError: none.txt: no such file (dataset.splits)
    """
    if not path.is_file():
        raise SplitError(f"{path}: no such file (dataset.splits)")


def split_by_lists(places: Footprints, train_list: Path, val_list: Path) -> Split:
    """The sides that two files name, lists or polygons; tiles that neither names stay out."""
    (train, partly), (val, partly_val) = (_members(places, path) for path in (train_list, val_list))
    for side, path in ((train, train_list), (val, val_list)):
        if not side:
            raise SplitError(f"{path}: names no tile; give at least one tile or scene")
    if both := sorted(set(train) & set(val)):
        raise SplitError(
            f"{val_list}: {len(both)} tile(s) are in {train_list} too, {both[0]} the first; "
            "each may be on one side only"
        )
    straddling = (partly | partly_val) - set(train) - set(val)
    return Split(train, val, dropped=sorted(straddling))


def _members(places: Footprints, path: Path) -> tuple[list[str], set[str]]:
    """The tiles that a file names, and those that only reach into its polygons."""
    if not is_vector(path):
        return _named(places.names, path), set()
    inside, partly = within(places, read_shapes(path).to(_crs_of(places, path)).polygons)
    return sorted(inside), partly


def _crs_of(places: Footprints, path: Path) -> Any:
    if places.crs is None:
        raise SplitError(f"{path}: polygons need scenes with a CRS; list tiles or scenes instead")
    return places.crs


def within(places: Footprints, polygons: Sequence[Any]) -> tuple[set[str], set[str]]:
    """Tiles that lie inside the union of some polygons, and those that only reach into it."""
    margin = TOUCH * tile_side(places.outlines)
    grown = shapely.buffer(polygons, margin, join_style="mitre")  # closes seams that warping opens
    whole = shapely.union_all(grown)
    inner = shapely.buffer(places.outlines, -2 * margin, join_style="mitre")
    shapely.prepare(whole)
    inside, meets = shapely.covers(whole, inner), shapely.intersects(whole, inner)
    names = np.array(places.names)
    return set(names[inside].tolist()), set(names[meets & ~inside].tolist())


def split_by_regions(places: Footprints, path: Path, log: VerbosityLogger) -> Split:
    """The sides of a polygon file with a field `split`: train, val or test.

    A tile belongs where its footprint lies; one that straddles a border is dropped.
    """
    shapes = read_shapes(path, attribute="split").to(_crs_of(places, path))
    if odd := sorted({str(value) for value in shapes.values} - {"train", "val", "test"}):
        raise SplitError(f"{path}: split is '{odd[0]}' somewhere, expected train, val or test")
    sides: dict[str, set[str]] = {"train": set(), "val": set(), "test": set()}
    straddling: set[str] = set()
    for side in sides:
        chosen = [g for g, v in zip(shapes.polygons, shapes.values, strict=True) if v == side]
        if chosen:
            sides[side], partly = within(places, chosen)
            straddling |= partly
    for side in sides:
        others = set().union(*(sides[other] for other in sides if other != side))
        straddling |= sides[side] & others
    train, val, test = (sorted(sides[side] - straddling) for side in ("train", "val", "test"))
    outside = len(places.names) - len(straddling) - len(train) - len(val) - len(test)
    log.info(
        f"train: {path.name}: {len(train)} tiles train, {len(val)} validate, {len(test)} are for "
        f"testing; dropped {len(straddling)} that straddle regions, {outside} outside of them"
    )
    for side, names in (("train", train), ("val", val)):
        if not names:
            raise SplitError(
                f"{path}: no tile lies inside the {side} region, {len(straddling)} straddle; "
                "prepare with a smaller prepare.tile_size"
            )
    return Split(train, val, test, sorted(straddling))


def split_by_blocks(
    places: Footprints, counts: np.ndarray, fraction: float, section: Splits, seed: int
) -> Split:
    """Hold out blocks of ground; tiles of the training side that lie too near are dropped.

    counts: (tiles, classes) labelled pixels, which the held-out blocks are to represent.
    """
    if len(places.names) < 2:
        raise SplitError(f"{len(places.names)} tile(s) cannot be split in two; prepare more scenes")
    side = section.block or block_side(places.outlines, fraction)
    for val in hold_outs(places, counts, fraction, side, seed):
        rest = sorted(set(places.names) - set(val))
        train, dropped = apart(places, val, rest, section.buffer)
        if train:
            return Split(train, val, dropped=dropped)
    raise SplitError(
        f"dataset.splits: whichever blocks of {side:.4g} m validate, none of the "
        f"{len(places.names)} tiles is left to train on that shares no ground with them and lies "
        f"farther than {section.buffer:g} m; lower block or buffer, or prepare more scenes"
    )


def audit(
    split: Split, places: Footprints, counts: np.ndarray, classes: Sequence[str],
    log: VerbosityLogger,
) -> None:  # fmt: skip
    """Refuse a split whose sides share ground; log how far apart and how alike they are."""
    train, val = places.of(split.train), places.of(split.val)
    pairs = overlapping(train, val)
    if pairs.size:
        named = [f"{split.train[a]} and {split.val[b]}" for a, b in pairs.T[:3].tolist()]
        raise SplitError(
            f"dataset.splits: {pairs.shape[1]} pairs of a training and a validation tile share "
            f"ground, such as {', '.join(named)}; put them on one side, or leave the lists out for "
            "a split in blocks"
        )
    place = {name: number for number, name in enumerate(places.names)}
    for side, names in (("train", split.train), ("val", split.val)):
        pixels = counts[[place[name] for name in names]].sum(0)
        of_all = zip(classes, pixels / max(pixels.sum(), 1), strict=True)
        shares = ", ".join(f"{name}: {share:.1%}" for name, share in of_all)
        log.info(f"train: {side} has {len(names)} tiles, class shares {shares}")
    distance, unit = smallest_distance(train, val), "m" if places.crs else "pixels"
    gap = f"{distance:.0f} {unit} apart" if distance < APART / 2 else "in different scenes"
    log.info(f"train: the two sides are {gap}, {len(split.dropped)} tiles dropped")


def _named(names: Sequence[str], path: Path) -> list[str]:
    """The tiles that a list's lines name; `#` starts a comment."""
    require_list(path)
    members: dict[str, list[str]] = {}
    for name in names:
        members.setdefault(scene_of(name), []).append(name)
        members[name] = [name]
    try:
        lines = limited_bytes(path, LARGEST).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise SplitError(f"{path}: not a UTF-8 text file ({error})") from error
    except ValueError as error:
        raise SplitError(f"{path}: {error}; is it a list of names?") from error
    chosen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        entry = line.partition("#")[0].strip()
        if entry and entry not in members:
            entry = entry[:LONGEST]  # a name of ours is a file's too
            near = difflib.get_close_matches(entry, members, n=1)
            hint = f", did you mean '{near[0]}'?" if near else ""
            raise SplitError(f"{path}:{number}: no cached tile or scene is called '{entry}'{hint}")
        chosen.update(members.get(entry, []))
    return sorted(chosen)
