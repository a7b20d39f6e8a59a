"""Prepare: scenes and labels → frozen features → one file per tile."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config, ConfigError, Prepare
from utils.cache import (
    FEATURE_DTYPE,
    MANIFEST,
    CacheError,
    Manifest,
    TileError,
    check_layout,
    claim,
    drop_changed,
    load_tile,
    read_manifest,
    scene_of,
    tile_path,
    write_manifest,
    write_tile,
)
from utils.distributed import Runtime, autocast, precision_of
from utils.label_values import LabelRules, label_rules
from utils.labels import (
    Labels,
    check_values,
    find_labels,
    labels_identity,
    nodata_class,
    open_labels,
)
from utils.logging import VerbosityLogger
from utils.maps import legend_of
from utils.raster import RasterError, Reading, Scene, ground_gsd, open_scene
from utils.sampling import class_counts
from utils.scenes import SceneFile, band_ranges, default_bands, find_scenes
from utils.tiling import Tile, batched, repeated, tiles

Encode = Callable[[Tensor], list[Tensor]]
MADE, REUSED = "made", "reused"
UNLABELLED, INVALID, SPARSE, BACKGROUND = (
    "without a labelled pixel",
    "below prepare.min_valid",
    "below prepare.min_labeled",
    "of background only",
)


class RawTile(NamedTuple):
    """A tile read but not encoded yet: image (bands, S, S) uint8, label (S, S) int32."""

    name: str
    image: np.ndarray
    label: np.ndarray


@dataclass(frozen=True, slots=True)
class Sources:
    """The files a cache is made of, and how they are read."""

    scenes: list[SceneFile]
    skipped: list[tuple[Path, str]]
    labels: list[Path]
    reading: Reading
    rules: LabelRules


class Tally:
    """What became of this rank's tiles: pixels per class of each kept one, and how many of what."""

    def __init__(self, manifest: Manifest) -> None:
        self.num_classes = manifest.num_classes
        self.ignore_index = manifest.ignore_index
        self.tiles: dict[str, list[int]] = {}
        self.fates: Counter[str] = Counter()

    def keep(self, name: str, label: Tensor, fate: str) -> None:
        """Count a cached tile and its label."""
        self.tiles[name] = class_counts(label, self.num_classes, self.ignore_index).tolist()
        self.fates[fate] += 1

    def merge(self, others: Sequence["Tally"]) -> None:
        """Take in what the other ranks counted."""
        self.tiles = {name: counts for other in others for name, counts in other.tiles.items()}
        self.fates = sum((other.fates for other in others), Counter())


def find_sources(config: Config) -> Sources:
    """Look for scenes and labels, and settle how pixels are read."""
    section, dataset = config.prepare, config.dataset
    labels = find_labels(section.label_path)
    found, skipped = find_scenes(section.raw_images_dir)
    known = {path.resolve() for path in labels}
    scenes = [scene for scene in found if scene.path.resolve() not in known]
    if not scenes:
        given = section.raw_images_dir
        named = ", ".join(map(str, [given] if isinstance(given, Path) else given))
        raise RasterError(f"{named}: holds no raster (paths.raw_images_dir)")
    paths = [scene.path for scene in scenes]
    bands = dataset.bands or default_bands(paths[0])
    ranges = cached_ranges(section.processed_dir, bands) if dataset.input_range == "auto" else None
    if ranges is None:
        ranges = band_ranges(paths, bands, dataset.input_range, dataset.nodata)
    reading = Reading(bands, ranges, dataset.nodata, dataset.gsd)
    return Sources(scenes, skipped, labels, reading, label_rules(dataset, config.model.num_classes))


def cached_ranges(
    folder: Path, bands: tuple[int, ...]
) -> tuple[tuple[float, float], ...] | None:
    """The ranges that `auto` found when a cache was begun: scenes added later do not move them."""
    if not (folder / MANIFEST).exists():
        return None
    cached = read_manifest(folder)
    if not cached.auto_range or cached.bands != list(bands):
        return None
    return tuple((low, high) for low, high in cached.ranges)


