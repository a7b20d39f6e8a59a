"""Prepare: scenes and labels → frozen features → one file per tile."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import Config, ConfigError, Prepare
from utils.cache import (
    FEATURE_DTYPE,
    CacheError,
    Manifest,
    TileError,
    check_layout,
    claim,
    drop_changed,
    load_tile,
    read_manifest,
    scene_of,
    tile_names,
    tile_path,
    write_manifest,
    write_tile,
)
from utils.distributed import Runtime, autocast, precision_of
from utils.labels import (
    Labels,
    covered_share,
    label_histogram,
    label_nodata_class,
    open_labels,
    source_values,
)
from utils.logging import VerbosityLogger
from utils.raster import RasterError, Scene, file_identity, find_scenes, open_scene
from utils.tiling import Tile, repeated, tiles

Encode = Callable[[Tensor], list[Tensor]]


class RawTile(NamedTuple):
    """A tile read but not encoded yet: image (3, S, S) uint8, label (S, S) int32."""

    name: str
    image: np.ndarray
    label: np.ndarray


class Tally:
    """Counts per scene: pixels of each class; tiles made, reused, unlabelled."""

    def __init__(self, scenes: Sequence[str], manifest: Manifest) -> None:
        self.scenes = list(scenes)
        self.num_classes = manifest.num_classes
        self.ignore_index = manifest.ignore_index
        self.counts = torch.zeros(len(self.scenes), manifest.num_classes + 3, dtype=torch.int64)

    def add(self, name: str, label: Tensor, kind: str) -> None:
        """Count a tile's label; kind is made, reused or unlabelled."""
        row = self.counts[self.scenes.index(scene_of(name))]
        ids = label.flatten().long()
        row[: self.num_classes] += torch.bincount(
            ids[ids != self.ignore_index], minlength=self.num_classes
        )
        row[self.num_classes + ("made", "reused", "unlabelled").index(kind)] += 1


def prepare(
    section: Prepare, wanted: Manifest, encode: Encode, run: Runtime, log: VerbosityLogger
) -> None:
    """Cache image, features and label of every tile that has a labelled pixel.

    wanted: what the cache is to be; encode: (B, 3, S, S) uint8 pixels on the CPU to feature maps.
    Ranks share the tiles.
    """
    folder = section.processed_dir
    paths, skipped = find_scenes(section.raw_images_dir)
    paths = [path for path in paths if not path.samefile(section.label_path)]
    if not paths:
        raise RasterError(f"{section.raw_images_dir}: holds no raster (paths.raw_images_dir)")
    if run.is_main:
        _open_cache(folder, paths, section, wanted, log)
    run.wait()
    tally = Tally([path.stem for path in paths], wanted)
    pending = _read_tiles(paths, section, wanted, tally, run)
    total = len(range(run.rank, _count_tiles(paths, section.tile_size), run.world_size))
    work = log.progress(pending, "prepare", total=total, unit="tile", every=50)
    for batch in batched((tile for tile in work if tile is not None), section.batch_size):
        features = encode(torch.from_numpy(np.stack([tile.image for tile in batch])))
        for number, tile in enumerate(batch):
            label = torch.from_numpy(tile.label).to(wanted.label_dtype)
            image = torch.from_numpy(tile.image)
            write_tile(folder, tile.name, image, [level[number] for level in features], label)
            tally.add(tile.name, label, "made")
    tally.counts = run.sum(tally.counts)
    if run.is_main:
        _close_cache(folder, tally, skipped, log)
    run.wait()


def describe_cache(config: Config, backbone: Any, device: torch.device) -> Manifest:
    """What this run's cache is to be, from its settings and the backbone's spec and hash."""
    spec, section = backbone.spec, config.prepare
    if section.tile_size % spec.patch_size:
        raise ConfigError(
            [
                f"prepare.tile_size: found {section.tile_size}, expected a multiple of "
                f"{spec.patch_size}, the patch size of {spec.name}"
            ]
        )
    if not section.label_path.is_file():
        raise RasterError(f"{section.label_path}: no such file (paths.label_path)")
    return Manifest(
        backbone=spec.name,
        backbone_hash=backbone.weights_hash,
        layers=list(spec.layers),
        norm=spec.norm,
        channels=spec.channels,
        patch_size=spec.patch_size,
        image_mean=list(spec.image_mean),
        image_std=list(spec.image_std),
        precision=precision_of(device),
        tile_size=section.tile_size,
        feature_dtype=str(FEATURE_DTYPE).removeprefix("torch."),
        num_classes=config.model.num_classes,
        ignore_index=config.dataset.ignore_index,
        labels={"name": section.label_path.name, **file_identity(section.label_path)},
    )


def encode_on(device: torch.device, backbone: torch.nn.Module) -> Encode:
    """The backbone as a function of CPU pixels: upload raw pixels, compute on the device."""
    backbone = backbone.to(device)

    def encode(pixels: Tensor) -> list[Tensor]:
        with torch.inference_mode(), autocast(device):
            return backbone(pixels.to(device))

    return encode


