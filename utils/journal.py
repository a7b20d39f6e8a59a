"""Finished rows of a map that is still being made, so that a killed run does not start over.

A hidden folder beside the map holds what the map is to be (plan.json) and a file for each finished
row of tiles: its rows of every raster, as stored. A run with another plan starts anew.
"""

import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from utils.artefacts import write_artefact

PLAN = "plan.json"
DAMAGE = (OSError, ValueError, EOFError, LookupError, zipfile.BadZipFile, zlib.error)


def journal_folder(output: Path) -> Path:
    """The hidden folder of a map's journal.

    >>> journal_folder(Path("maps/north.tif")).as_posix()
    'maps/.north.tif.resume'
    """
    return output.with_name(f".{output.name}.resume")


class Journal:
    """The rows that are finished, by the first column and row of each.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path, rows = Path(folder, "map.tif"), [np.ones((1, 384, 700), np.uint8)]
    ...     Journal(path, {"tile": 512}).keep((0, 0), rows)
    ...     again, other = Journal(path, {"tile": 512}), Journal(path, {"tile": 256})
    ...     again.places, other.places
    ({(0, 0)}, set())
    """

    def __init__(self, output: Path, plan: Mapping[str, Any]) -> None:
        self.folder = journal_folder(output)
        self._text = json.dumps(plan, sort_keys=True).encode()
        self._begun = self._found() == self._text
        if not self._begun:
            self.discard()
        self.places = {
            place for path in self.folder.glob("*.npz") if (place := self._place(path)) is not None
        }

    def _found(self) -> bytes | None:
        try:
            return (self.folder / PLAN).read_bytes()
        except OSError:
            return None

    def _path(self, place: tuple[int, int]) -> Path:
        col, row = place
        return self.folder / f"c{col:08d}_r{row:08d}.npz"

    def _place(self, path: Path) -> tuple[int, int] | None:
        """The place of a row whose file is whole; a damaged one is deleted."""
        try:
            col, row = (int(part[1:]) for part in path.stem.split("_"))
            self._read(path)
        except DAMAGE:
            path.unlink(missing_ok=True)
            return None
        return col, row

    def _read(self, path: Path) -> list[np.ndarray]:
        with np.load(path, allow_pickle=False) as stored:  # checks each member's CRC
            return [stored[f"arr_{number}"] for number in range(len(stored.files))]

    def keep(self, place: tuple[int, int], rows: Sequence[np.ndarray]) -> None:
        """Add finished rows, one array (bands, n, width) for each raster."""
        if not self._begun:
            write_artefact(self.folder / PLAN, self._text)
            self._begun = True
        write_artefact(self._path(place), lambda file: np.savez(file, *rows))

    def read(self, place: tuple[int, int]) -> list[np.ndarray]:
        """Rows that were kept."""
        return self._read(self._path(place))

    def discard(self) -> None:
        """Delete the folder: the map is whole, or another one is wanted."""
        shutil.rmtree(self.folder, ignore_errors=True)
