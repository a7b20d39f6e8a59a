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
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from config import Config, ConfigError, find_config, load_config, to_yaml

if TYPE_CHECKING:
    from utils.cache import Manifest
    from utils.distributed import Runtime
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

    rank, section = launched_rank(), config.logging
    set_environment(config)
    try:
        log = VerbosityLogger(section.level, section.timestamps, section.file, silent=rank > 0)
    except OSError as error:
        complain(f"[ERROR] logging.file: {error}")
        return 4
    tell = log.error if rank == 0 else lambda text: complain(f"[ERROR] rank {rank}: {text}")
    try:
        with stoppable():
            run_phases(config, log)
    except KeyboardInterrupt:
        log.error("stopped by a signal; what is finished is kept, run it again to go on")
        return 75
    except Exception as error:
        code = exit_code_of(error)
        if code is None:
            raise
        (log.error if getattr(error, "everywhere", False) else tell)(one_line(error))
        return code
    finally:
        log.close()
    return 0


def set_environment(config: Config) -> None:
    """Thread counts and cache sizes, before the libraries that read them are imported."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    share = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    os.environ["OMP_NUM_THREADS"] = str(min(config.resources.omp_threads, share))
    os.environ.setdefault("GDAL_CACHEMAX", "256")  # MB; GDAL's default is 5 % of the memory


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM is like Ctrl-C inside. Afterwards a rank is deaf to torchrun, which stops all ranks
    when one ends: it is ending by itself, with its own exit code.

    >>> before = signal.getsignal(signal.SIGTERM)
    >>> with stoppable(): signal.getsignal(signal.SIGTERM).__name__
    'stop'
    >>> signal.getsignal(signal.SIGTERM) == before
    True
    """

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN if "RANK" in os.environ else before)


def exit_code_of(error: Exception) -> int | None:
    """The exit code of an error's kind; None for a bug of ours.

    >>> exit_code_of(ConfigError(["a"])), exit_code_of(PermissionError()), exit_code_of(KeyError())
    (2, 4, None)
    """
    if isinstance(error, OSError) or out_of_memory(error):
        return 4
    return getattr(error, "exit_code", None)


def out_of_memory(error: Exception) -> str:
    """What to say where memory ran out, here or in a worker that the system killed; else nothing.

    >>> out_of_memory(MemoryError()), out_of_memory(KeyError("memory"))
    ('out of memory; lower the batch_size or the workers of this phase', '')
    """
    kind, text = type(error).__name__, str(error)
    remedy = "lower the batch_size or the workers of this phase"
    if kind in ("MemoryError", "OutOfMemoryError") or "DefaultCPUAllocator" in text:
        return f"out of memory; {remedy}"
    if kind == "BrokenProcessPool" or text.startswith("DataLoader worker (pid"):
        return f"a worker process was killed, mostly for want of memory; {remedy}"
    return ""


def one_line(error: Exception) -> str:
    """What an error says, without the traceback that a loader process wraps it in.

    >>> one_line(PermissionError(13, "Permission denied", "tiles"))
    "[Errno 13] Permission denied: 'tiles'"
    """
    text = out_of_memory(error) or str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition("Error: ")[2]
    return text


def run_phases(config: Config, log: "VerbosityLogger") -> None:
    """Prepare, verify and train among the ranks; then the first one infers."""
    import torch

    from utils.distributed import distributed
    from utils.logging import TimedBlock

    torch.set_float32_matmul_precision(config.resources.matmul_precision)
    with distributed(config.resources) as run:
        for phase in (prepare, verify, train):
            if getattr(config, phase.__name__).enable:
                with TimedBlock(log, phase.__name__):
                    phase(config, run, log)
    # the group is left by now: nobody should wait in it while one rank maps a scene for hours
    if run.is_main and config.inference.enable:
        with TimedBlock(log, "inference"):
            inference(config, run, log)


