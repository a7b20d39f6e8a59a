"""Measured figures beside their limits, and how they are shown."""

import argparse
import math
from collections.abc import Sequence
from typing import NamedTuple

from utils.logging import say


class Row(NamedTuple):
    """A figure and the limit it has to keep: the most it may be, or the least.

    >>> Row("prepare: total over own forward", 1.02, 1.03).ok
    True
    >>> Row("unet_v2: times as fast in bf16", 1.7, 2.0, at_least=True).ok
    False
    """

    what: str
    measured: float
    limit: float
    unit: str = ""
    at_least: bool = False

    @property
    def ok(self) -> bool:
        """Whether the figure is within its limit; one that is no number is not."""
        if self.at_least:
            return self.measured >= self.limit
        return self.measured <= self.limit

    @property
    def bound(self) -> str:
        """The limit in words.

        >>> Row("cache", 1.0, 1.01).bound, Row("speed", 1.7, 2, "x", at_least=True).bound
        ('<= 1.01', '>= 2 x')
        """
        return f"{'>=' if self.at_least else '<='} {self.limit:g} {self.unit}".rstrip()


def print_table(rows: Sequence[Row]) -> None:
    """Print what was measured beside its limit, a row each.

    >>> print_table([Row("loader: CPU per sample", 1.234, 2, "ms")])
    target                  limit    measured  within
    loader: CPU per sample  <= 2 ms  1.23 ms   yes
    """
    table = [("target", "limit", "measured", "within")]
    for row in rows:
        measured = f"{figure(row.measured)} {row.unit}".rstrip()
        table.append((row.what, row.bound, measured, "yes" if row.ok else "NO"))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say("  ".join(cells).rstrip())


def report(rows: Sequence[Row]) -> None:
    """Print a script's table, and its ratio as the last line: the first figure without a unit.

    Where each has one, how much of its limit the furthest takes.

    >>> report([Row("start", 4, 5, "s")])
    target  limit   measured  within
    start   <= 5 s  4 s       yes
    ratio: 0.800
    """
    print_table(rows)
    say(f"ratio: {next((row.measured for row in rows if not row.unit), furthest(rows)):.3f}")


def figure(number: float) -> str:
    """A number with as many digits as are worth reading.

    >>> figure(1.02143), figure(12.345), figure(1345.6), figure(0.0)
    ('1.021', '12.3', '1346', '0')
    """
    if number == round(number):
        return f"{number:.0f}"
    if abs(number) < 1.2:
        return f"{number:.3f}"
    digits = 2 if abs(number) < 10 else 1 if abs(number) < 100 else 0
    return f"{number:.{digits}f}"


def furthest(rows: Sequence[Row]) -> float:
    """The largest share that a row takes of its limit: at most 1 where all are within.

    >>> furthest([Row("a", 1.0, 2.0), Row("b", 4.0, 2.0, at_least=True)])
    0.5
    """
    pairs = [(row.limit, row.measured)[:: 1 if row.at_least else -1] for row in rows]
    return max(above / below if below else math.inf if above else 0.0 for above, below in pairs)


def command_line(doc: str) -> argparse.ArgumentParser:
    """A script's command line, described by its docstring.

    >>> command_line("What it measures.").parse_args([])
    Namespace()
    """
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
