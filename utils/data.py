"""Cached tiles for training: verify them, load them as samples.

verify: check every tile's file and delete the bad ones, so that the next prepare makes exactly
those again. PrecomputedDataset: the cache as tiles to learn from, each with the turn that is drawn
for it. EpochSampler: a rank's share of them, in an epoch's order. `utils.loading` makes batches.
"""

import os
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from config import Augmentations, Splits, Train
from utils.artefacts import NAME, sweep
from utils.cache import (
    Places,
    TileError,
    check_tile,
    map_tile,
    places_in,
    tile_names,
    tile_path,
)
from utils.distributed import Runtime
from utils.footprints import footprints, write_sides
from utils.locks import HOLDER, LOCK
from utils.logging import VerbosityLogger
from utils.manifest import COPY, MANIFEST, CacheError, Manifest, read_manifest
from utils.process import serve_parent
from utils.splits import Split, audit, split_by_blocks, split_by_lists, split_by_regions
from utils.turns import Turn

SIDES = "splits.geojson"


class Sample(NamedTuple):
    """A batch of tiles.

    image (B, bands, S, S) uint8 as stored; features one (B, channels, S/16, S/16) map per level, in
    channels-last memory, none from a cache of tiles; label (B, S, S) class ids; scales (B, 2,
    channels) per level, if features are int8.
    """

    image: Tensor
    features: list[Tensor]
    label: Tensor
    name: list[str]
    scales: Sequence[Tensor] = ()


class Drawn(NamedTuple):
    """A tile that was drawn: of its file the drawn view, and how that is to be laid.

    turn is for image and label, features_turn for the features, which may be of the turned tile as
    they are; weighs: whether the label counts.
    """

    name: str
    content: dict[str, Any]
    turn: Turn
    features_turn: Turn
    weighs: bool


def verify(
    folder: Path, workers: int, run: Runtime, log: VerbosityLogger,
    only: Collection[str] | None = None,
) -> list[str]:  # fmt: skip
    """Check every cached tile, or some; delete the bad ones, return the names of all that lack.

    Only a tile's content condemns it. Trouble of the reader (permissions, memory, a failing disk)
    ends the phase and deletes nothing more. Files that are no tiles of this cache are kept.
    """
    manifest = read_manifest(folder)
    found = tile_names(folder, manifest)
    if not found:
        raise CacheError(f"{folder}: holds no tile; run prepare again")
    if run.is_main and (others := foreign_files(folder, found)):
        log.info(f"verify: {len(others)} files of other origin are kept: {some_of(others)}")
    names = run.share([name for name in found if only is None or name in only])
    paths, bad = [tile_path(folder, name) for name in names], []
    with _mapper(min(workers, len(paths))) as check_all:
        faults = check_all(partial(_fault, manifest=manifest), paths)
        work = log.progress(faults, "verify", total=len(paths), unit="tile", every=50)
        for path, fault in run.beating(zip(paths, work, strict=True)):
            if fault is not None:
                path.unlink(missing_ok=True)
                bad.append(path.stem)
                log.warning(f"verify: deleted {fault}")
    run.wait()
    parts = run.gather((len(paths), bad))
    deleted = {name for _, part in parts for name in part}
    log.info(f"verify: {sum(count for count, _ in parts)} tiles checked, {len(deleted)} deleted")
    missing = set(manifest.tiles if only is None else only) - set(found)
    return sorted(deleted | missing)


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first of some names.

    >>> some_of(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])


def foreign_files(folder: Path, tiles: Sequence[str]) -> list[str]:
    """What lies in a cache's folder that neither prepare nor training puts there."""
    own = {f"{name}.pt" for name in tiles} | {MANIFEST, COPY, SIDES, LOCK, HOLDER}
    with os.scandir(folder) as entries:
        names = {each.name for each in entries}
    return sorted(name for name in names - own if not NAME.match(name))


def _fault(path: Path, manifest: Manifest) -> str | None:
    """What is wrong with a tile's file, or None."""
    try:
        check_tile(path, manifest)
    except TileError as error:
        return str(error)
    return None


def _start_worker(_: int) -> None:
    """In a process that reads tiles: one thread, and the parent decides when it ends."""
    serve_parent()
    torch.set_num_threads(1)


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator]]:
    """`map` over worker processes, or in this process where one is enough."""
    if workers <= 1:
        yield map
        return
    pool = ProcessPoolExecutor(
        workers, get_context("fork"), initializer=_start_worker, initargs=(0,)
    )
    try:
        yield partial(pool.map, chunksize=4)
    finally:
        pool.shutdown(cancel_futures=True)


def draw_turn(settings: Augmentations, seed: int, visit: int, index: int) -> Turn:
    """The turn of a tile at a visit: the same for the same numbers, on any rank and worker.

    >>> off = Augmentations(hflip=False, vflip=False, rotate90=False)
    >>> draw_turn(off, seed=0, visit=3, index=7)
    Turn(hflip=False, vflip=False, quarters=0)
    """
    dice = random.Random(f"{seed} {visit} {index}")
    hflip, vflip, quarters = dice.random() < 0.5, dice.random() < 0.5, dice.randrange(4)
    if not settings.enable:
        return Turn()
    return Turn(
        hflip and settings.hflip, vflip and settings.vflip, quarters if settings.rotate90 else 0
    )


