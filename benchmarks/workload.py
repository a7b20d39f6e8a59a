"""The program's phases with a model of choice: the only module here that knows how they are called.

A project is a folder with a backbone of random weights and a config.yml, which is read as the
program reads it. Each phase runs with its own model, or with one that returns constants at once,
so that only the work beside the model is left.
"""

import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.meter import Spent, Watched, cpu_seconds
from benchmarks.rows import Row, command_line, report
from benchmarks.scenes import UTM, waves, write_labels, write_scene
from config import Config, Prepare, load_config
from models import build_head
from models.backbone import (
    PRECISIONS,
    BackboneSpec,
    DinoBackbone,
    Normalize,
    build_backbone,
    describe_backbone,
    write_random_backbone,
)
from models.segmenter import Segmenter
from utils.data import Sample
from utils.devices import autocast, compiled, precision_of
from utils.distributed import Runtime, distributed
from utils.engine import fit
from utils.inference import Trained, predict_scenes
from utils.loading import Loader, make_loaders
from utils.logging import VerbosityLogger
from utils.manifest import Manifest, read_manifest
from utils.maps import default_legend
from utils.prepare import encode_on, prepare
from utils.process import set_environment
from utils.raster import Reading
from utils.scenes import find_scenes
from utils.sources import Sources, describe_cache, find_sources
from utils.splits import Split

TILE = 512
BACKBONES: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 192,
        "intermediate_size": 768,
        "num_hidden_layers": 4,
        "num_attention_heads": 3,
    },
    "vits16": {
        "hidden_size": 384,
        "intermediate_size": 1536,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
    },
    "vitl16": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "wide": {  # as many channels as ViT-L/16 has, for caches that no network fills
        "hidden_size": 1024,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 16,
    },
}
Pixels = Callable[[Tensor], Any]
Part = Callable[[Path, str, int], list[Row]]  # folder, backbone, runs


def rows_of_parts(
    parts: Mapping[str, Part], backbone: str = "vits16", runs: int = 3, only: Sequence[str] = ()
) -> list[Row]:
    """The rows of a script's parts, all or some, each measured in a temporary folder of its own."""
    rows: list[Row] = []
    for name in only or parts:
        with TemporaryDirectory() as folder:
            rows += parts[name](Path(folder), backbone, runs)
    return rows


def run_parts(doc: str, parts: Mapping[str, Part], arguments: Sequence[str] | None) -> int:
    """The command line of a script of parts: print the table and the ratio."""
    parser = command_line(doc)
    parser.add_argument("--backbone", choices=sorted(BACKBONES), default="vits16")
    parser.add_argument("--runs", type=int, default=3, help="of what is compared, in turns")
    parser.add_argument("--only", choices=list(parts), action="append", help="repeatable")
    options = parser.parse_args(arguments)
    report(rows_of_parts(parts, options.backbone, options.runs, options.only or ()))
    return 0


class NoBackbone(NamedTuple):
    """What a cache needs to know of a backbone that computes nothing."""

    spec: BackboneSpec
    weights_hash: str = "0" * 64


def write_project(folder: Path, backbone: str, **changes: dict[str, Any]) -> Path:
    """Write a backbone and a config.yml; returns the latter. changes: keys laid over sections."""
    if not (folder / backbone).exists():
        write_random_backbone(folder / backbone, seed=0, **BACKBONES[backbone])
    settings: dict[str, dict[str, Any]] = {
        "resources": {"omp_threads": 1},
        "logging": {"level": "error", "timestamps": False},
        "paths": {
            "raw_images_dir": "scene.tif",
            "label_path": "labels.tif",
            "processed_dir": "cache",
        },
        "model": {"backbone": f"./{backbone}"},
        "prepare": {"device": "cpu", "tile_size": TILE},
        "verify": {"enable": False},
        "train": {"enable": False, "device": "cpu"},
        "inference": {
            "device": "cpu",
            "tile_size": TILE,
            "input_tif": "scene.tif",
            "output_tif": "map.tif",
        },
    }
    for section, keys in changes.items():
        settings[section] |= keys
    path = folder / "config.yml"
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")  # YAML all the same
    return path


