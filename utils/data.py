"""Cached tiles for training: verify them, load them as samples.

verify: check every tile's file and delete the bad ones, so that the next prepare makes exactly
those again. PrecomputedDataset: the cache as samples, with flips and quarter turns applied alike to
image, features and label.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from config import Augmentations, Splits, Train
from utils.cache import (
    CacheError,
    Manifest,
    TileError,
    check_tile,
    load_tile,
    read_manifest,
    tile_names,
    tile_path,
)
from utils.distributed import Runtime
from utils.logging import VerbosityLogger
from utils.splits import Split, split_by_blocks, split_by_lists


class Sample(NamedTuple):
    """One tile, or after collation a batch of them.

    image (3, S, S) uint8 as stored; features one (channels, S/16, S/16) half map per level; label
    (S, S) class ids. A batch has a leading axis in each tensor and a list of names.
    """

    image: Tensor
    features: list[Tensor]
    label: Tensor
    name: str | list[str]


def verify(folder: Path, workers: int, run: Runtime, log: VerbosityLogger) -> None:
    """Check every cached tile; delete the bad ones, so that the next prepare makes them again.

    Only a tile's content condemns it. Trouble of the reader (permissions, memory, a failing disk)
    ends the phase and deletes nothing.
    """
    manifest = read_manifest(folder)
    names = run.share(tile_names(folder, manifest))
    paths = [tile_path(folder, name) for name in names]
    bad = 0
    with _mapper(min(workers, len(paths))) as check_all:
        found = check_all(partial(_fault, manifest=manifest), paths)
        work = log.progress(found, "verify", total=len(paths), unit="tile", every=50)
        for path, fault in zip(paths, work, strict=True):
            if fault is not None:
                path.unlink()
                bad += 1
                log.warning(f"verify: deleted {fault}")
    checked, bad = run.sum(torch.tensor([len(paths), bad])).tolist()
    log.info(f"verify: {checked} tiles checked, {bad} deleted")
    if checked == bad:
        raise CacheError(f"{folder}: no sound tile left; run prepare again")


def _fault(path: Path, manifest: Manifest) -> str | None:
    """What is wrong with a tile's file, or None."""
    try:
        check_tile(path, manifest)
    except TileError as error:
        return str(error)
    return None


@contextmanager
def _mapper(workers: int) -> Iterator[Callable[..., Iterator]]:
    """`map` over worker processes, or in this process where one is enough."""
    if workers <= 1:
        yield map
        return
    pool = ProcessPoolExecutor(
        workers, get_context("fork"), initializer=torch.set_num_threads, initargs=(1,)
    )
    try:
        yield partial(pool.map, chunksize=4)
    finally:
        pool.shutdown(cancel_futures=True)


@dataclass(frozen=True, slots=True)
class Turn:
    """One of the eight ways to lay a square tile: mirror, then quarter turns.

    >>> image = torch.tensor([[1, 2], [3, 4]])
    >>> Turn(hflip=True, vflip=False, quarters=0).apply(image).tolist()
    [[2, 1], [4, 3]]
    >>> Turn(hflip=False, vflip=False, quarters=1).apply(image).tolist()
    [[2, 4], [1, 3]]
    """

    hflip: bool
    vflip: bool
    quarters: int

    def apply(self, tensor: Tensor) -> Tensor:
        """The tensor with its last two axes (rows, columns) mirrored and turned."""
        axes = [axis for axis, wanted in ((-1, self.hflip), (-2, self.vflip)) if wanted]
        return torch.rot90(tensor.flip(axes), self.quarters, (-2, -1))


def draw_turn(settings: Augmentations, seed: int, epoch: int, index: int) -> Turn:
    """The turn of a tile in an epoch: the same for the same numbers, on any rank and worker.

    >>> off = Augmentations(hflip=False, vflip=False, rotate90=False)
    >>> draw_turn(off, seed=0, epoch=3, index=7)
    Turn(hflip=False, vflip=False, quarters=0)
    """
    dice = random.Random(f"{seed} {epoch} {index}")
    hflip, vflip, quarters = dice.random() < 0.5, dice.random() < 0.5, dice.randrange(4)
    if not settings.enable:
        return Turn(False, False, 0)
    return Turn(
        hflip and settings.hflip, vflip and settings.vflip, quarters if settings.rotate90 else 0
    )


