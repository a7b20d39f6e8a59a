"""A demo project that needs no download: scenes, labels, a tiny random DINOv3, config.yml.

    python -m utils.demo demo             write the project into the folder demo
    python main.py demo/config.yml        run it
    python -m utils.demo demo --report    name the products and score the map

A program like main.py, so it may join models and utils. The countryside is painted by seeded code
(utils/landscape.py); the backbone has the format of a DINOv3 checkpoint but random weights, which
show the machinery and not what DINOv3 can do.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from models.backbone import write_random_backbone
from utils.grids import Grid, north_up, warp_outline
from utils.landscape import CLASSES, Landscape, paint
from utils.logging import say
from utils.metrics import SegmentationMetrics
from utils.raster import mosaic, read_whole, write_png, write_raster

SIZE = 1408  # pixels a side
GSD = 0.5  # metres
UTM = "EPSG:32633"
LABEL_CRS, LABEL_GSD = "EPSG:3035", 0.4  # the labels' own CRS and metres per pixel
IGNORE = 255
CORNERS = {"north": (412000, 5326000), "south": (412000, 5325200), "unseen": (415000, 5325600)}
COLORS = ((214, 196, 122), (46, 94, 50), (120, 120, 128), (196, 60, 48), (52, 104, 170))
BACKBONE = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}

CONFIG = """\
# yaml-language-server: $schema=../config.schema.json
# The demo project. Run it with: python main.py demo/config.yml
# Relative paths start at the folder of this file.
paths:
  raw_images_dir: scenes
  label_path: labels.tif
  processed_dir: cache
model:
  backbone: ./backbone            # random weights in the DINOv3 format
  head: unet_v2
dataset:
  classes:                        # in the order of their ids; a map shows these names and colors
    - {name: field, values: [0], color: "#d6c47a"}
    - {name: wood, values: [1], color: "#2e5e32"}
    - {name: road, values: [2], color: "#787880"}
    - {name: building, values: [3], color: "#c43c30"}
    - {name: water, values: [4], color: "#3468aa"}
prepare:
  enable: true
  tile_size: 256
verify:
  enable: true
  workers: 2
train:
  enable: true
  weights_dir: weights
  epochs: 16
  num_workers: 0                  # small tiles: loading them takes no time
inference:
  enable: true
  input_tif: unseen/unseen.tif    # no training tile is from here
  output_tif: map.tif
  tile_size: 256
  overlap: 0.25
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the project, or report on it; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="the project's folder")
    parser.add_argument("--report", action="store_true", help="name products, score the map")
    options = parser.parse_args(arguments)
    if options.report:
        return report(options.folder)
    write_project(options.folder)
    say(f"demo project in {options.folder}; run: python main.py {options.folder}/config.yml")
    return 0


def write_project(folder: Path, size: int = SIZE) -> None:
    """Write every file of the project, config.yml last; a whole project is left as it is."""
    if (folder / "config.yml").exists():
        return
    for name in ("scenes", "unseen", "truth"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    views = {name: paint(size, size, seed) for seed, name in enumerate(CORNERS)}
    grids = {name: north_up(UTM, *CORNERS[name], GSD, size, size) for name in CORNERS}
    for name, view in views.items():
        place = "unseen" if name == "unseen" else "scenes"
        write_raster(folder / place / f"{name}.tif", view.image, grids[name], nodata=0)
    target = label_grid(grids["north"], grids["south"])
    parts = [(truth_of(views[name]), grids[name]) for name in ("north", "south")]
    write_raster(folder / "labels.tif", mosaic(parts, target, IGNORE)[None], target, IGNORE)
    truth = truth_of(views["unseen"])[None]
    write_raster(folder / "truth" / "unseen.tif", truth, grids["unseen"], IGNORE)
    write_random_backbone(folder / "backbone", seed=0, **BACKBONE)
    (folder / "config.yml").write_text(CONFIG, encoding="utf-8")


def truth_of(view: Landscape) -> np.ndarray:
    """The class map with 255 where the view has no pixels."""
    return np.where(view.valid, view.classes, IGNORE).astype(np.uint8)


def label_grid(north: Grid, south: Grid) -> Grid:
    """The labels' grid: another CRS, finer pixels, without the western eighth of both scenes."""
    outlines = [
        warp_outline(grid.footprint(), grid.crs, LABEL_CRS)
        for grid in (north, south)
    ]
    west, below, east, top = outlines[0].union(outlines[1]).bounds
    west += (east - west) / 8
    height, width = (round(length / LABEL_GSD) for length in (top - below, east - west))
    return north_up(LABEL_CRS, west, top, LABEL_GSD, height, width)


def report(folder: Path) -> int:
    """Name the products and say how well the map agrees with the unseen scene's truth."""
    products = {
        "map": folder / "map.tif",
        "checkpoints and metrics": folder / "weights",
        "tile cache": folder / "cache",
        "picture": folder / "picture.png",
    }
    if not products["map"].exists():
        say(f"{products['map']}: no such file; run python main.py {folder}/config.yml first")
        return 3
    [classes], [truth] = read_whole(products["map"]), read_whole(folder / "truth" / "unseen.tif")
    scene = read_whole(folder / "unseen" / "unseen.tif")
    write_png(products["picture"], side_by_side(scene, truth, classes))
    metrics = SegmentationMetrics(len(CLASSES), IGNORE)
    metrics.update(torch.from_numpy(classes)[None], torch.from_numpy(truth)[None])
    say("products:")
    for name, path in products.items():
        say(f"  {name:24} {path}")
    say("the map against the truth of the unseen scene:")
    for line in metrics.score(0.0).table(list(CLASSES)):
        say(f"  {line}")
    return 0


def side_by_side(scene: np.ndarray, truth: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """The scene, its truth and its map at half size, (3, H/2, 3·W/2); nodata is black.

    >>> nothing = np.full((1408, 1408), IGNORE, np.uint8)
    >>> side_by_side(np.zeros((3, 1408, 1408), np.uint8), nothing, nothing).shape
    (3, 704, 2112)
    """
    colors = np.zeros((256, 3), np.uint8)
    colors[: len(COLORS)] = COLORS
    panels = [scene, *(np.moveaxis(colors[ids], -1, 0) for ids in (truth, classes))]
    return np.concatenate([panel[:, ::2, ::2] for panel in panels], axis=2)


if __name__ == "__main__":
    sys.exit(main())
