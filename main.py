"""DINOv3Seg: from GeoTIFFs and labels to a trained head and a finished map, on a frozen DINOv3.

    python main.py config.yml
    python main.py config.yml --set train.epochs=5 --set model.head=linear
    torchrun --standalone --nproc_per_node=4 main.py config.yml --set resources.distributed=true

Phases, each switched by its `enable` key: prepare (cache frozen features of labelled tiles), verify
(find bad tiles), train (fit a head), inference (map a scene). Without an argument the configuration
is $DINOV3SEG_CONFIG, or the nearest config.yml in this folder and the ones above it.

Exit codes: 0 done, 2 configuration, 3 input data or artefact, 4 environment (device, hub, disk,
memory, permission), 5 training diverged, 75 stopped by a signal (run again), 1 a bug of ours.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from config import Config, ConfigError, find_config, load_config, to_yaml

if TYPE_CHECKING:
    import torch

    from utils.cache import Manifest
    from utils.distributed import Runtime
    from utils.engine import Encode
    from utils.logging import VerbosityLogger

# Imports of torch and everything above it stand inside the functions that need them: `--help` and a
# wrong configuration answer at once, and thread counts are set before torch reads them.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    >>> import contextlib, io
    >>> with contextlib.redirect_stderr(io.StringIO()) as said:
    ...     main(["no-such.yml"]), "no-such.yml" in said.getvalue()
    (2, True)
    """
    from utils.logging import complain, launched_rank, say

    options = parse(arguments)
    try:
        config = load_config(find_config(options.config), options.set)
    except ConfigError as error:
        if launched_rank() == 0:
            complain(str(error))
        return ConfigError.exit_code
    if options.print_config:
        say(to_yaml(config).rstrip())
        return 0
    return guarded(config)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line's options.

    >>> parse(["config.yml", "--set", "train.epochs=5"]).set
    ['train.epochs=5']
    """
    usage, _, rest = __doc__.partition("\n\n")
    parser = argparse.ArgumentParser(
        description=usage, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", help="the YAML file that drives the run")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override one key, such as train.epochs=5; repeatable; its relative paths start here",
    )  # fmt: skip
    parser.add_argument(
        "--print-config", action="store_true", help="print the resolved configuration and stop"
    )
    return parser.parse_args(arguments)


def guarded(config: Config) -> int:
    """Run the phases; what goes wrong becomes one line and the exit code of its kind."""
    from utils.logging import VerbosityLogger, complain, launched_rank
    from utils.process import exit_code_of, one_line, set_environment, stoppable, write_status

    rank, section = launched_rank(), config.logging
    set_environment(config)
    try:
        log = VerbosityLogger(section.level, section.timestamps, section.file, silent=rank > 0)
    except OSError as error:
        complain(f"[ERROR] logging.file: {error}")
        return 4
    code, said, status = 1, "", partial(write_status, config.train.weights_dir)
    tell = log.error if rank == 0 else lambda text: complain(f"[ERROR] rank {rank}: {text}")
    try:
        if rank == 0:
            status(None)
        with stoppable():
            run_phases(config, log)
        code = 0
    except Exception as error:
        said, known = one_line(error), exit_code_of(error)
        if known is None:
            raise
        code = known
        (log.error if getattr(error, "everywhere", False) else tell)(said)
    finally:
        if rank == 0:
            status(code, said)
        log.close()
    return code


def run_phases(config: Config, log: "VerbosityLogger") -> None:
    """Prepare, verify and train among the ranks; then the first one infers."""
    import torch

    from utils.block_cache import make_room
    from utils.distributed import distributed
    from utils.logging import TimedBlock
    from utils.process import STOP, within_memory

    make_room(config)
    torch.set_float32_matmul_precision(config.resources.matmul_precision)
    with distributed(config.resources) as run:
        for phase in (prepare, verify, train):
            STOP.check()
            if getattr(config, phase.__name__).enable:
                with TimedBlock(log, phase.__name__), within_memory(phase.__name__):
                    phase(config, run, log)
    # the group is left by now: nobody should wait in it while one rank maps a scene for hours
    STOP.check()
    if run.is_main and config.inference.enable:
        with TimedBlock(log, "inference"), within_memory("inference"):
            inference(config, run, log)


def prepare(config: Config, run: "Runtime", log: "VerbosityLogger") -> None:
    """Cache the frozen features of every labelled tile."""
    from models.backbone import build_backbone, describe_backbone
    from utils.distributed import compiled, device_reason
    from utils.locks import alone_in
    from utils.pace import settle_cache
    from utils.prepare import count_tiles, describe_cache, encode_on, find_sources, prepare
    from utils.quantize import HALF

    device = run.device(config.prepare.device)
    log.info(f"prepare: {device_reason(config.prepare.device, device)}")
    sources = find_sources(config)
    spec = describe_backbone(config.model, sources.reading.bands, config.dataset.rgb)
    for remark in spec.remarks:
        log.warning(remark)
    backbone = build_backbone(config.model, spec, HALF[config.prepare.feature_dtype])
    log.info(f"prepare: {spec.name}, blocks {list(spec.layers)}, mean {list(spec.image_mean)}")
    log.info(f"prepare: {sources.reading.line()}")
    manifest, section = describe_cache(config, sources, backbone, device), config.prepare
    backbone.to(device).compute_in(manifest.precision)
    if config.dataset.cache == "auto":
        manifest = settle_cache(
            manifest, section.processed_dir, backbone, device, section.batch_size,
            count_tiles(sources, section.tile_size), config.train.epochs, run, log,
        )  # fmt: skip
    encode = encode_on(device, manifest, compiled(backbone, config.resources.compile, device, log))
    with run.first(alone_in(section.processed_dir, "prepare.processed_dir")):
        prepare(section, sources, manifest, encode, config.resources.seed, run, log)


def verify(config: Config, run: "Runtime", log: "VerbosityLogger") -> None:
    """Check every cached tile and delete the bad ones."""
    from utils.data import verify
    from utils.locks import alone_in

    folder = config.verify.processed_dir
    with run.first(alone_in(folder, "verify.processed_dir", make=False)):
        verify(folder, config.verify.workers, run, log)


def train(config: Config, run: "Runtime", log: "VerbosityLogger") -> None:
    """Fit the head to the cached tiles and keep the weights with the best validation mIoU."""
    import torch

    from models import build_head
    from models.backbone import Normalize
    from utils.checkpoint import require_cache
    from utils.data import load_split, make_loaders
    from utils.distributed import device_reason
    from utils.engine import best_path, fit, keep_best
    from utils.locks import alone_in
    from utils.resume import Resume, identity_of, last_path

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
        name, section, manifest, config.dataset.augmentations, seed, split.train, split.val,
        run.world_size,
    )  # fmt: skip
    resume = Resume(last_path(section.weights_dir, name), identity, section.resume == "never")
    with run.first(alone_in(section.weights_dir, "train.weights_dir")):
        best = fit(
            head, normalize, loaders, section, manifest, run, device, save, log, encode, resume
        )
    log.info(f"best validation mIoU {best.score.miou:.4f} in epoch {best.epoch}: {best.path}")


def live_features(
    config: Config, manifest: "Manifest", device: "torch.device", log: "VerbosityLogger"
) -> "Encode":
    """The backbone that a cache of tiles was made for: normalised images to feature maps."""
    from models.backbone import build_backbone, describe_backbone
    from utils.checkpoint import require_backbone
    from utils.quantize import HALF, rounding

    spec = describe_backbone(
        config.model, manifest.bands, config.dataset.rgb or manifest.rgb_bands
    )
    backbone = build_backbone(config.model, spec, HALF[manifest.feature_dtype]).to(device)
    require_backbone(config.train.processed_dir, manifest, backbone)
    backbone.compute_in(manifest.precision)
    log.info(f"train: tiles are cached without features; {spec.name} runs in every step")
    rounded = rounding(manifest.feature_dtype)
    return lambda image: rounded(backbone.encode(image))


def inference(config: Config, run: "Runtime", log: "VerbosityLogger") -> None:
    """Map scenes with the best head, or the one that inference.checkpoint names."""
    from models import build_head
    from models.backbone import build_backbone, describe_backbone
    from models.segmenter import Segmenter
    from utils.checkpoint import load_checkpoint, load_weights, precision_as_trained, require_fit
    from utils.distributed import compiled, device_reason
    from utils.engine import best_path
    from utils.inference import predict_scenes, trained_as, written
    from utils.quantize import HALF, rounding
    from utils.scenes import find_scenes

    section = config.inference
    scenes, _ = find_scenes(section.input_tif, "inference.input_tif", except_in=written(section))
    device = run.device(section.device)
    log.info(f"inference: {device_reason(section.device, device)}")
    path = section.checkpoint or best_path(config.train.weights_dir, config.model.head)
    checkpoint = load_checkpoint(path)
    bands, rgb = checkpoint.bands, config.dataset.rgb or checkpoint.rgb_bands
    spec = describe_backbone(config.model, bands, rgb)
    backbone = build_backbone(config.model, spec, HALF[checkpoint.feature_dtype])
    require_fit(path, checkpoint, config, backbone)
    precision = precision_as_trained(path, checkpoint, config.resources.precision, device, log)
    head = build_head(
        checkpoint.head, checkpoint.channels, checkpoint.levels, checkpoint.num_classes, len(bands)
    )
    load_weights(head, checkpoint, path)
    segmenter = Segmenter(backbone, head, rounding(checkpoint.feature_dtype)).eval().to(device)
    segmenter.compute_in(precision)
    trained = trained_as(checkpoint, path, section, precision)
    network = compiled(segmenter, config.resources.compile, device, log)
    predict_scenes(section, scenes, network, trained, device, log)


if __name__ == "__main__":
    sys.exit(main())
