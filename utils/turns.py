"""The eight ways to lay a square tile: mirrored or not, turned by quarters."""

from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Turn:
    """Mirror columns, mirror rows, then quarter turns; of the last two axes (rows, columns).

    >>> image = torch.tensor([[1, 2], [3, 4]])
    >>> Turn(hflip=True).apply(image).tolist()
    [[2, 1], [4, 3]]
    >>> turn = Turn(hflip=True, quarters=1)
    >>> turn.apply(image).tolist(), turn.undo(turn.apply(image)).tolist()
    ([[1, 3], [2, 4]], [[1, 2], [3, 4]])
    """

    hflip: bool = False
    vflip: bool = False
    quarters: int = 0

    @property
    def _axes(self) -> list[int]:
        return [axis for axis, wanted in ((-1, self.hflip), (-2, self.vflip)) if wanted]

    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor (..., rows, columns) mirrored, then turned; itself where neither is asked."""
        return _turned(_mirrored(tensor, self._axes), self.quarters)

    def view(self, array: np.ndarray) -> np.ndarray:
        """What `apply` does, of a NumPy array and without moving a value.

        >>> Turn(hflip=True, quarters=1).view(np.array([[1, 2], [3, 4]])).tolist()
        [[1, 3], [2, 4]]
        """
        return np.rot90(np.flip(array, self._axes), self.quarters, (-2, -1))

    def undo(self, tensor: Tensor) -> Tensor:
        """The inverse of `apply`."""
        return _mirrored(_turned(tensor, -self.quarters), self._axes)


def _mirrored(tensor: Tensor, axes: list[int]) -> Tensor:
    return tensor.flip(axes) if axes else tensor


def _turned(tensor: Tensor, quarters: int) -> Tensor:
    return torch.rot90(tensor, quarters, (-2, -1)) if quarters % 4 else tensor


def distinct_turns(hflip: bool, vflip: bool, rotate: bool) -> list[Turn]:
    """The different ways to lay a tile by these means, the first as it is.

    A flip of both axes is a half turn, so with both flips quarter turns make eight ways, not more.

    >>> distinct_turns(hflip=True, vflip=False, rotate=False)
    [Turn(hflip=False, vflip=False, quarters=0), Turn(hflip=True, vflip=False, quarters=0)]
    >>> [len(distinct_turns(True, True, False)), len(distinct_turns(True, True, True))]
    [4, 8]
    """
    found: dict[bytes, Turn] = {}
    for quarters in range(4 if rotate else 1):
        for rows in (False, True) if vflip else (False,):
            for cols in (False, True) if hflip else (False,):
                turn = Turn(cols, rows, quarters)
                laid = turn.apply(torch.arange(4).view(2, 2))
                found.setdefault(laid.numpy().tobytes(), turn)
    return list(found.values())


def first_turns(count: int, hflip: bool, vflip: bool, rotate: bool) -> list[list[int]]:
    """The first of the distinct turns, as a manifest has them.

    >>> first_turns(3, hflip=True, vflip=True, rotate=True)
    [[False, False, 0], [True, False, 0], [False, True, 0]]
    """
    return [list(astuple(turn)) for turn in distinct_turns(hflip, vflip, rotate)[:count]]
