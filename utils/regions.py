"""The 4-connected regions of a class map, and the sieve that merges the small ones.

Bands of rows are cut into runs, and runs that touch are joined into regions across all bands, so no
result depends on how many rows a band had. Pure numpy.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from utils.ground import Ground

SUBPIXEL = 1 << 20  # areas and lengths are summed in whole parts of a pixel: equal in any order


def components(count: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The lowest node that each of `count` nodes is linked with by edges first[i]–second[i].

    >>> components(5, np.array([4, 1]), np.array([1, 2])).tolist()
    [0, 1, 1, 3, 1]
    """
    lowest = np.arange(count)
    while first.size:
        np.minimum.at(lowest, np.maximum(first, second), np.minimum(first, second))
        while not np.array_equal(lowest, further := lowest[lowest]):
            lowest = further
        first, second = lowest[first], lowest[second]
        apart = first != second
        first, second = first[apart], second[apart]
    return lowest


class Borders(NamedTuple):
    """Pairs of runs, pieces or regions that touch, with the length of what they share."""

    first: np.ndarray
    second: np.ndarray
    lengths: np.ndarray

    def where(self, kept: np.ndarray) -> "Borders":
        return Borders(*(part[kept] for part in self))

    def renamed(self, names: np.ndarray) -> "Borders":
        return Borders(names[self.first], names[self.second], self.lengths)

    def summed(self) -> "Borders":
        """Each pair once, the lower number first; lengths are whole numbers, so sums are exact."""
        first, second, lengths = self
        keys = np.minimum(first, second) << 32 | np.maximum(first, second)
        keys, place = np.unique(keys, return_inverse=True)
        return Borders(keys >> 32, keys & 0xFFFFFFFF, np.bincount(place, lengths, len(keys)))


def joined(borders: Iterable[Borders]) -> Borders:
    return Borders(*map(np.concatenate, zip(*borders, strict=True)))


class Runs(NamedTuple):
    """Stretches of equal pixels in rows: where each starts, how long it is, and its value."""

    rows: np.ndarray
    cols: np.ndarray
    lengths: np.ndarray
    values: np.ndarray


def runs_of(block: np.ndarray) -> tuple[Runs, Borders]:
    """The runs of some rows, and the pixels that those of neighbouring rows share.

    >>> runs, below = runs_of(np.array([[7, 7, 8], [7, 8, 8]]))
    >>> runs.cols.tolist(), [part.tolist() for part in below]
    ([0, 2, 0, 1], [[0, 0, 1], [2, 3, 3], [1, 1, 1]])
    """
    width = block.shape[1]
    change = np.ones(block.shape, bool)
    np.not_equal(block[:, 1:], block[:, :-1], out=change[:, 1:])
    starts = np.flatnonzero(change)
    runs = Runs(*np.divmod(starts, width), np.diff(starts, append=block.size), block[change])
    places = np.flatnonzero(change[:-1] | change[1:])
    first = np.cumsum(change.ravel()[places]) - 1
    second = np.cumsum(change.ravel()[places + width]) - 1 + np.count_nonzero(change[0])
    return runs, Borders(first, second, np.diff(places, append=block.size - width))


