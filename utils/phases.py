"""The phases as main.py calls them: each joins a network of models to the data work of utils.

A program's room like main.py itself, which imports it late: torch is read in here. What can be
wrong is found from cheap to dear: settings and paths, the backbone's config.json, the cache, the
headers of rasters, and only then weights are loaded and a device is used.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from config import Config, to_yaml
from models import build_head
from models.backbone import (
    BackboneSpec,
    Normalize,
    build_backbone,
    describe_backbone,
    own_config,
)
from models.hub import load_transformers
from models.segmenter import Segmenter
from utils.agreement import precision_as_trained, require_backbone, require_cache, require_fit
from utils.cache import claim
from utils.checkpoint import load_checkpoint, load_weights
from utils.data import load_split
from utils.data import verify as check_tiles
from utils.devices import compiled, device_reason
from utils.distributed import Runtime
from utils.engine import fit
from utils.inference import predict_scenes
from utils.keeping import best_path, keep_best
from utils.loading import make_loaders
from utils.logging import VerbosityLogger
from utils.manifest import CacheError, Manifest, restored
from utils.outputs import check_spaces, scenes_to_map, trained_as
from utils.pace import settle_cache
from utils.preflight import caches_of, check_content
from utils.prepare import check_space, encode_on
from utils.prepare import prepare as cache_tiles
from utils.process import importing
from utils.quantize import HALF, rounding
from utils.resume import Resume, identity_of, last_path
from utils.sources import begun_in, count_tiles, describe_cache, find_sources
from utils.step import Encode

Phase = Callable[[Config, Runtime, VerbosityLogger], None]


class Described(NamedTuple):
    """A backbone before its weights are loaded, which are taken for those that were used before.

    >>> spec = BackboneSpec("./vits16", (2, 5, 8, 11), 384, 16, (0.5,) * 3, (0.25,) * 3)
    >>> Described(spec, weights_hash="0f9c").spec.channels
    384
    """

    spec: BackboneSpec
    weights_hash: str


def load_libraries(config: Config, run: Runtime) -> None:
    """Import what this rank's phases need for networks, which each would do when it builds one.

    torch's compiler keeps the frames that import it: with a phase's own its networks would stay.
    """
    with importing():
        if config.train.enable:
            import torch._dynamo  # noqa: F401  optimizers use it
        if config.prepare.enable or (config.inference.enable and run.is_main):
            load_transformers()


def look_ahead(config: Config, run: Runtime, log: VerbosityLogger) -> None:
    """Raise the error that a phase of this run would end with, from cheap checks to dear ones.

    The first rank looks, and puts manifests right that can be, before any rank reads them.
    """
    for folder in caches_of(config) if run.is_main else ():
        if said := restored(folder):
            log.warning(said)
    run.wait()
    if run.is_main:
        if config.prepare.enable or config.inference.enable:
            own_config(config.model)
        check_content(config)


def prepare(config: Config, run: Runtime, log: VerbosityLogger) -> None:
    """Cache the frozen features of every labelled tile."""
    section = config.prepare
    device = run.device(section.device)
    log.info(f"prepare: {device_reason(section.device, device)}")
    sources = find_sources(config)
    spec = describe_backbone(config.model, sources.reading.bands, config.dataset.rgb)
    begun = begun_in(section.processed_dir)
    known = Described(spec, begun.backbone_hash if begun else "")
    manifest = describe_cache(config, sources, known, device)
    if begun:
        claim(manifest, section.processed_dir)
    if run.is_main:
        check_space(section, sources, begun or manifest, config.resources.seed)
    for remark in spec.remarks:
        log.warning(remark)
    backbone = build_backbone(config.model, spec, HALF[section.feature_dtype])
    log.info(f"prepare: {spec.name}, blocks {list(spec.layers)}, mean {list(spec.image_mean)}")
    log.info(f"prepare: {sources.reading.line()}")
    manifest = replace(manifest, backbone_hash=backbone.weights_hash)
    backbone.to(device).compute_in(manifest.precision)
    network = compiled(backbone, config.resources.compile, device, "prepare", log)
    if config.dataset.cache == "auto":
        manifest = settle_cache(
            manifest, section.processed_dir, network, device, section.batch_size,
            count_tiles(sources, section.tile_size), config.train, run, log,
        )  # fmt: skip
    encode = encode_on(device, manifest, network)
    cache_tiles(section, sources, manifest, encode, config.resources.seed, run, log)


def verify(config: Config, run: Runtime, log: VerbosityLogger) -> None:
    """Check every cached tile, delete the bad ones, and have prepare make exactly those again."""
    folder, workers, making = config.verify.processed_dir, config.verify.workers, config.prepare
    if not (lacking := check_tiles(folder, workers, run, log)):
        return
    if not making.enable or making.processed_dir != folder:
        raise CacheError(
            f"{folder}: {len(lacking)} tiles lack, those that were bad are deleted; run prepare "
            "again (prepare.enable: true), it makes exactly those"
        )
    prepare(config, run, log)
    if again := check_tiles(folder, workers, run, log, lacking):
        raise CacheError(
            f"{folder}: {len(again)} tiles are bad though they were just made, {again[0]} first; "
            "look at the scenes, the backbone's weights and the disk"
        )


def train(config: Config, run: Runtime, log: VerbosityLogger) -> None:
    """Fit the head to the cached tiles and keep the weights with the best validation mIoU."""
    section, name, seed = config.train, config.model.head, config.resources.seed
    manifest, split = load_split(section, config.dataset.splits, seed, run, log)
    require_cache(config, manifest)
    device = run.device(section.device)
    log.info(f"train: {device_reason(section.device, device)}")
    encode = live_features(config, manifest, device, log) if manifest.cache == "tiles" else None
    loaders = make_loaders(split, manifest, section, config.dataset.augmentations, seed, run)
    torch.manual_seed(seed)  # here, so that a head starts alike whether prepare ran before or not
    head = build_head(
        name, manifest.channels, len(manifest.layers), manifest.num_classes, len(manifest.bands)
    )
    log.info(f"train: {name}, {sum(p.numel() for p in head.parameters()) / 1e6:.2f} M parameters")
    normalize = Normalize(manifest.image_mean, manifest.image_std)
    save = keep_best(best_path(section.weights_dir, name), name, manifest, to_yaml(config))
    identity = identity_of(
        name, section, manifest, config.dataset.augmentations, config.resources, split.train,
        split.val, run.world_size,
    )  # fmt: skip
    resume = Resume(last_path(section.weights_dir, name), identity, section.resume == "never")
    best = fit(head, normalize, loaders, section, manifest, run, device, save, log, encode, resume)
    log.info(f"best validation mIoU {best.score.miou:.4f} in epoch {best.epoch}: {best.path}")


def live_features(
    config: Config, manifest: Manifest, device: torch.device, log: VerbosityLogger
) -> Encode:
    """The backbone that a cache of tiles was made for: normalised images to feature maps."""
    spec = describe_backbone(
        config.model, manifest.bands, config.dataset.rgb or manifest.rgb_bands
    )
    folder = config.train.processed_dir
    require_backbone(folder, manifest, Described(spec, manifest.backbone_hash))
    backbone = build_backbone(config.model, spec, HALF[manifest.feature_dtype]).to(device)
    require_backbone(folder, manifest, backbone)
    backbone.compute_in(manifest.precision)
    log.info(f"train: tiles are cached without features; {spec.name} runs in every step")
    rounded = rounding(manifest.feature_dtype)
    encode = compiled(backbone.encode, config.resources.compile, device, "train", log)
    return lambda image: rounded(encode(image))


def inference(config: Config, run: Runtime, log: VerbosityLogger) -> None:
    """Map scenes with the best head, or the one that inference.checkpoint names."""
    section = config.inference
    path = section.checkpoint or best_path(config.train.weights_dir, config.model.head)
    checkpoint = load_checkpoint(path)
    bands, rgb = checkpoint.bands, config.dataset.rgb or checkpoint.rgb_bands
    spec = describe_backbone(config.model, bands, rgb)
    require_fit(path, checkpoint, config, Described(spec, checkpoint.backbone_hash))
    scenes = scenes_to_map(section)
    device = run.device(section.device)
    log.info(f"inference: {device_reason(section.device, device)}")
    precision = precision_as_trained(path, checkpoint, config.resources.precision, device, log)
    trained = trained_as(checkpoint, path, section, precision, config.resources)
    check_spaces(section, scenes, trained)
    backbone = build_backbone(config.model, spec, HALF[checkpoint.feature_dtype])
    require_fit(path, checkpoint, config, backbone)
    head = build_head(
        checkpoint.head, checkpoint.channels, checkpoint.levels, checkpoint.num_classes, len(bands)
    )
    load_weights(head, checkpoint, path)
    segmenter = Segmenter(backbone, head, rounding(checkpoint.feature_dtype)).eval().to(device)
    segmenter.compute_in(precision)
    network = compiled(segmenter, config.resources.compile, device, "inference", log)
    predict_scenes(section, scenes, network, trained, device, log)
