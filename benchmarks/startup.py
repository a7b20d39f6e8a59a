"""CPU time before anything is computed: `--help`, and the first tile of each phase.

    python -m benchmarks.startup

The program runs whole, on a scene of one tile with a tiny backbone in a local folder. It has been
started before, so Python finds its modules compiled, as it does at all but a user's first start.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.meter import seconds_of
from benchmarks.rows import Row, command_line, report
from benchmarks.workload import TILE, load, write_project, write_rasters

ROOT = Path(__file__).parent.parent
PREPARE, TRAIN, INFERENCE = (f"{phase}.enable=" for phase in ("prepare", "train", "inference"))


def measure(runs: int = 3) -> list[Row]:
    """Rows for `--help`, and for the first tile of prepare and of inference."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        train = {"epochs": 1, "num_workers": 0, "weights_dir": "weights"}
        path = write_project(folder, "tiny", model={"head": "linear"}, train=train)
        load(path)
        many = write_rasters(folder, 2 * TILE, 2 * TILE)
        run(path, *many, TRAIN + "true", "paths.processed_dir=" + str(folder / "trained"))
        one = write_rasters(folder, TILE, TILE)
        first = [run(path, *one, f"paths.processed_dir={folder / str(n)}") for n in range(runs)]
        mapped = [run(path, *one, PREPARE + "false", INFERENCE + "true") for _ in range(runs)]
    helped = [program("--help") for _ in range(2 * runs + 1)]
    return [
        Row("start: --help", median(helped), 0.5, "s"),
        Row("start: first tile of prepare, tiny backbone", median(first), 5, "s"),
        Row("start: first tile of inference, tiny backbone", median(mapped), 5, "s"),
    ]


def run(path: Path, *overrides: str) -> float:
    """CPU seconds of a whole run of the program with a configuration."""
    return program(str(path), *(part for each in overrides for part in ("--set", each)))


def program(*arguments: str) -> float:
    """CPU seconds of the program, from the process's start to its end."""
    command = [sys.executable, str(ROOT / "main.py"), *arguments]
    surroundings = os.environ | {"HF_HUB_OFFLINE": "1"}
    surroundings.pop("PYTHONDONTWRITEBYTECODE", None)
    return seconds_of(
        lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=surroundings)
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the ratio."""
    parser = command_line(__doc__)
    parser.add_argument("--runs", type=int, default=3)
    report(measure(parser.parse_args(arguments).runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
