"""Cached tiles for training: verify them, load them as samples.

verify: check every tile's file and delete the bad ones, so that the next prepare makes exactly
those again. PrecomputedDataset: the cache as tiles to learn from, each with the turn that is drawn
for it. Collate: batches of them, with image, features and label turned alike; tiles are mapped into
memory, not read, so that what a batch does not need stays on the disk, and no value moves twice.
"""

import os
import random
import weakref
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
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, get_worker_info

from config import Augmentations, Splits, Train
from utils.artefacts import NAME, sweep
from utils.cache import (
    MANIFEST,
    CacheError,
    Manifest,
    TileError,
    check_shapes,
    check_tile,
    load_tile,
    read_manifest,
    tile_names,
    tile_path,
)
from utils.distributed import Runtime
from utils.footprints import footprints, write_sides
from utils.locks import HOLDER, LOCK
from utils.logging import VerbosityLogger
from utils.process import serve_parent
from utils.sampling import balanced_order
from utils.splits import Split, audit, split_by_blocks, split_by_lists, split_by_regions
from utils.turns import Turn

SIDES = "splits.geojson"
STRIP = 64  # columns: a quarter turn of bytes reads whole columns, which a cache holds in strips
KEPT = 64  # pieces of batches' memory to hold on to


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
    """Check every cached tile, or some; delete the bad ones and return their names.

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
    deleted = sorted(name for _, part in parts for name in part)
    log.info(f"verify: {sum(count for count, _ in parts)} tiles checked, {len(deleted)} deleted")
    return deleted


def some_of(names: Sequence[str], most: int = 3) -> str:
    """The first of some names.

    >>> some_of(["a", "b", "c", "d"])
    'a, b, c, ...'
    """
    return ", ".join([*names[:most], *["..."] * (len(names) > most)])


def foreign_files(folder: Path, tiles: Sequence[str]) -> list[str]:
    """What lies in a cache's folder that neither prepare nor training puts there."""
    own = {f"{name}.pt" for name in tiles} | {MANIFEST, SIDES, LOCK, HOLDER}
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

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Drawn:
        weighs = index >= 0
        visit, position = divmod(index if weighs else -1 - index, len(self.names))
        name = self.names[position]
        path = tile_path(self.folder, name)
        try:
            content = load_tile(path, mmap=True)
            check_shapes(path.name, content, self.manifest)
        except (TileError, FileNotFoundError) as error:
            raise CacheError(
                f"{path}: missing or damaged ({error}); run prepare and verify again"
            ) from error
        view, turn, features_turn = self.draw(visit, position)
        levels = len(self.manifest.layers)
        for part in {"features", "scales"} & set(content):
            content[part] = content[part][view * levels : (view + 1) * levels]
        return Drawn(name, content, turn, features_turn, weighs)

    def draw(self, visit: int, position: int) -> tuple[int, Turn, Turn]:
        """The number of a cached view, and what is left to turn of image and features."""
        if self.augmentations is None:
            return 0, Turn(), Turn()
        if len(self.views) > 1:
            view = random.Random(f"{self.seed} {visit} {position}").randrange(len(self.views))
            return view, self.views[view], Turn()
        turn = draw_turn(self.augmentations, self.seed, visit, position)
        return 0, turn, turn


