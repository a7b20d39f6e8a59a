"""Measured figures beside their limits, and how they are shown."""

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


def print_ratio(ratio: float) -> None:
    """Print a script's last line.

    >>> print_ratio(1.0214)
    ratio: 1.021
    """
    say(f"ratio: {ratio:.3f}")


def figure(number: float) -> str:
    """A number with as many digits as are worth reading.

    >>> figure(1.02143), figure(12.345), figure(1345.6), figure(0.0)
    ('1.021', '12.3', '1346', '0')
    """
    if number == 0:
        return "0"
    if abs(number) < 1.2:
        return f"{number:.3f}"
    digits = 2 if abs(number) < 10 else 1 if abs(number) < 100 else 0
    return f"{number:.{digits}f}"


def furthest(rows: Sequence[Row]) -> float:
    """The largest share that a row takes of its limit: at most 1 where all are within.

    >>> furthest([Row("a", 1.0, 2.0), Row("b", 4.0, 2.0, at_least=True)])
    0.5
    """
    shares = [row.limit / row.measured if row.at_least else row.measured / row.limit
              for row in rows]  # fmt: skip
    return max(shares)
