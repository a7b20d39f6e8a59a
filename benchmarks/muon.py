"""Muon's share of a training step of unet_v2: forward, backward and step of 4 tiles of 512².

    python -m benchmarks.muon

One thread, CPU seconds. The step runs in float32 and, where the processor multiplies bfloat16, in
that autocast by turns; what Muon's groups of parameters take of the optimizer's step is divided by
the whole. The ratio is the larger.
"""

import sys
import time
from collections.abc import Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.head import CHANNELS, LEVELS, NO_BF16, SIZE, begin, make_inputs
from benchmarks.rows import Row, command_line, report
from models import build_head
from utils.devices import has_bf16
from utils.logging import say
from utils.optim import Muon, build_optimizer

TILES, CLASSES = 4, 5


class Clock:
    """A method of an optimizer that counts the CPU seconds spent in it."""

    def __init__(self, method) -> None:
        self.method, self.seconds = method, 0.0

    def __call__(self, *arguments) -> None:
        start = time.process_time()
        self.method(*arguments)
        self.seconds += time.process_time() - start


def measure(turns: int = 5) -> list[Row]:
    """Rows for Muon's share in float32 and, where the processor multiplies it, in bfloat16."""
    begin()
    head = build_head("unet_v2", CHANNELS, LEVELS, CLASSES)
    optimizer = build_optimizer(head, head.edge_parameters(), 0.02, 1e-3, 0.95, 0.01)
    image, maps = make_inputs(TILES)
    batch = image, maps, torch.randint(CLASSES, (TILES, SIZE, SIZE))
    shares: dict[bool, list[float]] = {False: []}
    if has_bf16(torch.device("cpu")):
        shares[True] = []
    else:
        say(f"muon: {NO_BF16}")
    for turn in range(-1, turns):
        for half in shares:
            share = share_of_step(head, optimizer, batch, half)
            shares[half] += [share] if turn >= 0 else []  # the first makes the optimizer's state
    rows = [
        Row(f"muon: share of a training step, {'bf16' if half else 'fp32'}", median(each), 0.15)
        for half, each in shares.items()
    ]
    return sorted(rows, key=lambda row: -row.measured)


def share_of_step(head: nn.Module, optimizer: Muon, batch: tuple, half: bool) -> float:
    """Muon's part of the CPU seconds of one step."""
    image, maps, label = batch
    clock = Clock(type(optimizer)._muon.__get__(optimizer))
    optimizer._muon = clock
    start = time.process_time()
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        output = head(image, maps)
    sum(F.cross_entropy(logits, label) for logits in (output.logits, *output.aux)).backward()
    optimizer.step()
    return clock.seconds / (time.process_time() - start)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the ratio."""
    parser = command_line(__doc__)
    parser.add_argument("--turns", type=int, default=5)
    report(measure(parser.parse_args(arguments).turns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