def write_rasters(
    folder: Path, height: int, width: int, crs: str = UTM, classes: int = 2
) -> tuple[str, ...]:
    """Write a scene and its labels, or find those of that size; overrides that name them."""
    size = f"{height}x{width}"
    scene, labels = folder / f"scene_{size}.tif", folder / f"labels_{size}_{crs[5:]}.tif"
    if not scene.exists():
        write_scene(scene, height, width)
    if not labels.exists():
        write_labels(labels, height, width, crs, classes)
    return (
        f"paths.raw_images_dir={scene}", f"paths.label_path={labels}",
        f"inference.input_tif={scene}",
    )  # fmt: skip


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The configuration, in force: environment and threads as the program sets them, one thread."""
    config = load_config(path, overrides)
    set_environment(config)
    torch.set_num_threads(config.resources.omp_threads)
    torch.set_float32_matmul_precision(config.resources.matmul_precision)
    return config


def silent() -> VerbosityLogger:
    """A logger that says nothing."""
    return VerbosityLogger(stream=io.StringIO(), silent=True)


# ---- prepare ----


def backbone_of(config: Config) -> DinoBackbone:
    """The backbone as prepare loads it."""
    return build_backbone(config.model, describe_backbone(config.model))


def manifest_of(config: Config, sources: Sources, known: DinoBackbone | NoBackbone) -> Manifest:
    """What the cache of the project's scene is to be."""
    return describe_cache(config, sources, known, Runtime().device(config.prepare.device))


def encode_of(config: Config, manifest: Manifest, backbone: DinoBackbone) -> Pixels:
    """Pixels in memory to what is cached of them, as prepare is given it."""
    device = Runtime().device(config.prepare.device)
    network = backbone.to(device).compute_in(manifest.precision)
    network = compiled(network, config.resources.compile, device, "prepare", silent())
    return encode_on(device, manifest, network)


def null_encode(spec: BackboneSpec, section: Prepare) -> Pixels:
    """Feature maps that are there already."""
    batch, cells = section.batch_size, section.tile_size // spec.patch_size
    made = torch.Generator().manual_seed(0)
    shape = (batch, len(spec.layers), cells, cells, spec.channels)
    maps = torch.randn(shape, generator=made).half().to(Runtime().device(section.device))
    return lambda images: {"features": maps[: len(images)].permute(0, 1, 4, 2, 3)}


def set_aside(folder: Path) -> None:
    """Empty a cache's tiles and move it away; what holds it deletes it in the end.

    For each new file, ext4 without a journal passes over all those deleted in the last minutes: a
    cache that takes the place of a deleted one would cost more than the first one does.
    """
    for path in folder.glob("*.pt"):
        os.truncate(path, 0)
    if folder.exists():
        folder.rename(mkdtemp(dir=folder.parent))


def run_prepare(config: Config, backbone: DinoBackbone | None = None) -> Spent:
    """Make the cache anew; without a backbone its features are constants."""
    set_aside(config.prepare.processed_dir)
    known = backbone or NoBackbone(describe_backbone(config.model))
    sources = find_sources(config)
    manifest = manifest_of(config, sources, known)
    if backbone is None:
        encode = Watched(null_encode(known.spec, config.prepare))
    else:
        encode = Watched(encode_of(config, manifest, backbone))
    seed = config.resources.seed
    prepare(config.prepare, sources, manifest, encode, seed, Runtime(), silent())
    return encode.spent()


def prepare_anew(path: Path, overrides: Sequence[str]) -> Spent:
    """Prepare with its network, in a process that knows nothing yet."""
    config = load(path, overrides)
    return run_prepare(config, backbone_of(config))


def null_prepare(path: Path, overrides: Sequence[str]) -> Spent:
    """Prepare without a network, in a process that knows nothing yet."""
    return run_prepare(load(path, overrides))


def cache_files(config: Config) -> tuple[list[int], BackboneSpec]:
    """The bytes of each cached tile, and what its features are."""
    sizes = [path.stat().st_size for path in config.prepare.processed_dir.glob("*.pt")]
    return sizes, describe_backbone(config.model)


def dtype_of(config: Config) -> torch.dtype:
    """What models compute in."""
    return PRECISIONS[precision_in(config)]


def precision_in(config: Config) -> str:
    """The name of what models compute in."""
    return precision_of(config.resources.precision, Runtime().device(config.prepare.device))


@torch.no_grad()  # in inference mode torch.compile would refuse it
def bare_forward(backbone: DinoBackbone, image: Tensor) -> None:
    """The least that features take: the blocks up to the deepest one needed, and the norm."""
    tokens, places = backbone.embeddings(image), backbone.rope(image)
    for block in backbone.blocks:
        tokens = block(tokens, position_embeddings=places)
    backbone.norm(tokens)


# ---- inference ----


def segmenter_of(config: Config, backbone: DinoBackbone) -> Segmenter:
    """Backbone and a head of random weights as inference joins them."""
    spec, section = backbone.spec, config.model
    torch.manual_seed(0)
    head = build_head(
        section.head, spec.channels, len(spec.layers), section.num_classes, len(spec.image_mean)
    )
    segmenter = Segmenter(backbone, head).eval().to(Runtime().device(config.inference.device))
    return segmenter.compute_in(precision_in(config))