class Memory:
    """Memory for batches, used again when nobody holds the batch that was in it.

    The pages of fresh memory cost more than what is copied into them.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[np.ndarray, weakref.ref]] = []  # and what tensors made of it hold

    def take(self, nbytes: int) -> Tensor:
        """So many bytes; in a worker process shared with the one that trains.

        >>> memory = Memory()
        >>> first = memory.take(8)
        >>> memory.take(8).data_ptr() == first.data_ptr()       # `first` is in use, its memory too
        False
        """
        if get_worker_info() is not None:  # as torch's own collation does
            shared = torch.UntypedStorage._new_shared(nbytes)
            return torch.empty(0, dtype=torch.uint8).set_(shared, 0, (nbytes,))
        unused = (pair for pair in self.kept if pair[0].nbytes == nbytes and pair[1]() is None)
        pair = next(unused, None)
        memory = np.empty(nbytes, np.uint8) if pair is None else pair[0]
        lent = memory.view()
        others = [other for other in self.kept if other is not pair]
        self.kept = [*others[1 - KEPT :], (memory, weakref.ref(lent))]
        return torch.from_numpy(lent)


class Collate:
    """Batches of drawn tiles, laid as was drawn: each value is copied once."""

    def __init__(self, ignore_index: int) -> None:
        self.ignore_index = ignore_index
        self.memory = Memory()

    def __call__(self, drawn: Sequence[Drawn]) -> Sample:
        turns = [each.turn for each in drawn]
        own_turns = [each.features_turn for each in drawn]
        images, labels = ([each.content[part] for each in drawn] for part in ("image", "label"))
        levels = zip(*(each.content.get("features", ()) for each in drawn), strict=True)
        features = [self.batch(level, own_turns, channels_last=True) for level in levels]
        image, label = self.batch(images, turns), self.batch(labels, turns)
        for own, each in zip(label, drawn, strict=True):
            if not each.weighs:
                own.fill_(self.ignore_index)
        scales = zip(*(each.content.get("scales", ()) for each in drawn), strict=True)
        names = [each.name for each in drawn]
        return Sample(image, features, label, names, [torch.stack(level) for level in scales])

    def batch(
        self, tensors: Sequence[Tensor], turns: Sequence[Turn], channels_last: bool = False
    ) -> Tensor:
        """Tensors of one shape, each turned, in memory of rows or of channels.

        >>> tiles = [torch.tensor([[1, 2], [3, 4]])] * 2
        >>> Collate(255).batch(tiles, [Turn(), Turn(quarters=1)]).tolist()
        [[[1, 2], [3, 4]], [[2, 4], [1, 3]]]
        """
        like, count = tensors[0], len(tensors)
        memory = self.memory.take(count * like.nbytes).view(like.dtype)
        if channels_last:
            channels, rows, cols = like.shape
            batch = memory.view(count, rows, cols, channels).permute(0, 3, 1, 2)
        else:
            batch = memory.view(count, *like.shape)
        for target, tensor, turn in zip(array_of(batch), tensors, turns, strict=True):
            source = turn.view(array_of(tensor))
            for start in range(0, source.shape[-1], STRIP):
                target[..., start : start + STRIP] = source[..., start : start + STRIP]
        return batch


def array_of(tensor: Tensor) -> np.ndarray:
    """A tensor's memory as a NumPy array; bfloat16, which NumPy lacks, as the bits of its values.

    >>> array_of(torch.ones(2, dtype=torch.bfloat16)).dtype
    dtype('int16')
    """
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


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


class Loaders(NamedTuple):
    """Batches to learn from, in the order of `sampler.epoch`, and batches to validate on."""

    train: DataLoader
    val: DataLoader
    sampler: EpochSampler


def make_loaders(
    split: Split, manifest: Manifest, section: Train, augmentations: Augmentations, seed: int,
    run: Runtime,
) -> Loaders:  # fmt: skip
    """This rank's loaders: as many training batches as any rank, a share of the validation."""
    folder = section.processed_dir
    train = PrecomputedDataset(folder, manifest, split.train, augmentations, seed)
    val = PrecomputedDataset(folder, manifest, split.val)
    order = partial(uniform_order, len(train), seed)
    if section.sampler == "balanced":
        counts = torch.tensor([manifest.tiles[name] for name in split.train])
        order = partial(balanced_order, counts, len(train), seed)
    sampler = EpochSampler(order, len(train), len(train), run.rank, run.world_size)
    shared = {
        "batch_size": section.batch_size,
        "num_workers": section.num_workers,
        "persistent_workers": section.num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _start_worker,
        "collate_fn": Collate(manifest.ignore_index),
    }
    return Loaders(
        DataLoader(train, sampler=sampler, **shared),
        DataLoader(Subset(val, run.share(range(len(val)))), **shared),
        sampler,
    )