def batched(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items; the last may be shorter.

    >>> list(batched("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch


def _count_tiles(paths: Sequence[Path], size: int) -> int:
    count = 0
    for path in paths:
        with open_scene(path) as scene:
            count += len(tiles(scene.grid.height, scene.grid.width, size))
    return count


def _open_cache(
    folder: Path, paths: Sequence[Path], section: Prepare, wanted: Manifest, log: VerbosityLogger
) -> None:
    """Look at every scene and the labels before any feature is computed, then claim the folder."""
    label_path = section.label_path
    nodata = label_nodata_class(label_path, wanted.num_classes)
    if nodata is not None:
        log.warning(
            f"{label_path}: declares {nodata} as nodata, which is one of the "
            f"{wanted.num_classes} classes; it stays a class"
        )
    scenes = {}
    for path in paths:
        with open_scene(path) as scene:
            share = covered_share(label_path, scene)
            _check_label_values(label_path, scene, wanted)
            scenes[scene.name] = scene.identity
            size = f"{scene.grid.height}×{scene.grid.width} pixels"
            log.debug(f"prepare: {path.name}: {size}, labels cover {share:.1%}")
    for name in drop_changed(claim(wanted, folder), scenes, folder):
        log.info(f"{name}: changed since it was cached; its tiles are made again")


def _check_label_values(label_path: Path, scene: Scene, wanted: Manifest) -> None:
    """Refuse label values that are neither a class nor ignore_index, with a histogram."""
    known = {*range(wanted.num_classes), wanted.ignore_index}
    if source_values(label_path, scene) <= known:
        return
    with open_labels(label_path, scene, wanted.num_classes, wanted.ignore_index) as labels:
        counts = label_histogram(labels)
    if set(counts) <= known:
        return
    histogram = ", ".join(f"{value}: {count}" for value, count in sorted(counts.items()))
    raise RasterError(
        f"{label_path}: values other than 0..{wanted.num_classes - 1} and {wanted.ignore_index} "
        f"(ignore) on scene {scene.name}, pixels per value: {{{histogram}}}; correct the raster, "
        "model.num_classes or dataset.ignore_index"
    )


def _read_tiles(
    paths: Sequence[Path], section: Prepare, wanted: Manifest, tally: Tally, run: Runtime
) -> Iterator[RawTile | None]:
    """This rank's tiles of all scenes, one by one; None for a tile that needs no features."""
    number = 0
    for path in paths:
        with (
            open_scene(path) as scene,
            open_labels(
                section.label_path, scene, wanted.num_classes, wanted.ignore_index
            ) as labels,
        ):
            for tile in tiles(scene.grid.height, scene.grid.width, section.tile_size):
                if number % run.world_size == run.rank:
                    yield _read_tile(scene, labels, tile, section.processed_dir, wanted, tally)
                number += 1


def _read_tile(
    scene: Scene, labels: Labels, tile: Tile, folder: Path, wanted: Manifest, tally: Tally
) -> RawTile | None:
    name = f"{scene.name}__{tile.name}"
    label = cached_label(tile_path(folder, name), wanted)
    if label is not None:
        tally.add(name, label, "reused")
        return None
    ids = own_label(labels, tile)
    if (ids == wanted.ignore_index).all():
        tally.add(name, torch.from_numpy(ids), "unlabelled")
        return None
    image, valid = scene.read(tile)
    ids[~valid] = wanted.ignore_index
    if (ids == wanted.ignore_index).all():
        tally.add(name, torch.from_numpy(ids), "unlabelled")
        return None
    return RawTile(name, image, ids)


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


def _close_cache(
    folder: Path, tally: Tally, skipped: Sequence[tuple[Path, str]], log: VerbosityLogger
) -> None:
    """Say what the cache holds and mark it as whole."""
    classes = tally.counts[:, : tally.num_classes]
    made, reused, unlabelled = tally.counts[:, tally.num_classes :].unbind(1)
    labelled = classes.sum(1)  # each pixel counts once, so a scene's share is of its own pixels
    kept = (made + reused).tolist()
    manifest = replace(
        read_manifest(folder), tiles=dict(zip(tally.scenes, kept, strict=True)), complete=True
    )
    size = sum(tile_path(folder, name).stat().st_size for name in tile_names(folder, manifest))
    for path, reason in skipped:
        log.info(f"prepare: skipped {path.name}: {reason}")
    for number, name in enumerate(tally.scenes):
        pixels = manifest.scenes[name]["height"] * manifest.scenes[name]["width"]
        share = 1 - labelled[number] / pixels
        log.info(f"prepare: scene {name}: {kept[number]} tiles, {share:.1%} of pixels ignored")
    if labelled.sum() == 0:
        raise CacheError(f"{folder}: no scene has a labelled pixel; check paths.label_path")
    of_all = (classes.sum(0) / labelled.sum()).tolist()
    shares = ", ".join(f"{number}: {share:.1%}" for number, share in enumerate(of_all))
    log.info(f"prepare: class shares {shares}")
    log.info(
        f"prepare: {len(tally.scenes)} scenes, {made.sum()} tiles made, {reused.sum()} reused, "
        f"{unlabelled.sum()} skipped without a label, {len(skipped)} other files, "
        f"{size / 1e6:.1f} MB in {folder}"
    )
    write_manifest(manifest, folder)
