"""Every benchmark that needs no GPU, one after the other, and one table at the end.

    python -m benchmarks                     all of them, about twenty minutes on two cores
    python -m benchmarks prepare inference   some

Beside each script stands how long the machine took for the same small piece of work before and
after it: where that is longer, others used the machine, and figures in seconds are too high. The
exit code is 1 where a figure is outside its limit.
"""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.meter import apart, pace_of_machine, rows_of
from benchmarks.rows import Row, command_line, print_table
from utils.logging import duration, say

NO_SCRIPTS = {"__init__", "__main__", "meter", "rows", "scenes", "workload", "gpu"}


def scripts() -> list[str]:
    """The scripts of this folder, by name.

    >>> {"prepare", "inference", "loader"} <= set(scripts())
    True
    """
    return sorted({path.stem for path in Path(__file__).parent.glob("*.py")} - NO_SCRIPTS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run scripts, each in a process of its own; 1 where a figure is outside its limit."""
    parser = command_line(__doc__)
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT", help=", ".join(scripts()))
    wanted = parser.parse_args(arguments).scripts or scripts()
    if unknown := set(wanted) - set(scripts()):
        parser.error(f"no such script: {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    for name in wanted:
        start, before = time.monotonic(), pace_of_machine()
        rows += apart(rows_of, f"benchmarks.{name}")
        took = duration(time.monotonic() - start)
        say(
            f"{name}: measured in {took}; copy and checksum of 4 MB {before:.2f} ms before it, "
            f"{pace_of_machine():.2f} after"
        )
    print_table(rows)
    within = sum(row.ok for row in rows)
    say(f"{within} of {len(rows)} within")
    return int(within < len(rows))


if __name__ == "__main__":
    sys.exit(main())
