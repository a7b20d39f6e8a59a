"""Peak memory of mapping scenes of any shape, each in a process of its own.

    python -m benchmarks.memory                                  30000x4000 and 4000x30000 pixels
    python -m benchmarks.memory 4096x4096 4096x20480 --classes 6 --null

Sides are width x height. The network is a tiny backbone with the linear head; --null leaves it out.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.meter import MB, apart
from benchmarks.rows import Row, command_line, report
from benchmarks.workload import load, map_anew, null_map, write_project, write_rasters

SHAPES = ((30000, 4000), (4000, 30000))
LIMIT = 2000  # MB


def measure(
    shapes: Sequence[tuple[int, int]] = SHAPES, classes: int = 2, null: bool = False
) -> list[Row]:
    """A row for each shape (width, height)."""
    rows = []
    for width, height in shapes:
        with TemporaryDirectory() as folder:
            model = {"num_classes": classes, "head": "linear"}
            path = write_project(Path(folder), "tiny", model=model)
            load(path)
            overrides = write_rasters(Path(folder), height, width)
            peak = apart(null_map if null else map_anew, path, overrides).peak / MB
            what = f"memory: mapping {width} wide, {height} tall, {classes} classes"
            rows.append(Row(what, peak, LIMIT, "MB"))
    return rows


def shape(text: str) -> tuple[int, int]:
    """Width and height from a word such as 30000x4000.

    >>> shape("30000x4000")
    (30000, 4000)
    """
    sides = text.split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"found {text}, expected WIDTHxHEIGHT in pixels")
    return int(sides[0]), int(sides[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the ratio."""
    parser = command_line(__doc__)
    parser.add_argument("shapes", nargs="*", type=shape, metavar="WIDTHxHEIGHT")
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--null", action="store_true", help="a network that returns constants")
    options = parser.parse_args(arguments)
    report(measure(options.shapes or SHAPES, options.classes, options.null))
    return 0


if __name__ == "__main__":
    sys.exit(main())