@lru_cache(maxsize=1)
def constant_shares(batch: int, classes: int, device: torch.device) -> Tensor:
    """Probabilities (batch, classes, 512, 512) in waves, so that the map is not of one class."""
    heights = torch.from_numpy(waves(0)).float()
    levels = torch.linspace(-0.6, 0.6, classes)[:, None, None]
    shares = (-20 * (heights - levels) ** 2).softmax(0)
    return shares.repeat(batch, 1, 1, 1).to(device)


def run_inference(config: Config, segmenter: Segmenter | None = None) -> Spent:
    """Map the scene; without a network the probabilities are constants."""
    section, classes = config.inference, config.model.num_classes
    device = Runtime().device(section.device)
    if segmenter is None:
        shares = constant_shares(section.batch_size, classes, device)
        segment = Watched(lambda pixels: shares[: len(pixels)])
    else:
        wanted = config.resources.compile
        segment = Watched(compiled(segmenter, wanted, device, "inference", silent()))
    scenes, _ = find_scenes(section.input_tif, "inference.input_tif")
    trained = Trained(default_legend(classes), Reading(), None, {}, precision_in(config))
    predict_scenes(section, scenes, segment, trained, device, silent())
    return segment.spent()


def bare_segment(config: Config, segmenter: Segmenter, pixels: Tensor) -> None:
    """Backbone and head on a batch and nothing else."""
    device = Runtime().device(config.inference.device)
    with torch.inference_mode(), autocast(device, precision_in(config)):
        segmenter(pixels)


def map_anew(path: Path, overrides: Sequence[str]) -> Spent:
    """Inference with its network, in a process that knows nothing yet."""
    config = load(path, overrides)
    return run_inference(config, segmenter_of(config, backbone_of(config)))


def null_map(path: Path, overrides: Sequence[str]) -> Spent:
    """Inference without a network, in a process that knows nothing yet."""
    return run_inference(load(path, overrides))


# ---- train ----


class Epoch(NamedTuple):
    """What an epoch took after its first batch: wall clock, that in which it waited, CPU."""

    samples: int
    span: float
    waited: float
    cpu: float

    @property
    def over_steps(self) -> float:
        """The whole over the part in which it did not wait for a batch.

        >>> Epoch(samples=8, span=10.1, waited=0.1, cpu=10).over_steps
        1.01
        """
        return self.span / (self.span - self.waited)


class Epochs(VerbosityLogger):
    """A logger that says nothing and meters the batches that pass its progress bar."""

    def __init__(self) -> None:
        super().__init__(stream=io.StringIO(), silent=True)
        self.spent: list[Epoch] = []

    def progress(self, items: Iterable[Sample], *_: Any, **__: Any) -> Iterator[Sample]:
        """Pass batches on, and remember how long each was waited for."""
        batches = iter(items)
        samples, waited = 0, 0.0
        yield next(batches)  # loaders start with it
        start, cpu, asked = time.perf_counter(), cpu_seconds(), time.perf_counter()
        for batch in batches:
            waited += time.perf_counter() - asked
            samples += len(batch.name)
            yield batch
            asked = time.perf_counter()
        span = time.perf_counter() - start
        self.spent.append(Epoch(samples, span, waited, cpu_seconds() - cpu))


def split_of(config: Config) -> tuple[Manifest, Split]:
    """The cache, and all of its tiles but one to train on."""
    manifest = read_manifest(config.train.processed_dir)
    first, *others = sorted(manifest.tiles)
    return manifest, Split(train=others, val=[first])


def train_batches(config: Config) -> Loader:
    """A lone process's batches to learn from."""
    manifest, split = split_of(config)
    turns, seed = config.dataset.augmentations, config.resources.seed
    return make_loaders(split, manifest, config.train, turns, seed, Runtime()).train


def run_training(config: Config, log: VerbosityLogger) -> None:
    """Fit a head to all tiles of the cache but the one that validates."""
    section, seed = config.train, config.resources.seed
    manifest, split = split_of(config)
    with distributed(config.resources) as run:
        loaders = make_loaders(split, manifest, section, config.dataset.augmentations, seed, run)
        torch.manual_seed(seed)
        head = build_head(
            config.model.head, manifest.channels, len(manifest.layers), manifest.num_classes,
            len(manifest.bands),
        )  # fmt: skip
        normalize = Normalize(manifest.image_mean, manifest.image_std)
        fit(
            head, normalize, loaders, section, manifest, run, run.device(section.device),
            lambda *_: Path(), log,
        )  # fmt: skip
