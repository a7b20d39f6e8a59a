"""Prepare: scenes and labels → frozen features → one file per tile."""

import contextlib
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Prepare
from utils.cache import (
    TileError,
    check_layout,
    claim,
    drop_changed,
    load_tile,
    tile_path,
    write_tile,
)
from utils.devices import download, most_at_once, upload
from utils.distributed import Runtime
from utils.grids import ground_gsd
from utils.label_rasters import nodata_class
from utils.labels import Labels, check_values, labels_identity, open_labels
from utils.logging import VerbosityLogger
from utils.manifest import CacheError, Manifest, read_manifest, scene_of, write_manifest
from utils.process import cores_of_rank
from utils.quantize import HALF, as_cached
from utils.raster import Scene, open_scene
from utils.sampling import class_counts
from utils.scenes import SceneFile
from utils.sources import Sources, work_of
from utils.space import Need, free_at, require_space
from utils.streaming import ahead, behind, spread
from utils.tiling import Tile, batched, repeated, tiles
from utils.turns import Turn

Encode = Callable[[np.ndarray], Mapping[str, Tensor]]
WAITING = 1  # batches of features that wait for the threads that write
WRITERS = 8  # threads at most, and for half of the cores: each file waits for the disk
SAMPLE = 64  # tiles that are looked at to tell how many will be kept
MADE, REUSED = "made", "reused"
UNLABELLED, INVALID, SPARSE, BACKGROUND = (
    "without a labelled pixel",
    "below prepare.min_valid",
    "below prepare.min_labeled",
    "of background only",
)


class ReadTile(NamedTuple):
    """A tile that was looked at, and its labelled pixels by class if it is kept.

    image (bands, S, S) uint8 and label (S, S) come with a tile whose fate is to be MADE.
    """

    name: str
    fate: str
    counts: list[int] | None = None
    image: np.ndarray | None = None
    label: Tensor | None = None


class Tally:
    """What became of this rank's tiles: pixels per class of each kept one, and how many of what."""

    def __init__(self) -> None:
        self.tiles: dict[str, list[int]] = {}
        self.fates: Counter[str] = Counter()

    def add(self, tile: ReadTile) -> None:
        """Count one more tile."""
        self.fates[tile.fate] += 1
        if tile.counts is not None:
            self.tiles[tile.name] = tile.counts

    def merge(self, others: Sequence["Tally"]) -> None:
        """Take in what the other ranks counted."""
        self.tiles = {name: counts for other in others for name, counts in other.tiles.items()}
        self.fates = sum((other.fates for other in others), Counter())


