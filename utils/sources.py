"""What a cache is made of: scenes, labels and how they are read; and what the cache is to be."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from config import Config, ConfigError
from utils.devices import precision_of
from utils.label_values import LabelRules, label_rules
from utils.labels import find_labels
from utils.manifest import MANIFEST, Manifest, read_manifest
from utils.maps import legend_of
from utils.opening import RasterError
from utils.raster import Reading, open_scene
from utils.scenes import SceneFile, band_ranges, default_bands, find_scenes
from utils.tiling import Tile, tiles
from utils.turns import first_turns


@dataclass(frozen=True, slots=True)
class Sources:
    """The files a cache is made of, and how they are read."""

    scenes: list[SceneFile]
    skipped: list[tuple[Path, str]]
    labels: list[Path]
    reading: Reading
    rules: LabelRules


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
    begun = begun_in(section.processed_dir)
    ranges = cached_ranges(begun, bands) if dataset.input_range == "auto" else None
    if ranges is None:
        ranges = band_ranges(paths, bands, dataset.input_range, dataset.nodata)
    reading = Reading(bands, ranges, dataset.nodata, dataset.gsd)
    return Sources(scenes, skipped, labels, reading, label_rules(dataset, config.model.num_classes))


def begun_in(folder: Path) -> Manifest | None:
    """What the cache is that was begun in a folder, which `auto` goes on with; None if none was."""
    return read_manifest(folder) if (folder / MANIFEST).exists() else None


def cached_ranges(
    begun: Manifest | None, bands: tuple[int, ...]
) -> tuple[tuple[float, float], ...] | None:
    """The ranges that `auto` found when a cache was begun: scenes added later do not move them.

    >>> from types import SimpleNamespace
    >>> begun = SimpleNamespace(auto_range=True, bands=[4, 3, 2], ranges=[[61, 2893]] * 3)
    >>> cached_ranges(begun, (4, 3, 2)), cached_ranges(begun, (3, 2, 1))
    (((61, 2893), (61, 2893), (61, 2893)), None)
    """
    if begun is None or not begun.auto_range or begun.bands != list(bands):
        return None
    return tuple((low, high) for low, high in begun.ranges)


def describe_cache(
    config: Config, sources: Sources, backbone: Any, device: torch.device
) -> Manifest:
    """What this run's cache is to be, from its settings and the backbone's spec and hash.

    Where the configuration says `auto`, a cache that was begun in the folder decides.
    """
    spec, section, reading = backbone.spec, config.prepare, sources.reading
    means, begun = config.dataset.augmentations, begun_in(section.processed_dir)
    kind, precision = config.dataset.cache, precision_of(config.resources.precision, device)
    if begun and kind == "auto":
        kind = begun.cache
    if begun and config.resources.precision == "auto":
        precision = begun.precision
    if section.tile_size % spec.patch_size:
        raise ConfigError(
            [
                f"prepare.tile_size: found {section.tile_size}, expected a multiple of "
                f"{spec.patch_size}, the patch size of {spec.name}"
            ]
        )
    legend = legend_of(config.dataset.classes, config.model.num_classes)
    filters = section.model_dump(include={"min_valid", "min_labeled", "background_keep"})
    if section.background_keep < 1:
        filters["seed"] = config.resources.seed  # it chooses which are kept
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
        precision=precision,
        tile_size=section.tile_size,
        feature_dtype=section.feature_dtype,
        cache=kind,
        views=first_turns(config.train.augment_views, means.hflip, means.vflip, means.rotate90),
        num_classes=config.model.num_classes,
        ignore_index=config.dataset.ignore_index,
        label_rules=asdict(sources.rules),
        filters=filters,
        class_names=list(legend.names),
        class_colors=[list(color) for color in legend.colors],
    )


def work_of(sources: Sources, size: int) -> Iterator[tuple[SceneFile, Tile]]:
    """Every tile of every scene, in order."""
    for file in sources.scenes:
        with open_scene(file.path, sources.reading, file.name) as scene:
            grid = scene.grid
        for tile in tiles(grid.height, grid.width, size):
            yield file, tile


def count_tiles(sources: Sources, size: int) -> int:
    """How many tiles all scenes have, labelled or not."""
    return sum(1 for _ in work_of(sources, size))
