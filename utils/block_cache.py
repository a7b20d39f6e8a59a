"""GDAL's cache of decoded blocks: small, but never too small for the scenes of a run.

GDAL's own size is 5 % of the memory, and a tall scene fills it. 32 MB are enough for scenes stored
in tiles. Of one stored in strips, as wide as the scene, a row of our tiles needs all it lies in.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from config import Config
from utils.opening import RasterError, open_raster
from utils.scenes import files_of

LEAST = "32"  # MB; what `utils.process` sets before GDAL is loaded
KEY = "GDAL_CACHEMAX"


def make_room(config: Config) -> None:
    """Enlarge the cache where a scene or label raster of the run needs it, to at most 1/4 of the
    memory. To be called before the first pixel is read: GDAL looks at the size once. A size that
    the user has set stays.
    """
    if os.environ.get(KEY) != LEAST:
        return
    needed = 0
    for sources, rows, readers in _read_by(config):
        needed = max([needed, *(readers * each for each in _bytes_of_rows(sources, rows))])
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = int(min(needed, memory / 4) / 1e6)
    os.environ[KEY] = str(max(int(LEAST), wanted))


def _read_by(config: Config) -> Iterator[tuple[Path | Sequence[Path], int, int]]:
    """What the enabled phases read, by how many rows, with how many threads."""
    prepare, inference = config.prepare, config.inference
    if prepare.enable:
        for sources in (prepare.raw_images_dir, prepare.label_path):
            yield sources, prepare.tile_size, prepare.readers
    if inference.enable:
        yield inference.input_tif, inference.tile_size, inference.readers


def _bytes_of_rows(sources: Path | Sequence[Path], rows: int) -> Iterator[int]:
    for source in [sources] if isinstance(sources, Path) else sources:
        try:
            paths = [path for _, path in files_of(source, "")]
        except RasterError:
            continue  # the phase that needs it will say so
        for path in paths:
            try:
                with open_raster(path) as dataset:
                    yield bytes_of_strips(dataset, rows)
            except RasterError:
                continue


def bytes_of_strips(dataset: Any, rows: int) -> int:
    """Decoded bytes of the strips that some rows of a raster lie in; 0 where it is stored in tiles.

    >>> from types import SimpleNamespace
    >>> raw = SimpleNamespace(width=35000, block_shapes=[(1, 35000)] * 4, dtypes=["uint16"] * 4)
    >>> bytes_of_strips(raw, rows=512) / 1e6
    143.64
    """
    high, wide = dataset.block_shapes[0]
    if wide < dataset.width:
        return 0
    lines = (-(-rows // high) + 1) * high
    return lines * dataset.width * sum(np.dtype(kind).itemsize for kind in dataset.dtypes)
