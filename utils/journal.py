"""Finished rows of a map that is still being made, so that a killed run does not start over.

A hidden folder beside the map holds a file for each finished row of tiles: its rows of every
raster, as they lie in memory, and their CRC-32. Its name says of which plan it is, by a hash of all
that the rows depend on; how large it must be is known. Rows of another plan are deleted.
"""

import contextlib
import hashlib
import json
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from utils.artefacts import plain_bytes, write_artefact
from utils.locks import alone_in

NAME = re.compile(r"c(\d{8})_r(\d{8})_([0-9a-f]{16})\.rows")
CHECKSUM = 4  # bytes

Place = tuple[int, int]  # the first column and row


class Stored(NamedTuple):
    """The rows of one raster: (bands, rows, columns), and their type."""

    shape: tuple[int, int, int]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes that they take.

        >>> Stored((1, 384, 700), "uint8").nbytes
        268800
        """
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def journal_folder(output: Path) -> Path:
    """The hidden folder of a map's journal.

    >>> journal_folder(Path("maps/north.tif")).as_posix()
    'maps/.north.tif.resume'
    """
    return output.with_name(f".{output.name}.resume")


@contextlib.contextmanager
def journal_held(output: Path, key: str) -> Iterator[None]:
    """Hold a map's journal against other runs; `key` names the setting of the map's path.

    One without a row does not stay.
    """
    folder = journal_folder(output)
    with alone_in(folder, key):
        try:
            yield
        finally:
            if not any(folder.glob("*.rows")):
                shutil.rmtree(folder, ignore_errors=True)


class Journal:
    """The rows that are finished, by the first column and row of each.

    plan: all that they depend on; wanted: every row that the map will have, raster by raster.

    >>> from tempfile import TemporaryDirectory
    >>> wanted = {(0, 0): [Stored((1, 384, 700), "uint8")], (0, 384): []}
    >>> with TemporaryDirectory() as folder:
    ...     path, rows = Path(folder, "map.tif"), [np.ones((1, 384, 700), np.uint8)]
    ...     Journal(path, {"tile": 512}, wanted).keep((0, 0), rows)
    ...     again = Journal(path, {"tile": 512}, wanted).places
    ...     again, Journal(path, {"tile": 256}, wanted).places
    ({(0, 0)}, set())
    """

    def __init__(
        self, output: Path, plan: Mapping[str, Any], wanted: Mapping[Place, Sequence[Stored]]
    ) -> None:
        self.folder, self.wanted = journal_folder(output), wanted
        text = json.dumps(plan, sort_keys=True)
        self._plan = hashlib.sha256(text.encode()).hexdigest()[:16]
        found = ((path, NAME.fullmatch(path.name)) for path in self.folder.glob("c*"))
        self.places = {
            place for path, name in found if name and (place := self._place(path, name)) is not None
        }

    def _place(self, path: Path, name: re.Match[str]) -> Place | None:
        """The place of a row that is whole and of this plan; another one is deleted."""
        place = int(name[1]), int(name[2])
        if name[3] == self._plan and place in self.wanted:
            try:
                self.read(place)
                return place
            except ValueError:
                pass
        path.unlink(missing_ok=True)
        return None

    def _path(self, place: Place) -> Path:
        col, row = place
        return self.folder / f"c{col:08d}_r{row:08d}_{self._plan}.rows"

    def keep(self, place: Place, rows: Sequence[np.ndarray]) -> None:
        """Add finished rows, one array (bands, n, width) for each raster."""

        def write(file: BinaryIO) -> None:
            checksum = 0
            for part in map(np.ascontiguousarray, rows):
                file.write(part.data)
                checksum = zlib.crc32(part, checksum)
            file.write(checksum.to_bytes(CHECKSUM, "little"))

        write_artefact(self._path(place), write)

    def read(self, place: Place) -> list[np.ndarray]:
        """Rows that were kept; ValueError where they are not whole."""
        wanted = self.wanted[place]
        size = sum(part.nbytes for part in wanted)
        stored = plain_bytes(self._path(place), size + CHECKSUM)
        content, checksum = memoryview(stored)[:size], stored[size:]
        if zlib.crc32(content).to_bytes(CHECKSUM, "little") != checksum:
            raise ValueError("cut short, or not what its checksum is of")
        rows, start = [], 0
        for part in wanted:
            values = np.frombuffer(content[start : start + part.nbytes], part.dtype)
            rows.append(values.reshape(part.shape))
            start += part.nbytes
        return rows

    def discard(self) -> None:
        """Delete the folder: the map is whole."""
        shutil.rmtree(self.folder, ignore_errors=True)