class Regions:
    """The 4-connected regions of a map that is fed in bands of rows from the top.

    Their numbers follow their first pixels, row by row. Areas and borders are collected for the
    sieve only. Pixels without data form regions too: of class -1, with no border to others.
    """

    def __init__(self, ground: Ground, nodata: int | None, sieving: bool) -> None:
        self._ground, self._sieving = ground, sieving
        self._nodata = -1 if nodata is None else nodata
        self._unit = ground.pixel / SUBPIXEL  # of areas, in square metres
        self._top, self._side = np.rint(np.divide(ground.edges, max(ground.edges)) * SUBPIXEL)
        self._count = self._fed = 0
        self._row, self._row_ids = np.empty((0, ground.grid.width), np.uint8), np.empty(0, int)
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []  # of each band: lengths, pieces
        self._classes, self._links, self._areas, self._borders = [], [], [], []

    def feed(self, rows: np.ndarray) -> None:
        """Add the next rows (n, width); a piece is what this band shows of a region."""
        runs, below = runs_of(np.concatenate([self._row.astype(rows.dtype), rows]))
        known = len(self._row_ids)  # runs of the row before, which were counted there
        classes = np.where(runs.values == self._nodata, -1, runs.values.astype(int))
        same = classes[below.first] == classes[below.second]
        lowest = components(len(classes), *below.where(same)[:2])
        heads = lowest == np.arange(len(lowest))
        ids = (np.cumsum(heads) - 1)[lowest] + self._count
        self._links.append((self._row_ids, ids[:known]))
        self._classes.append(classes[heads])
        self._runs.append((runs.lengths[known:].astype(np.int32), ids[known:].astype(np.int32)))
        if self._sieving:
            self._measure(runs, known, ids)
            beside = np.arange(known, len(ids) - 1)[runs.cols[known + 1 :] > 0]
            right = Borders(beside, beside + 1, np.full(len(beside), self._side))
            below = below.where(~same)._replace(lengths=below.lengths[~same] * self._top)
            both = joined([below, right])
            data = (classes[both.first] >= 0) & (classes[both.second] >= 0)
            self._borders.append(both.where(data).renamed(ids).summed())
        self._row, self._row_ids = rows[-1:], ids[runs.rows == runs.rows[-1]]
        self._fed += len(rows)
        self._count += np.count_nonzero(heads)

    def _measure(self, runs: Runs, known: int, ids: np.ndarray) -> None:
        """Note the area of each piece, in units."""
        rows, cols = runs.rows + self._fed - (known > 0), runs.cols + (runs.lengths - 1) / 2
        areas = np.rint(runs.lengths * self._ground.pixel_areas(rows, cols) / self._unit)
        areas[:known] = 0
        self._areas.append(np.bincount(ids - self._count, areas))

    def finish(self, min_area: float) -> tuple[np.ndarray, np.ndarray]:
        """The region of each piece, -1 without data, and the class of each region."""
        first, second = map(np.concatenate, zip(*self._links, strict=True))
        lowest = components(self._count, first, second)
        heads = lowest == np.arange(self._count)
        region = (np.cumsum(heads) - 1)[lowest]
        classes = np.concatenate(self._classes)[heads]
        if self._sieving:
            areas = np.bincount(region, np.concatenate(self._areas))
            borders = joined(self._borders).renamed(region).summed()
            owner, classes = sieve(classes, areas, borders, min_area / self._unit)
            region = owner[region]
        return np.where(classes[region] < 0, -1, region).astype(np.int32), classes

    def bands(self, region: np.ndarray) -> Iterator[np.ndarray]:
        """The regions of all pixels, band by band, each under the last row of the one before.

        -1 stands beyond the map: left, right, above the first band and below the last.
        """
        width = self._ground.grid.width
        last = np.full((1, width + 2), -1, np.int32)
        while self._runs:
            lengths, pieces = self._runs.pop(0)
            inside = np.repeat(region[pieces], lengths).reshape(-1, width)
            band = np.pad(inside, [(1, 0 if self._runs else 1), (1, 1)], constant_values=-1)
            band[0], last = last, band[-1:].copy()
            yield band


def sieve(
    classes: np.ndarray, areas: np.ndarray, borders: Borders, least: float
) -> tuple[np.ndarray, np.ndarray]:
    """Merge regions below the area `least` into their neighbours: the owner of each, its class.

    Smallest first (of two equal ones the first), a region takes the class it shares the longest
    border with (of two equal ones the lower) and grows together with all neighbours of that class;
    what has grown to `least` stays. One without neighbours stays too. In each round all regions
    merge that are smaller than each of their neighbours: they do not touch, and nothing smaller
    can reach them first, so it is as if they had their turns one by one.

    >>> borders = Borders(np.array([0, 1]), np.array([1, 2]), np.array([4, 6]))
    >>> [part.tolist() for part in sieve(np.array([5, 6, 5]), np.array([9, 3, 8]), borders, 4)]
    [[0, 0, 0], [5, 5, 5]]
    """
    owner, classes, kinds = np.arange(len(classes)), classes.copy(), classes.max() + 1
    while True:
        first, second, lengths = borders = borders.where(
            (borders.first != borders.second)
            & (np.minimum(areas[borders.first], areas[borders.second]) < least)
        )
        if not len(first):
            return owner, classes
        here, there = np.append(first, second), np.append(second, first)
        lengths = np.append(lengths, lengths)
        later = (areas[there] < areas[here]) | ((areas[there] == areas[here]) & (there < here))
        waiting = np.zeros(len(owner), bool)
        waiting[here[later]] = True
        turn = ~waiting[here]
        here, there, lengths = here[turn], there[turn], lengths[turn]
        keys, place = np.unique(here * kinds + classes[there], return_inverse=True)
        order = np.lexsort((keys, -np.bincount(place, lengths), keys // kinds))
        nodes, longest = np.unique(keys[order] // kinds, return_index=True)
        classes[nodes] = keys[order][longest] % kinds
        alike = classes[here] == classes[there]
        lowest = components(len(owner), here[alike], there[alike])
        owner, areas = lowest[owner], np.bincount(lowest, areas, len(areas))
        borders = borders.renamed(lowest)