def prepare(
    section: Prepare, sources: Sources, wanted: Manifest, encode: Encode, seed: int, run: Runtime,
    log: VerbosityLogger,
) -> None:  # fmt: skip
    """Cache image, features and label of every tile that has labelled pixels enough.

    wanted: what the cache is to be; encode: (B, bands, S, S) uint8 pixels to what is written of
    them beside image and label. Ranks share the tiles.
    """
    folder = section.processed_dir
    if run.is_main:
        _open_cache(folder, sources, wanted, run, log)
    run.wait()
    made = read_manifest(folder)  # as the first rank claimed it: stamps need the scenes
    work = list(work_of(sources, section.tile_size))[run.rank :: run.world_size]
    tally = Tally()
    with contextlib.ExitStack() as stack:
        readers = [TileReader(sources, section, made, seed) for _ in range(section.readers)]
        writers = stack.enter_context(spread(min(WRITERS, max(1, cores_of_rank() // 2))))
        hand = stack.enter_context(behind(WAITING))
        found = stack.enter_context(ahead(readers, work, 2 * section.batch_size))
        steps = log.progress(found, "prepare", total=len(work), unit="tile", every=50)
        for batch in batched(_to_make(run.beating(steps), tally), section.batch_size):
            encoded = encode(np.stack([tile.image for tile in batch]))
            hand(_write_tiles, writers, folder, made, batch, encoded)
    run.wait()
    tally.merge(run.gather(tally))
    if run.is_main:
        _close_cache(folder, tally, sources, log)
    run.wait()


def check_space(section: Prepare, sources: Sources, made: Manifest, seed: int) -> None:
    """Compare what the tiles left to make will take with what is free, before any is made.

    made: the cache that was begun, or is to be; while `dataset.cache: auto` is open, tiles without
    features are counted. Where all would not fit, a look at some tells how many will be kept.
    """
    folder, work = section.processed_dir, work_of(sources, section.tile_size)
    there = {path.stem for path in folder.glob("*.pt")}  # what is to be made anew is freed first
    left = [item for item in work if f"{item[0].name}__{item[1].name}" not in there]
    count = len(left)
    if count * made.tile_bytes > free_at(folder):
        with TileReader(sources, section, made, seed) as read:
            looked_at = left[:: -(-count // SAMPLE)]
            fates = [read(item).fate for item in looked_at]
        count = round(count * fates.count(MADE) / len(fates))
    needed = count * made.tile_bytes
    require_space([Need(folder, "paths.processed_dir", needed)], f"{count} tiles left to make")


def _to_make(found: Iterable[ReadTile], tally: Tally) -> Iterator[ReadTile]:
    """The tiles that need features; all of them are counted."""
    for tile in found:
        tally.add(tile)
        if tile.fate == MADE:
            yield tile


def _write_tiles(
    writers: Callable, folder: Path, made: Manifest, batch: Sequence[ReadTile],
    encoded: Mapping[str, Tensor],
) -> None:  # fmt: skip
    encoded = {part: download(whole) for part, whole in encoded.items()}

    def write(number: int) -> None:
        tile, parts = batch[number], {part: whole[number] for part, whole in encoded.items()}
        stamp, image = made.stamp_of(tile.name), torch.from_numpy(tile.image)
        write_tile(folder, tile.name, image, tile.label, **parts, stamp=stamp)

    writers(write, range(len(batch)))


def encode_on(device: torch.device, wanted: Manifest, backbone: torch.nn.Module) -> Encode:
    """The backbone, on the device, as a function of CPU pixels: they go up raw.

    For a cache of tiles nothing is computed.
    """
    if wanted.cache == "tiles":
        return lambda images: {}
    turns = [Turn(*view) for view in wanted.views]
    count, cells = len(turns) * len(wanted.layers), wanted.tile_size // wanted.patch_size
    dtype, shape = HALF[wanted.feature_dtype], (count, cells, cells, wanted.channels)

    def encode(images: np.ndarray) -> Mapping[str, Tensor]:
        pixels, most = upload(images, device), most_at_once(device) or len(images)
        whole = torch.empty(len(images), *shape, dtype=dtype, device=device)
        with torch.no_grad():
            for some, group in zip(whole.split(most), pixels.split(most), strict=True):
                levels = (level for turn in turns for level in backbone(turn.apply(group)))
                for number, level in enumerate(levels):
                    some[:, number] = level.permute(0, 2, 3, 1)
        return as_cached(whole.permute(0, 1, 4, 2, 3), wanted.feature_dtype)

    return encode


def _open_cache(
    folder: Path, sources: Sources, wanted: Manifest, run: Runtime, log: VerbosityLogger
) -> None:
    """Look at every scene and the labels before any feature is computed, then claim the folder."""
    for path in sources.labels:
        number = nodata_class(path, sources.rules)
        if number is not None:
            log.warning(
                f"{path}: the value it declares as nodata means class {number} "
                f"({wanted.class_names[number]}); it stays a class"
            )
    scenes, sizes = {}, []
    for name, path in run.beating(sources.scenes):
        with (
            open_scene(path, sources.reading, name) as scene,
            open_labels(sources.labels, scene, sources.rules) as labels,
        ):
            check_values(labels, scene, tiles(scene.grid.height, scene.grid.width, 512))
            read = labels_identity([source.path for source in labels.sources])
            scenes[name] = scene.identity | {"labels": read}
            if scene.grid.georeferenced:
                sizes.append(ground_gsd(scene.grid))
            shape = f"{scene.grid.height}×{scene.grid.width} pixels"
            met = ", ".join(source.path.name for source in labels.sources)
            log.debug(f"prepare: {name}: {shape}, labels from {met}")
    found = replace(claim(wanted, folder), ground_gsd=median(sizes) if sizes else None)
    for name in drop_changed(found, scenes, folder, run.beating):
        log.info(f"{name}: it or its labels changed since; its tiles are made again")


class TileReader(contextlib.AbstractContextManager):
    """Reads tiles one by one; keeps the scene and the labels open that it read last."""

    def __init__(self, sources: Sources, section: Prepare, wanted: Manifest, seed: int) -> None:
        self.sources, self.section, self.wanted, self.seed = sources, section, wanted, seed
        self._file: SceneFile | None = None
        self._open = contextlib.ExitStack()

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def __call__(self, item: tuple[SceneFile, Tile]) -> ReadTile:
        """What becomes of a tile, with image and label where it is to be made."""
        file, tile = item
        name = f"{file.name}__{tile.name}"
        cached = cached_label(tile_path(self.section.processed_dir, name), self.wanted)
        if cached is not None:
            return ReadTile(name, REUSED, self._counts(cached))
        scene, labels = self._opened(file)
        ids = own_label(labels, tile)
        if (ids == self.wanted.ignore_index).all():
            return ReadTile(name, UNLABELLED)
        image, valid = scene.read(tile)
        if not valid.all():
            ids[~valid] = self.wanted.ignore_index
        label = torch.from_numpy(ids).to(self.wanted.label_dtype)
        counts = self._counts(label)
        fate = fate_of(counts, valid, self.section, self.wanted, f"{self.seed} {name}")
        return ReadTile(name, fate) if fate else ReadTile(name, MADE, counts, image, label)

    def _counts(self, label: Tensor) -> list[int]:
        wanted = self.wanted
        return class_counts(label, wanted.num_classes, wanted.ignore_index).tolist()

    def _opened(self, file: SceneFile) -> tuple[Scene, Labels]:
        if file != self._file:
            self._open.close()
            sources = self.sources
            scene = self._open.enter_context(open_scene(file.path, sources.reading, file.name))
            labels = open_labels(sources.labels, scene, sources.rules)
            self._scene, self._labels = scene, self._open.enter_context(labels)
            self._file = file
        return self._scene, self._labels


def fate_of(
    counts: Sequence[int], valid: np.ndarray, section: Prepare, wanted: Manifest, seed: str
) -> str | None:
    """Why a tile is left out, or None where it is kept; counts: its labelled pixels by class.

    >>> from types import SimpleNamespace
    >>> rules = SimpleNamespace(label_rules={"background": 0})
    >>> fate_of([0, 0], np.ones((512, 512), bool), Prepare(), rules, seed="0")
    'without a labelled pixel'
    """
    labelled = sum(counts)
    if labelled == 0:
        return UNLABELLED
    if np.count_nonzero(valid) / valid.size < section.min_valid:
        return INVALID
    if labelled / valid.size < section.min_labeled:
        return SPARSE
    if counts[wanted.label_rules["background"] or 0] < labelled:
        return None
    return BACKGROUND if random.Random(seed).random() >= section.background_keep else None


def own_label(labels: Labels, tile: Tile) -> np.ndarray:
    """A tile's label without what earlier tiles hold already, so that each pixel counts once."""
    ids = labels.read(tile)
    rows, cols = repeated(tile)
    ids[:rows] = labels.ignore_index
    ids[:, :cols] = labels.ignore_index
    return ids


def cached_label(path: Path, manifest: Manifest) -> Tensor | None:
    """The label of a tile that is cached and sound at a glance; None where it must be made."""
    if not path.is_file():
        return None
    try:
        content = load_tile(path, mmap=True)
        check_layout(path.name, content, manifest)
    except TileError:
        return None
    return content["label"]


def _close_cache(folder: Path, tally: Tally, sources: Sources, log: VerbosityLogger) -> None:
    """Say what the cache holds and mark it as whole."""
    manifest = replace(
        read_manifest(folder), tiles=dict(sorted(tally.tiles.items())), complete=True
    )
    for path, reason in sources.skipped:
        log.info(f"prepare: skipped {path.name}: {reason}")
    labelled: Counter[str] = Counter()
    for name, counts in tally.tiles.items():
        labelled[scene_of(name)] += sum(counts)
    held = Counter(scene_of(name) for name in tally.tiles)
    for name, scene in manifest.scenes.items():
        share = 1 - labelled[name] / (scene["height"] * scene["width"])
        log.info(f"prepare: scene {name}: {held[name]} tiles, {share:.1%} of pixels ignored")
    if not tally.tiles:
        raise CacheError(f"{folder}: no tile is left ({fates_line(tally.fates)}); check the labels")
    totals = np.array(list(tally.tiles.values())).sum(0)
    of_all = zip(manifest.class_names, totals / totals.sum(), strict=True)
    log.info(f"prepare: class shares {', '.join(f'{name}: {share:.1%}' for name, share in of_all)}")
    size = sum(tile_path(folder, name).stat().st_size for name in tally.tiles)
    log.info(
        f"prepare: {len(manifest.scenes)} scenes, {fates_line(tally.fates)}, "
        f"{len(sources.skipped)} other files, {size / 1e6:.1f} MB in {folder}"
    )
    write_manifest(manifest, folder)


def fates_line(fates: Counter[str]) -> str:
    """How many tiles met which fate, in words.

    >>> fates_line(Counter(made=36, reused=2, **{"of background only": 1}))
    '36 tiles made, 2 reused, 1 left out of background only'
    """
    kept = f"{fates[MADE]} tiles made, {fates[REUSED]} reused"
    reasons = (UNLABELLED, INVALID, SPARSE, BACKGROUND)
    out = [f"{fates[reason]} left out {reason}" for reason in reasons if fates[reason]]
    return ", ".join([kept, *out])