def describe_cache(
    config: Config, sources: Sources, backbone: Any, device: torch.device
) -> Manifest:
    """What this run's cache is to be, from its settings and the backbone's spec and hash."""
    spec, section, reading = backbone.spec, config.prepare, sources.reading
    if section.tile_size % spec.patch_size:
        raise ConfigError(
            [
                f"prepare.tile_size: found {section.tile_size}, expected a multiple of "
                f"{spec.patch_size}, the patch size of {spec.name}"
            ]
        )
    legend = legend_of(config.dataset.classes, config.model.num_classes)
    filters = section.model_dump(include={"min_valid", "min_labeled", "background_keep"})
    return Manifest(
        backbone=spec.name,
        backbone_hash=backbone.weights_hash,
        layers=list(spec.layers),
        norm=spec.norm,
        channels=spec.channels,
        patch_size=spec.patch_size,
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
        bands=list(reading.bands),
        rgb=list(spec.rgb),
        ranges=[list(pair) for pair in reading.ranges],
        auto_range=config.dataset.input_range == "auto",
        nodata=reading.nodata,
        gsd=reading.gsd,
        precision=precision_of(config.resources.precision, device),
        tile_size=section.tile_size,
        feature_dtype=str(FEATURE_DTYPE).removeprefix("torch."),
        num_classes=config.model.num_classes,
        ignore_index=config.dataset.ignore_index,
        label_rules=asdict(sources.rules),
        filters=filters,
        labels=labels_identity(sources.labels),
        class_names=list(legend.names),
        class_colors=[list(color) for color in legend.colors],
    )


def prepare(
    section: Prepare, sources: Sources, wanted: Manifest, encode: Encode, seed: int, run: Runtime,
    log: VerbosityLogger,
) -> None:  # fmt: skip
    """Cache image, features and label of every tile that has labelled pixels enough.

    wanted: what the cache is to be; encode: (B, bands, S, S) uint8 pixels on the CPU to feature
    maps. Ranks share the tiles.
    """
    folder = section.processed_dir
    if run.is_main:
        _open_cache(folder, sources, wanted, log)
    run.wait()
    tally = Tally(wanted)
    total = len(range(run.rank, _count_tiles(sources, section.tile_size), run.world_size))
    pending = _read_tiles(sources, section, wanted, tally, seed, run)
    work = log.progress(pending, "prepare", total=total, unit="tile", every=50)
    for batch in batched((tile for tile in work if tile is not None), section.batch_size):
        features = encode(torch.from_numpy(np.stack([tile.image for tile in batch])))
        for number, tile in enumerate(batch):
            label = torch.from_numpy(tile.label).to(wanted.label_dtype)
            image = torch.from_numpy(tile.image)
            write_tile(folder, tile.name, image, [level[number] for level in features], label)
            tally.keep(tile.name, label, MADE)
    tally.merge(run.gather(tally))
    if run.is_main:
        _close_cache(folder, tally, sources, log)
    run.wait()


def encode_on(device: torch.device, precision: str, backbone: torch.nn.Module) -> Encode:
    """The backbone as a function of CPU pixels: upload raw pixels, compute on the device."""
    backbone = backbone.to(device)

    def encode(pixels: Tensor) -> list[Tensor]:
        with torch.inference_mode(), autocast(device, precision):
            return backbone(pixels.to(device))

    return encode


def _count_tiles(sources: Sources, size: int) -> int:
    count = 0
    for name, path in sources.scenes:
        with open_scene(path, sources.reading, name) as scene:
            count += len(tiles(scene.grid.height, scene.grid.width, size))
    return count


