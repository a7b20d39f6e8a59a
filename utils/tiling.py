"""Tiles: integer geometry on a scene's pixel grid, rows before columns.

Tiles all have one size. They start on a regular stride, and the last one of each axis is moved back
so that it ends on the scene's border. Along an axis shorter than the tile there is one tile that
starts at 0 and reaches past the border; whoever reads it pads.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")


@dataclass(frozen=True, slots=True, order=True)
class Tile:
    """A rectangle of a scene, in pixels.

    >>> Tile(512, 0, 256, 256).name
    'r000512_c000000'
    """

    row: int
    col: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """The tile's place as text that sorts like the place itself."""
        return f"r{self.row:06d}_c{self.col:06d}"


def stride_of(size: int, overlap: float) -> int:
    """Pixels between the starts of two neighbouring tiles that share the fraction `overlap`.

    >>> stride_of(512, 0.25), stride_of(512, 0.0), stride_of(16, 0.99)
    (384, 512, 1)
    """
    return max(1, round(size * (1 - overlap)))


def origins(length: int, size: int, stride: int) -> list[int]:
    """Starts of the tiles that cover one axis; the last is moved back inside.

    >>> origins(10, size=4, stride=4)
    [0, 4, 6]
    >>> origins(3, size=4, stride=4)
    [0]
    """
    if length <= size:
        return [0]
    return [*range(0, length - size, stride), length - size]


def tiles(height: int, width: int, size: int, overlap: float = 0.0) -> list[Tile]:
    """The tiles that cover a scene of `height` × `width` pixels, row by row.

    >>> [(tile.row, tile.col) for tile in tiles(512, 700, size=512)]
    [(0, 0), (0, 188)]
    """
    return list(_grid(height, width, size, stride_of(size, overlap)))


def _grid(height: int, width: int, size: int, stride: int) -> Iterator[Tile]:
    for row in origins(height, size, stride):
        for col in origins(width, size, stride):
            yield Tile(row, col, size, size)


def repeated(tile: Tile) -> tuple[int, int]:
    """Rows and columns at the tile's start that its neighbours without overlap hold already.

    Without overlap the k-th tile starts at k · size; one that was moved back starts earlier, and
    the distance is what it shares with the tile before it.

    >>> repeated(Tile(0, 188, 512, 512))        # the second of a 700-pixel axis: 1024 - 512 - 188
    (0, 324)
    >>> repeated(Tile(512, 0, 512, 512))
    (0, 0)
    """
    return -tile.row % tile.height, -tile.col % tile.width


def batched(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size` items; the last may be shorter.

    >>> list(batched("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
