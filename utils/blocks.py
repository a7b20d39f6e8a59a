"""Hold out blocks of ground for validation: contiguous, spread over the classes, apart by a buffer.

Random tiles would put neighbours on both sides, and a score on them promises too much (Ploton et
al., "Spatial validation reveals poor predictive performance", Nature Communications 11, 2020).
"""

import math
import random
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import shapely

from utils.footprints import Footprints, near, overlapping

DRAWS = 200  # random choices of blocks, of which the one with the most faithful shares is taken


def tile_side(outlines: np.ndarray) -> float:
    """Metres along a tile's side, from the median footprint.

    >>> tile_side(shapely.box([0, 256], 0, [256, 512], 256))
    256.0
    """
    return float(np.sqrt(np.median(shapely.area(outlines))))


def block_side(outlines: np.ndarray, fraction: float) -> float:
    """A side in metres such that about four blocks hold the fraction, two tiles at the least.

    With few tiles it shrinks until no block holds half as much again, nor over half of all.

    >>> row, col = (256 * axis.ravel() for axis in np.indices((8, 10)))
    >>> block_side(shapely.box(col, row, col + 256, row + 256), fraction=0.2)
    512.0
    """
    side = tile_side(outlines)
    tiles = max(2, round(math.sqrt(len(outlines) * fraction / 4)))
    most = min(1.5 * fraction, 0.5) * len(outlines)
    while tiles > 1 and max(Counter(block_of(outlines, side * tiles)).values()) > most:
        tiles -= 1
    return side * tiles


def block_of(outlines: np.ndarray, side: float) -> list[tuple[int, int]]:
    """The block (row, column) of a square grid on the ground that each tile's centre lies in.

    >>> block_of(shapely.box([0, 256, 512], 0, [256, 512, 768], 256), side=512)
    [(0, 0), (0, 0), (0, 1)]
    """
    centres = shapely.get_coordinates(shapely.centroid(outlines))
    west, south = shapely.total_bounds(outlines)[:2]
    cells = np.floor((centres - (west, south)) / side).astype(int)
    return [(int(row), int(col)) for col, row in cells]


def hold_outs(
    places: Footprints, counts: np.ndarray, fraction: float, side: float, seed: int
) -> list[list[str]]:
    """Seeded choices of blocks to hold out, as names of their tiles, the most faithful first.

    counts: (tiles, classes) labelled pixels. Most faithful is the choice whose number of tiles and
    class shares are nearest to `fraction` and to those of all tiles. None where there is one block.
    """
    blocks = defaultdict(list)
    for number, block in enumerate(block_of(places.outlines, side)):
        blocks[block].append(number)
    half = max(len(block) for block in blocks.values()) / 2
    large = [block for block in blocks.values() if len(block) >= half]
    small = [block for block in blocks.values() if len(block) < half]
    if len(large) == 1:
        large, small = large + small, []
    dice, wanted = random.Random(seed), fraction * len(places.names)
    draws = [draw(large, small, wanted, dice) for _ in range(DRAWS)]
    draws = [list(drawn) for drawn in dict.fromkeys(draws) if drawn]
    draws.sort(key=lambda drawn: unlike(counts, drawn, fraction))
    return [sorted(places.names[number] for number in drawn) for drawn in draws]


def draw(
    large: Sequence[list[int]], small: Sequence[list[int]], wanted: float, dice: random.Random
) -> tuple[int, ...]:
    """Tiles of randomly drawn blocks, until one more would bring their number further from wanted.

    Small blocks, which the border of the ground cuts, come last; one block is left over.

    >>> draw([[0, 1], [2, 3], [4, 5]], [[6]], wanted=3.9, dice=random.Random(0))
    (2, 3, 4, 5)
    """
    shuffled = dice.sample(large, len(large)) + dice.sample(small, len(small))
    drawn: list[int] = []
    for block in shuffled[:-1]:
        if drawn and abs(len(drawn) + len(block) - wanted) > abs(len(drawn) - wanted):
            break
        drawn += block
    return tuple(sorted(drawn))


def unlike(counts: np.ndarray, drawn: Sequence[int], fraction: float) -> float:
    """How far a draw is from the fraction and from the class shares of all tiles; 0 is perfect."""
    part, whole = counts[list(drawn)].sum(0), counts.sum(0)
    missing = int(((part == 0) & (whole > 0)).sum() + ((part == whole) & (whole > 0)).sum())
    shares = part / max(part.sum(), 1) - whole / max(whole.sum(), 1)
    return missing + abs(len(drawn) / len(counts) - fraction) + float(np.abs(shares).sum())


def apart(
    places: Footprints, held: Sequence[str], rest: Sequence[str], buffer: float
) -> tuple[list[str], list[str]]:
    """The rest, without and only the tiles that share ground with those held or lie too near."""
    outlines, others = places.of(rest), places.of(held)
    close = set(overlapping(outlines, others)[0].tolist())
    if buffer > 0:
        close |= set(near(outlines, others, buffer).tolist())
    kept = [name for number, name in enumerate(rest) if number not in close]
    return kept, [name for number, name in enumerate(rest) if number in close]