class PrecomputedDataset(Dataset[Sample]):
    """Cached tiles as samples.

    An index past the length is a later epoch's visit to the same tile: `epoch * len + position`, so
    that worker processes need not be told the epoch. augmentations: None for validation.
    """

    def __init__(
        self,
        folder: Path,
        names: Sequence[str],
        augmentations: Augmentations | None = None,
        seed: int = 0,
    ) -> None:
        self.folder = folder
        self.names = list(names)
        self.augmentations = augmentations
        self.seed = seed

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        epoch, position = divmod(index, len(self.names))
        name = self.names[position]
        path = tile_path(self.folder, name)
        try:
            content = load_tile(path)
            image, features, label = content["image"], content["features"], content["label"]
        except (TileError, LookupError, TypeError, FileNotFoundError) as error:
            raise CacheError(
                f"{path}: missing or damaged ({error}); run prepare and verify again"
            ) from error
        if self.augmentations is not None:
            turn = draw_turn(self.augmentations, self.seed, epoch, position)
            features = [turn.apply(level).contiguous() for level in features]
            image, label = turn.apply(image).contiguous(), turn.apply(label).contiguous()
        return Sample(image, features, label, name)


class EpochSampler(Sampler[int]):
    """A rank's share of each epoch's seeded order, as indices of PrecomputedDataset.

    Step s of all ranks together is the same set of tiles that one process with the global batch
    would take. The order is padded from its start to a multiple of the ranks.

    >>> sampler = EpochSampler(length=4, seed=0, rank=0, world_size=2)
    >>> len(sampler), sorted(index % 4 for index in sampler) != []
    (2, True)
    """

    def __init__(self, length: int, seed: int, rank: int, world_size: int) -> None:
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.length // self.world_size)

    def __iter__(self) -> Iterator[int]:
        order = list(range(self.length))
        random.Random(f"{self.seed} {self.epoch}").shuffle(order)
        while len(order) < len(self) * self.world_size:
            order += order[: len(self) * self.world_size - len(order)]
        for position in order[self.rank :: self.world_size]:
            yield self.epoch * self.length + position


def load_split(
    section: Train, lists: Splits, seed: int, log: VerbosityLogger
) -> tuple[Manifest, Split]:
    """The cache that training reads and the two sides of its tiles."""
    folder = section.processed_dir
    manifest = read_manifest(folder)
    if not manifest.complete:
        raise CacheError(f"{folder}: prepare did not finish here; run it again")
    names = tile_names(folder, manifest)
    if (missing := sum(manifest.tiles.values()) - len(names)) > 0:
        log.warning(f"train: {missing} tiles of {folder} are missing; prepare makes them again")
    if lists.train_list is not None and lists.val_list is not None:
        split = split_by_lists(names, lists.train_list, lists.val_list)
    else:
        split = split_by_blocks(names, section.val_fraction, seed)
    log.info(f"train: {len(split.train)} tiles to train on, {len(split.val)} to validate")
    return manifest, split


class Loaders(NamedTuple):
    """Batches to learn from, in the order of `sampler.epoch`, and batches to validate on."""

    train: DataLoader
    val: DataLoader
    sampler: EpochSampler


def make_loaders(
    split: Split, section: Train, augmentations: Augmentations, seed: int, run: Runtime
) -> Loaders:
    """This rank's loaders: as many training batches as any rank, a share of the validation."""
    folder = section.processed_dir
    train = PrecomputedDataset(folder, split.train, augmentations, seed)
    val = PrecomputedDataset(folder, split.val)
    sampler = EpochSampler(len(train), seed, run.rank, run.world_size)
    shared = {
        "batch_size": section.batch_size,
        "num_workers": section.num_workers,
        "persistent_workers": section.num_workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }
    return Loaders(
        DataLoader(train, sampler=sampler, **shared),
        DataLoader(Subset(val, run.share(range(len(val)))), **shared),
        sampler,
    )