class PrecomputedDataset(Dataset[Drawn]):
    """Cached tiles as they are drawn.

    An index past the length is a later visit to the same tile: `visit * len + position`, so that
    worker processes need not be told the epoch. A negative index, -1 less the tile's own, is the
    tile without a label. augmentations: None for validation.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        names: Sequence[str],
        augmentations: Augmentations | None = None,
        seed: int = 0,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.views = [Turn(*view) for view in manifest.views]
        self.names = list(names)
        self.augmentations = augmentations
        self.seed = seed
        self._places: dict[str, Places] = {}  # of tiles that this run has looked at

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Drawn:
        weighs = index >= 0
        visit, position = divmod(index if weighs else -1 - index, len(self.names))
        name = self.names[position]
        content = self._content_of(name)
        view, turn, features_turn = self.draw(visit, position)
        levels = len(self.manifest.layers)
        for part in {"features", "scales"} & set(content):
            content[part] = content[part][view * levels : (view + 1) * levels]
        return Drawn(name, content, turn, features_turn, weighs)

    def _content_of(self, name: str) -> dict[str, Tensor]:
        """A tile's tensors; its bytes are checked at the first visit, and where they changed."""
        path, places = tile_path(self.folder, name), self._places.get(name)
        try:
            while places is None or (content := map_tile(path, self.manifest, places)) is None:
                self._places[name] = places = places_in(path, self.manifest)
        except (TileError, FileNotFoundError) as error:
            raise CacheError(
                f"{path}: missing or damaged ({error}); run prepare and verify again"
            ) from error
        return content

    def draw(self, visit: int, position: int) -> tuple[int, Turn, Turn]:
        """The number of a cached view, and what is left to turn of image and features."""
        if self.augmentations is None:
            return 0, Turn(), Turn()
        if len(self.views) > 1:
            view = random.Random(f"{self.seed} {visit} {position}").randrange(len(self.views))
            return view, self.views[view], Turn()
        turn = draw_turn(self.augmentations, self.seed, visit, position)
        return 0, turn, turn


def uniform_order(length: int, seed: int, epoch: int) -> list[int]:
    """Every tile once, in an order of the epoch's own.

    >>> sorted(uniform_order(4, seed=0, epoch=1))
    [0, 1, 2, 3]
    """
    order = list(range(length))
    random.Random(f"{seed} {epoch}").shuffle(order)
    return order


class EpochSampler(Sampler[int]):
    """A rank's share of each epoch's order, as indices of PrecomputedDataset.

    order: tile positions by epoch, `length` of them among `tiles`. Step s of all ranks together is
    the same set of tiles that one process with the global batch would take. Ranks that come too
    short take a tile again that weighs nothing: a negative index, one less than minus its own.

    >>> sampler = EpochSampler(lambda epoch: [2, 0, 1], length=3, tiles=3, rank=1, world_size=2)
    >>> list(sampler)            # step 1, tile 0; then tile 2 again, as step 3 and unlabelled
    [3, -12]
    """

    def __init__(
        self, order: Callable[[int], list[int]], length: int, tiles: int, rank: int, world_size: int
    ) -> None:
        self.order, self.length, self.tiles = order, length, tiles
        self.rank, self.world_size = rank, world_size
        self.epoch = self.skipped = 0  # skipped: of this rank's indices, those done before

    def __len__(self) -> int:
        return -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[int]:
        order = self.order(self.epoch)
        first = self.rank + self.skipped * self.world_size
        for step in range(first, len(self) * self.world_size, self.world_size):
            visit = self.epoch * self.length + step  # a tile drawn twice is not turned alike
            index = visit * self.tiles + order[step % self.length]
            yield index if step < self.length else -1 - index


def load_split(
    section: Train, lists: Splits, seed: int, run: Runtime, log: VerbosityLogger
) -> tuple[Manifest, Split]:
    """The cache that training reads and the two sides of its tiles."""
    folder = section.processed_dir
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise CacheError(f"{folder}: prepare did not finish here; run it again")
    names = [name for name in tile_names(folder, manifest) if name in manifest.tiles]
    if missing := sorted(set(manifest.tiles) - set(names)):
        raise CacheError(
            f"{folder}: {len(missing)} of {len(manifest.tiles)} tiles are missing, {missing[0]} "
            "first; run prepare again (prepare.enable: true), it makes exactly those"
        )
    if not names:
        raise CacheError(f"{folder}: holds no tile; run prepare again")
    places = footprints(names, manifest)
    counts = np.array([manifest.tiles[name] for name in names])
    if lists.regions is not None:
        split = split_by_regions(places, lists.regions, log)
    elif lists.train_list is not None and lists.val_list is not None:
        split = split_by_lists(places, lists.train_list, lists.val_list)
    else:
        split = split_by_blocks(places, counts, section.val_fraction, lists, seed)
    if run.is_main:
        sweep(folder)
        write_sides(folder / SIDES, places, split.sides(), manifest.tiles)
    audit(split, places, counts, manifest.class_names, log)
    return manifest, split
