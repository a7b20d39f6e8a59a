"""Batches of cached tiles, made by threads ahead of the training.

Collate: drawn tiles become a batch, with image, features and label turned alike; tiles are mapped
into memory, not read, so that what a batch does not need stays on the disk, and no value moves
twice. Loader: batches in order, from threads: processes would hand each batch over in fresh shared
memory, whose pages cost four times what is copied into them.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from config import Augmentations, Train
from utils.data import Drawn, EpochSampler, PrecomputedDataset, Sample, uniform_order
from utils.distributed import Runtime
from utils.manifest import Manifest
from utils.sampling import balanced_order
from utils.splits import Split
from utils.streaming import ahead
from utils.tiling import batched
from utils.turns import Turn

STRIP = 64  # columns: a quarter turn of bytes reads whole columns, which a cache holds in strips
KEPT = 128  # pieces of batches' memory to hold on to
AHEAD = 2  # batches that each thread has made or is making


class Memory:
    """Memory for batches, used again when nobody holds the batch that was in it.

    The pages of fresh memory cost more than what is copied into them.
    """

    def __init__(self) -> None:
        self.kept: list[tuple[np.ndarray, weakref.ref]] = []  # and what tensors made of it hold
        self._alone = threading.Lock()

    def take(self, nbytes: int) -> Tensor:
        """So many bytes.

        >>> memory = Memory()
        >>> first = memory.take(8)
        >>> memory.take(8).data_ptr() == first.data_ptr()       # `first` is in use, its memory too
        False
        """
        with self._alone:
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


class Order(Sized, Iterable[int], Protocol):
    """Indices of a dataset, in the order in which they are taken."""


class Loader:
    """Batches of a dataset in an order, made ahead by so many threads; without any, when asked for.

    pin: whether batches come in memory that a GPU copies from while it computes.

    >>> loader = Loader([10, 11, 12], order=[2, 0, 1], batch_size=2, threads=2, collate=tuple)
    >>> list(loader), len(loader)
    ([(12, 10), (11,)], 2)
    """

    def __init__(
        self, dataset: Sequence, order: Order, batch_size: int, threads: int,
        collate: Callable[[list], Sample], pin: bool = False,
    ) -> None:  # fmt: skip
        self.dataset, self.order, self.batch_size = dataset, order, batch_size
        self.threads, self.collate, self.pin = threads, collate, pin

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[Sample]:
        groups = batched(iter(self.order), self.batch_size)
        if not self.threads:
            yield from map(self.load, groups)
            return
        readers = [nullcontext(self.load)] * self.threads
        with ahead(readers, groups, AHEAD * self.threads, in_turn=1) as batches:
            yield from batches

    def load(self, indices: Sequence[int]) -> Sample:
        """The batch of some indices."""
        batch = self.collate([self.dataset[index] for index in indices])
        return pinned(batch) if self.pin else batch


def pinned(batch: Sample) -> Sample:
    """A batch in memory that the GPU's own copying reads, so that nobody waits for it."""
    return Sample(
        batch.image.pin_memory(),
        [level.pin_memory() for level in batch.features],
        batch.label.pin_memory(),
        batch.name,
        [scale.pin_memory() for scale in batch.scales],
    )


class Loaders(NamedTuple):
    """Batches to learn from, in the order of `sampler.epoch`, and batches to validate on."""

    train: Loader
    val: Loader
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
    collate, pin = Collate(manifest.ignore_index), torch.cuda.is_available()
    train_loader, val_loader = (
        Loader(dataset, order, section.batch_size, section.num_workers, collate, pin)
        for dataset, order in ((train, sampler), (val, run.share(range(len(val)))))
    )
    return Loaders(train_loader, val_loader, sampler)
