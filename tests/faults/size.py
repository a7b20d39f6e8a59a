"""How much a fault test does: little in `make test`, all of it in `make faults`."""

import json
import os
from pathlib import Path

WHOLE = os.environ.get("DINOV3SEG_FAULTS") == "whole"


def sized(quick: int, whole: int) -> int:
    """The number of repetitions: `whole` where $DINOV3SEG_FAULTS says so, else `quick`."""
    return whole if WHOLE else quick


def figure(name: str, text: str) -> None:
    """Put a test's figure in the table at the end of `make faults`."""
    table = os.environ.get("DINOV3SEG_FAULTS_TABLE")
    if table:
        with Path(table).open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, text]) + "\n")
