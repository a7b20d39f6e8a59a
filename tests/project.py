"""A small project for tests: scenes, a label raster, a tiny random backbone, config.yml.

Tiles of 64 pixels, scenes of about 200 × 260, three classes that differ in colour: enough for every
phase, and each phase takes a second.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

import main
from models.backbone import write_random_backbone
from utils.cache import write_tile
from utils.checkpoint import Checkpoint
from utils.data import Sample
from utils.distributed import LAUNCH
from utils.grids import Grid, north_up
from utils.manifest import Manifest, read_manifest
from utils.raster import write_raster

PHASES = ("prepare", "verify", "train", "inference")
ROOT = Path(main.__file__).resolve().parent
CRS, GSD, NORTH, WEST = "EPSG:32633", 0.5, 5326000, 412000
IGNORE, CLASSES, TILE = 255, 3, 64
COLORS = np.array([(60, 110, 50), (180, 170, 150), (40, 60, 120)])
BACKBONE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
}


def grid(height: int, width: int, south: int = 0, crs: str = CRS, gsd: float = GSD) -> Grid:
    """A grid whose upper left corner lies `south` metres below the others'."""
    return north_up(crs, WEST, NORTH - south, gsd, height, width)


def land(height: int, width: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (3, H, W) uint8 and its classes (H, W) uint8: bands of ground with noise."""
    rng = np.random.default_rng(seed)
    row, col = np.mgrid[:height, :width]
    a, b, c = rng.uniform(0, 6, 3)
    waves = np.sin(row / 23 + a) + np.sin(col / 31 + b) + np.sin((row + col) / 41 + c)
    classes = np.digitize(waves, (-0.6, 0.6)).astype(np.uint8)
    image = COLORS[classes].transpose(2, 0, 1) + rng.normal(0, 12, (3, height, width))
    return image.clip(1, 255).astype(np.uint8), classes


def write_scene(path: Path, image: np.ndarray, where: Grid, nodata: int | None = None) -> Path:
    """A scene's GeoTIFF, in a folder that is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_raster(path, image, where, nodata)
    return path


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Nested settings with changes laid over them."""
    result = dict(base)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if nested else value
    return result


SETTINGS: dict[str, Any] = {
    "resources": {"omp_threads": 1, "precision": "fp32"},
    "logging": {"timestamps": False, "file": "run.log"},
    "paths": {"raw_images_dir": "scenes", "label_path": "labels.tif", "processed_dir": "cache"},
    "model": {"backbone": "./backbone", "head": "linear", "num_classes": CLASSES},
    "prepare": {"tile_size": TILE, "device": "cpu"},
    "verify": {"workers": 1},
    "train": {"epochs": 2, "num_workers": 0, "val_fraction": 0.25, "device": "cpu"},
    "inference": {
        "enable": True,
        "input_tif": "unseen.tif",
        "output_tif": "map.tif",
        "tile_size": TILE,
        "device": "cpu",
    },
}


def write_project(
    folder: Path,
    height: int = 200,
    width: int = 260,
    scenes: Sequence[str] = ("north",),
    nodata: int | None = 0,
    **changes: Any,
) -> Path:
    """Write a whole project; returns its config.yml. changes: sections laid over SETTINGS."""
    folder.mkdir(parents=True, exist_ok=True)
    labels = []
    for number, name in enumerate(scenes):
        image, classes = land(height, width, seed=number)
        south = int(number * height * GSD)
        write_scene(folder / "scenes" / f"{name}.tif", image, grid(height, width, south), nodata)
        labels.append(classes)
    whole = np.concatenate(labels)
    write_raster(folder / "labels.tif", whole[None], grid(*whole.shape), IGNORE)
    image, classes = land(height - 30, width - 41, seed=99)
    where = grid(height - 30, width - 41, south=5000)
    write_scene(folder / "unseen.tif", image, where, nodata)
    write_raster(folder / "truth.tif", classes[None], where, IGNORE)
    if not (folder / "backbone").exists():
        write_random_backbone(folder / "backbone", seed=0, **BACKBONE)
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(merged(SETTINGS, changes), sort_keys=False), encoding="utf-8")
    return path


def only(phase: str) -> list[str]:
    """Settings that leave one phase."""
    return [f"{each}.enable={str(each == phase).lower()}" for each in PHASES]


def run(config: Path, *settings: str) -> int:
    """Run the program in this process; --set arguments without the flag. The exit code."""
    return main.main([str(config), *(part for each in settings for part in ("--set", each))])


def start(
    command: Sequence[str | Path], folder: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command that uses this checkout's modules, offline, with one thread, to its end."""
    return subprocess.run(
        [str(part) for part in command], cwd=folder, env=surroundings(**environment), text=True,
        capture_output=True, timeout=240, check=False,
    )  # fmt: skip


def printed_by(script: str, *arguments: object, **environment: str) -> str:
    """What Python code prints in a process of its own, which has to end well."""
    command = [PYTHON, "-c", script, *map(str, arguments)]
    told = subprocess.run(
        command, env=surroundings(**environment), capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    return told.stdout


def surroundings(**changes: str) -> dict[str, str]:
    """This process's environment without traces of launchers, offline, with one thread."""
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    fixed = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    return kept | fixed | changes


LAUNCHER = {*LAUNCH, "LOCAL_WORLD_SIZE", "DINOV3SEG_CONFIG"}
PYTHON = sys.executable


def manifest_of(channels: int = 32, levels: int = 2, **changes: Any) -> Manifest:
    """What a cache of these tests is, without a cache."""
    classes = range(changes.get("num_classes", CLASSES))
    settings = {
        "backbone": "./backbone",
        "backbone_hash": "0" * 64,
        "layers": list(range(levels)),
        "norm": "final",
        "channels": channels,
        "patch_size": 16,
        "image_mean": [0.5] * 3,
        "image_std": [0.25] * 3,
        "bands": [1, 2, 3],
        "rgb": [0, 1, 2],
        "ranges": [[0.0, 255.0]] * 3,
        "nodata": None,
        "gsd": None,
        "precision": "fp32",
        "tile_size": TILE,
        "feature_dtype": "fp16",
        "num_classes": CLASSES,
        "ignore_index": IGNORE,
        "label_rules": {},
        "filters": {},
        "class_names": [f"class {number}" for number in classes],
        "class_colors": [COLORS[number % CLASSES].tolist() for number in classes],
    }
    return Manifest(**settings | changes)


def checkpoint_of(state: dict[str, torch.Tensor], **changes: Any) -> Checkpoint:
    """Weights of a linear head that was trained on four bands, of which three are seen."""
    settings = {
        "head": "linear",
        "num_classes": CLASSES,
        "channels": 4,
        "levels": 2,
        "backbone": "./backbone",
        "backbone_hash": "a" * 64,
        "layers": [1, 3],
        "norm": "final",
        "image_mean": [0.3, 0.2, 0.1, 0.2],
        "image_std": [0.6, 0.5, 0.4, 0.5],
        "patch_size": 16,
        "tile_size": TILE,
        "precision": "fp32",
        "feature_dtype": "fp16",
        "bands": [1, 2, 3, 4],
        "rgb": [2, 1, 0],
        "ranges": [[0.0, 3000.0]] * 4,
        "nodata": None,
        "gsd": 0.5,
        "ground_gsd": 0.5,
        "class_names": ["field", "wood", "water"],
        "class_colors": COLORS.tolist(),
        "ignore_index": IGNORE,
        "epoch": 7,
        "metrics": {"miou": 0.5, "iou": [0.25, None, 0.75]},
        "config": "train: {}\n",
        "state": state,
    }
    return Checkpoint(**settings | changes)


def write_stamped(folder: Path, name: str, *parts: Any, **named: Any) -> None:
    """Write a tile as one of the cache whose manifest lies in the folder."""
    write_tile(folder, name, *parts, **named, stamp=read_manifest(folder).stamp_of(name))


def make_samples(
    count: int,
    size: int = TILE,
    channels: int = 32,
    levels: int = 2,
    ignored: Callable[[int], float] = lambda number: 0.0,
    seed: int = 0,
) -> list[Sample]:
    """Tiles whose features tell their classes; `ignored` gives a tile's ignored share of rows."""
    generator = torch.Generator().manual_seed(seed)
    cells = size // 16
    samples = []
    for number in range(count):
        image, classes = land(size, size, seed=1000 * seed + number)
        label = torch.from_numpy(classes.copy())
        label[: round(size * ignored(number))] = IGNORE
        seen = torch.from_numpy(classes).unfold(0, 16, 16).unfold(1, 16, 16).float().mean((-1, -2))
        noise = torch.randn(levels, channels, cells, cells, generator=generator)
        features = [(level + seen * torch.linspace(-2, 2, channels)[:, None, None]).half()
                    for level in noise]  # fmt: skip
        samples.append(Sample(torch.from_numpy(image), features, label, f"land__r{number:06d}"))
    return samples