def prepare(config: Config, run: "Runtime", log: "VerbosityLogger") -> None:
    """Cache the frozen features of every labelled tile."""
    from models.backbone import build_backbone, describe_backbone
    from utils.distributed import device_reason
    from utils.prepare import describe_cache, encode_on, prepare

    device = run.device(config.prepare.device)
    log.info(f"prepare: {device_reason(config.prepare.device, device)}")
    spec = describe_backbone(config.model)
    for remark in spec.remarks:
        log.warning(remark)
    backbone = build_backbone(config.model, spec)
    log.info(f"prepare: {spec.name}, blocks {list(spec.layers)}, mean {list(spec.image_mean)}")
    manifest = describe_cache(config, backbone, device)
    prepare(config.prepare, manifest, encode_on(device, backbone), run, log)


def verify(config: Config, run: "Runtime", log: "VerbosityLogger") -> None:
    """Check every cached tile and delete the bad ones."""
    from utils.data import verify

    verify(config.verify.processed_dir, config.verify.workers, run, log)


def train(config: Config, run: "Runtime", log: "VerbosityLogger") -> None:
    """Fit the head to the cached tiles and keep the weights with the best validation mIoU."""
    import torch

    from models import build_head
    from models.backbone import Normalize
    from utils.data import load_split, make_loaders
    from utils.distributed import device_reason
    from utils.engine import best_path, fit, keep_best

    section, name, seed = config.train, config.model.head, config.resources.seed
    manifest, split = load_split(section, config.dataset.splits, seed, log)
    require_cache(config, manifest)
    device = run.device(section.device)
    log.info(f"train: {device_reason(section.device, device)}")
    loaders = make_loaders(split, section, config.dataset.augmentations, seed, run)
    torch.manual_seed(seed)  # here, so that a head starts alike whether prepare ran before or not
    head = build_head(name, manifest.channels, len(manifest.layers), manifest.num_classes)
    log.info(f"train: {name}, {sum(p.numel() for p in head.parameters()) / 1e6:.2f} M parameters")
    normalize = Normalize(manifest.image_mean, manifest.image_std)
    save = keep_best(best_path(section.weights_dir, name), name, manifest, to_yaml(config))
    best = fit(head, normalize, loaders, section, manifest, run, device, save, log)
    log.info(f"best validation mIoU {best.score.miou:.4f} in epoch {best.epoch}: {best.path}")


def require_cache(config: Config, manifest: "Manifest") -> None:
    """Refuse a cache made with other settings than the configuration has by now."""
    from utils.checkpoint import require_equal

    model = config.model
    stated = {
        "num_classes": model.num_classes,
        "ignore_index": config.dataset.ignore_index,
        "layers": None if model.layers is None else list(model.layers),
        "channels": model.dino_channels,
    }
    wanted = {key: value for key, value in stated.items() if value is not None}
    found = {key: getattr(manifest, key) for key in wanted}
    require_equal(config.train.processed_dir, found, wanted)


def inference(config: Config, run: "Runtime", log: "VerbosityLogger") -> None:
    """Map a scene with the best head, or the one that inference.checkpoint names."""
    from models import build_head
    from models.backbone import build_backbone, describe_backbone
    from models.segmenter import Segmenter
    from utils.checkpoint import load_checkpoint, load_weights, require_fit
    from utils.distributed import device_reason
    from utils.engine import best_path
    from utils.inference import predict_scene

    section = config.inference
    device = run.device(section.device)
    log.info(f"inference: {device_reason(section.device, device)}")
    path = section.checkpoint or best_path(config.train.weights_dir, config.model.head)
    checkpoint = load_checkpoint(path)
    backbone = build_backbone(config.model, describe_backbone(config.model))
    require_fit(path, checkpoint, config.model, backbone, device, log)
    head = build_head(
        checkpoint.head, checkpoint.channels, checkpoint.levels, checkpoint.num_classes
    )
    load_weights(head, checkpoint, path)
    segmenter = Segmenter(backbone, head).eval().to(device)
    output = predict_scene(section, segmenter, checkpoint.num_classes, device, log)
    log.info(f"inference: map in {output}")


if __name__ == "__main__":
    sys.exit(main())