def _open_cache(folder: Path, sources: Sources, wanted: Manifest, log: VerbosityLogger) -> None:
    """Look at every scene and the labels before any feature is computed, then claim the folder."""
    for path in sources.labels:
        number = nodata_class(path, sources.rules)
        if number is not None:
            log.warning(
                f"{path}: the value it declares as nodata means class {number} "
                f"({wanted.class_names[number]}); it stays a class"
            )
    scenes, sizes = {}, []
    for name, path in sources.scenes:
        with (
            open_scene(path, sources.reading, name) as scene,
            open_labels(sources.labels, scene, sources.rules) as labels,
        ):
            check_values(labels, scene, tiles(scene.grid.height, scene.grid.width, 512))
            scenes[name] = scene.identity
            if scene.grid.georeferenced:
                sizes.append(ground_gsd(scene.grid))
            shape = f"{scene.grid.height}×{scene.grid.width} pixels"
            met = ", ".join(source.path.name for source in labels.sources)
            log.debug(f"prepare: {name}: {shape}, labels from {met}")
    found = replace(claim(wanted, folder), ground_gsd=median(sizes) if sizes else None)
    for name in drop_changed(found, scenes, folder):
        log.info(f"{name}: changed since it was cached; its tiles are made again")


def _read_tiles(
    sources: Sources, section: Prepare, wanted: Manifest, tally: Tally, seed: int, run: Runtime
) -> Iterator[RawTile | None]:
    """This rank's tiles of all scenes, one by one; None for a tile that needs no features."""
    number = 0
    for name, path in sources.scenes:
        with (
            open_scene(path, sources.reading, name) as scene,
            open_labels(sources.labels, scene, sources.rules) as labels,
        ):
            for tile in tiles(scene.grid.height, scene.grid.width, section.tile_size):
                if number % run.world_size == run.rank:
                    yield _read_tile(scene, labels, tile, section, wanted, tally, seed)
                number += 1


def _read_tile(
    scene: Scene, labels: Labels, tile: Tile, section: Prepare, wanted: Manifest, tally: Tally,
    seed: int,
) -> RawTile | None:  # fmt: skip
    name = f"{scene.name}__{tile.name}"
    cached = cached_label(tile_path(section.processed_dir, name), wanted)
    if cached is not None:
        tally.keep(name, cached, REUSED)
        return None
    ids = own_label(labels, tile)
    if (ids == wanted.ignore_index).all():
        tally.fates[UNLABELLED] += 1
        return None
    image, valid = scene.read(tile)
    ids[~valid] = wanted.ignore_index
    fate = fate_of(ids, valid, section, wanted, f"{seed} {name}")
    if fate is not None:
        tally.fates[fate] += 1
        return None
    return RawTile(name, image, ids)


def fate_of(
    ids: np.ndarray, valid: np.ndarray, section: Prepare, wanted: Manifest, seed: str
) -> str | None:
    """Why a tile is left out, or None where it is kept.

    >>> from types import SimpleNamespace
    >>> ids, valid = np.full((512, 512), 255), np.ones((512, 512), bool)
    >>> fate_of(ids, valid, Prepare(), SimpleNamespace(ignore_index=255), "0")
    'without a labelled pixel'
    """
    labelled = ids[ids != wanted.ignore_index]
    if labelled.size == 0:
        return UNLABELLED
    if valid.mean() < section.min_valid:
        return INVALID
    if labelled.size / ids.size < section.min_labeled:
        return SPARSE
    background = wanted.label_rules["background"] or 0
    if (labelled == background).all() and random.Random(seed).random() >= section.background_keep:
        return BACKGROUND
    return None


def own_label(labels: Labels, tile: Tile) -> np.ndarray:
    """A tile's label without what earlier tiles hold already, so that each pixel counts once."""
    ids = labels.read(tile)
    rows, cols = repeated(tile)
    ids[:rows] = labels.ignore_index
    ids[:, :cols] = labels.ignore_index
    return ids


def cached_label(path: Path, manifest: Manifest) -> Tensor | None:
    """The label of a tile that is cached and sound at a glance; None where it must be made."""
    if not path.exists():
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
