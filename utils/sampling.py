"""Which training tiles an epoch draws so that each class is met equally often.

Class-aware sampling (Shen et al. 2016, arXiv:1512.05830): draw a class, then a tile that shows it.
"""

import random
from collections.abc import Iterator
from itertools import cycle, islice

import numpy as np
import torch
from torch import Tensor

FEW = 16  # classes that are counted one by one sooner than all at once


def class_counts(label: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    """Pixels of each class (K,) in a label of any shape and integer type; ignored ones are out.

    >>> label = torch.full((64, 64), 255, dtype=torch.uint8)
    >>> label[:2] = 2
    >>> class_counts(label, num_classes=4, ignore_index=255).tolist()
    [0, 0, 128, 0]
    """
    ids = label.flatten()
    if num_classes <= FEW:
        values = (*range(num_classes), ignore_index)
        known = [np.count_nonzero(ids.numpy() == value) for value in values]
        if sum(known) == len(ids):
            return torch.tensor(known[:-1])
    reach = max(num_classes, ignore_index + 1)
    if not ids.numel() or (int(ids.min()) >= 0 and int(ids.max()) < reach):
        counts = torch.bincount(ids, minlength=reach)
        counts[ignore_index] = 0
        if not counts[num_classes:].any():
            return counts[:num_classes]
    outside = ids[(ids != ignore_index) & ((ids < 0) | (ids >= num_classes))]
    raise ValueError(
        f"label has the value {outside[0].item()}: expected 0..{num_classes - 1} or "
        f"{ignore_index} (ignore)"
    )


def balanced_order(counts: Tensor, length: int, seed: int, epoch: int) -> list[int]:
    """Positions of `length` tiles, drawn so that each class that is present is met equally often.

    counts (tiles, K): labelled pixels of each class in each tile. The draws come in rounds, each a
    new shuffle of the classes present, so that after any draw two classes differ by one draw at
    most, and `order[rank::world_size]` gives no rank a class of its own. A class's draws go through
    a shuffle of all the tiles that show it, again and again: each such tile alike (one pixel is
    enough), and none again before all the others. A tile may also be drawn for its other classes.

    The same for the same numbers, in any process; fewer draws are the first of more.

    >>> counts = torch.tensor([[4096, 0, 0], [4000, 96, 0], [4096, 0, 0], [0, 0, 0]])
    >>> order = balanced_order(counts, length=8, seed=0, epoch=1)     # class 1: tile 1 only
    >>> len(order), order.count(1) >= 4, 3 in order
    (8, True, False)
    """
    dice = random.Random(f"{seed} {epoch}")
    shown = [column.nonzero().flatten().tolist() for column in counts.cpu().T]
    queues = [cycle(_shuffled(tiles, dice)) for tiles in shown if tiles]
    if not queues:
        raise ValueError(f"none of {len(counts)} tiles shows a class: there is nothing to draw")
    return [next(queues[place]) for place in islice(_rounds(len(queues), dice), length)]


def _shuffled(items: list[int], dice: random.Random) -> list[int]:
    return dice.sample(items, len(items))


def _rounds(count: int, dice: random.Random) -> Iterator[int]:
    """The numbers below `count` in ever new orders, without end."""
    while True:
        yield from _shuffled(list(range(count)), dice)
