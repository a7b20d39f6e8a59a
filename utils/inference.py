"""Inference: scenes of any size to class maps, streamed by windows from disk to disk."""

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from config import TTA, Inference
from utils.blending import Blend, Rows
from utils.checkpoint import Checkpoint
from utils.distributed import autocast
from utils.ground import PolygonError
from utils.logging import VerbosityLogger
from utils.maps import (
    Content,
    Legend,
    MapError,
    MapWriter,
    UnwrittenError,
    class_map,
    confidence_map,
    map_nodata,
    probability_map,
    share_bytes,
)
from utils.polygons import write_polygons
from utils.raster import (
    RasterError,
    Reading,
    Scene,
    ground_gsd,
    open_scene,
    read_tags,
    rows_on,
)
from utils.scenes import SceneFile
from utils.tiling import Tile, batched, tiles

Segment = Callable[[Tensor], Tensor]
Flip = tuple[bool, bool, int]  # mirror columns, mirror rows, quarter turns
GSD_RATIO = 1.5  # a scene's metres per pixel to the training scenes': beyond, a warning


class InferenceError(Exception):
    """Scenes that could not be mapped; the others were."""

    exit_code = 3


def views(tta: TTA) -> list[Flip]:
    """The ways to lay a tile, the first as it is: flips, and quarter turns of each.

    A flip in both axes is a half turn, so with both flips quarter turns make eight views, not more.

    >>> views(TTA(horizontal_flip=True, vertical_flip=True))
    [(False, False, 0), (True, False, 0), (False, True, 0), (True, True, 0)]
    >>> len(views(TTA(horizontal_flip=True, vertical_flip=True, rotate90=True)))
    8
    """
    cols = (False, True) if tta.horizontal_flip else (False,)
    rows = (False, True) if tta.vertical_flip else (False,)
    turns = (0, 1, 2, 3) if tta.rotate90 else (0,)
    found: dict[bytes, Flip] = {}
    for turn in turns:
        for row in rows:
            for col in cols:
                laid = lay(torch.arange(4).view(2, 2), (col, row, turn))
                found.setdefault(laid.numpy().tobytes(), (col, row, turn))
    return list(found.values())


def lay(tensor: Tensor, flip: Flip) -> Tensor:
    """A tensor (..., rows, cols) mirrored, then turned.

    >>> lay(torch.tensor([[1, 2], [3, 4]]), (True, False, 1)).tolist()
    [[1, 3], [2, 4]]
    """
    axes = [axis for axis, wanted in ((-1, flip[0]), (-2, flip[1])) if wanted]
    return torch.rot90(tensor.flip(axes), flip[2], (-2, -1))


def lay_back(tensor: Tensor, flip: Flip) -> Tensor:
    """The inverse of `lay`.

    >>> lay_back(lay(torch.tensor([[1, 2], [3, 4]]), (True, False, 1)), (True, False, 1)).tolist()
    [[1, 2], [3, 4]]
    """
    axes = [axis for axis, wanted in ((-1, flip[0]), (-2, flip[1])) if wanted]
    return torch.rot90(tensor, -flip[2], (-2, -1)).flip(axes)


def mean_of_views(segment: Segment, pixels: Tensor, flips: Sequence[Flip]) -> Tensor:
    """Probabilities (B, K, S, S) averaged over the views, each laid back."""
    total = sum(lay_back(segment(lay(pixels, flip)), flip) for flip in flips)
    return total / len(flips)


class Prediction(NamedTuple):
    """A tile's probabilities (K, size, size), None where it has no valid pixel, and its mask."""

    tile: Tile
    probabilities: Tensor | None
    valid: np.ndarray


def predict_tiles(
    scene: Scene, plan: Sequence[Tile], segment: Segment, batch_size: int, device: torch.device
) -> Iterator[Prediction]:
    """Read tiles, run the network on batches of those that have a valid pixel, keep the order."""
    for group in batched(plan, batch_size):
        pixels = [scene.read(tile) for tile in group]
        seen = [number for number, read in enumerate(pixels) if read.valid.any()]
        found: dict[int, Tensor] = {}
        if seen:
            images = torch.from_numpy(np.stack([pixels[number].image for number in seen]))
            with torch.inference_mode(), autocast(device, "fp32"):
                found = dict(zip(seen, segment(images.to(device)), strict=True))
        for number, (tile, read) in enumerate(zip(group, pixels, strict=True)):
            yield Prediction(tile, found.get(number), read.valid)


def classes_of(rows: Rows) -> np.ndarray:
    """The most probable class of each pixel, nodata where not valid."""
    classes = rows.probabilities.argmax(0).cpu().numpy()
    classes[~rows.valid] = map_nodata(len(rows.probabilities))
    return classes


def shares_of(rows: Rows) -> np.ndarray:
    """The probability of each class as bytes, (classes, n, width)."""
    return share_bytes(rows.probabilities.clamp(0, 1).cpu().numpy(), rows.valid)


def confidence_of(rows: Rows) -> np.ndarray:
    """The winning class's probability as bytes, (n, width)."""
    return share_bytes(rows.probabilities.amax(0).clamp(0, 1).cpu().numpy(), rows.valid)


class Product(NamedTuple):
    """One raster to write: where, what its bands are, and how they come from finished rows."""

    path: Path
    content: Content
    of: Callable[[Rows], np.ndarray]


@dataclass(frozen=True, slots=True)
class Trained:
    """What inference needs to know of the weights: how to read scenes, what classes are called."""

    legend: Legend
    reading: Reading
    gsd: float | None
    tags: Mapping[str, str]
    precision: str = "fp32"


def trained_as(
    checkpoint: Checkpoint, path: Path, section: Inference, precision: str
) -> Trained:
    """How a checkpoint's head was trained, and what a map says of where it comes from."""
    colors = tuple(tuple(color) for color in checkpoint.class_colors)
    told = {"tile_size", "overlap", "blend", "tta", "min_area", "simplify"}
    settings = section.model_dump(mode="json", include=told) | {"precision": precision}
    tags = {
        "DINOV3SEG_CLASSES": json.dumps(checkpoint.class_names, ensure_ascii=False),
        "DINOV3SEG_HEAD": checkpoint.head,
        "DINOV3SEG_BACKBONE": checkpoint.backbone,
        "DINOV3SEG_CHECKPOINT_SHA256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "DINOV3SEG_SETTINGS": json.dumps(settings),
    }
    reading = Reading(
        tuple(checkpoint.bands),
        tuple((low, high) for low, high in checkpoint.ranges),
        checkpoint.nodata,
        checkpoint.gsd,
    )
    legend = Legend(tuple(checkpoint.class_names), colors)
    return Trained(legend, reading, checkpoint.ground_gsd, tags, precision)


def raster_path(path: Path, name: str, several: bool) -> Path:
    """Where a scene's raster goes: the configured path, for several scenes a file in that folder.

    >>> raster_path(Path("maps"), "north", several=True).as_posix()
    'maps/north.tif'
    """
    return path / f"{name}.tif" if several else path


def products_of(section: Inference, name: str, several: bool, legend: Legend) -> list[Product]:
    """The rasters to write for a scene; with several scenes the configured paths are folders."""
    wanted = [
        (section.output_tif, class_map(legend), classes_of),
        (section.probabilities, probability_map(legend), shares_of),
        (section.confidence, confidence_map(), confidence_of),
    ]
    return [
        Product(raster_path(path, name, several), content, of)
        for path, content, of in wanted
        if path is not None
    ]


def polygons_path(section: Inference, name: str, several: bool) -> Path | None:
    """Where a scene's polygons go, if they are wanted.

    >>> polygons_path(Inference(polygons=Path("out")), "north", several=True).as_posix()
    'out/north.gpkg'
    """
    if section.polygons is None or not several:
        return section.polygons
    return section.polygons / f"{name}.gpkg"


def predict_scenes(
    section: Inference, scenes: Sequence[SceneFile], segment: Segment, trained: Trained,
    device: torch.device, log: VerbosityLogger,
) -> None:  # fmt: skip
    """Map every scene; finished maps are kept, failures are listed and stop nothing else."""
    several = len(scenes) > 1 or section.output_tif.suffix == ""
    check_outputs(section, scenes, several)
    failures = []
    for scene in scenes:
        output = raster_path(section.output_tif, scene.name, several)
        if several and is_finished(section, scene.name, trained):
            log.info(f"inference: {scene.name}: {output} is there already, kept")
            continue
        try:
            predict_scene(section, scene, several, segment, trained, device, log)
            log.info(f"inference: map in {output}")
        except (RasterError, MapError, PolygonError) as error:
            if len(scenes) == 1 or isinstance(error, UnwrittenError):
                raise
            log.error(f"inference: {error}")
            failures.append(scene.name)
    if failures:
        raise InferenceError(
            f"{len(failures)} of {len(scenes)} scenes were not mapped: {', '.join(failures)}"
        )


def written(section: Inference) -> list[Path]:
    """The places that inference writes to: what lies there is no scene to map."""
    places = (section.output_tif, section.probabilities, section.confidence, section.polygons)
    return [path for path in places if path is not None]


def outputs_of(section: Inference, name: str, several: bool) -> list[Path]:
    """Every file that mapping a scene writes."""
    rasters = [section.output_tif, section.probabilities, section.confidence]
    paths = [raster_path(path, name, several) for path in rasters if path is not None]
    polygons = polygons_path(section, name, several)
    return paths if polygons is None else [*paths, polygons]


def check_outputs(section: Inference, scenes: Sequence[SceneFile], several: bool) -> None:
    """Refuse to write over a scene, over another output, or into a folder that is a file."""
    taken = {scene.path.resolve(): f"the scene {scene.path}" for scene in scenes}
    for scene in scenes:
        for path in outputs_of(section, scene.name, several):
            if other := taken.get(path.resolve()):
                raise InferenceError(f"{path}: would be written over {other}; name another file")
            if several and path.parent.is_file():
                raise InferenceError(f"{path.parent}: is a file; several scenes need a folder")
            taken[path.resolve()] = "another output"


def is_finished(section: Inference, name: str, trained: Trained) -> bool:
    """Whether all of a scene's files are there, from the same checkpoint and settings."""
    paths = outputs_of(section, name, several=True)
    if not all(path.is_file() for path in paths):
        return False
    try:
        return trained.tags.items() <= read_tags(paths[0]).items()
    except RasterError:
        return False


def predict_scene(
    section: Inference, file: SceneFile, several: bool, segment: Segment, trained: Trained,
    device: torch.device, log: VerbosityLogger,
) -> None:  # fmt: skip
    """Map one scene on its own grid; a product gets its name when it is whole."""
    products = products_of(section, file.name, several, trained.legend)
    with open_scene(file.path, trained.reading, file.name) as scene:
        warn_of_gsd(scene, trained, log)
        if scene.grid == scene.own_grid:
            write_products(section, scene, products, segment, trained, device, log)
        else:
            resample_products(section, scene, file, products, segment, trained, device, log)
    if (polygons := polygons_path(section, file.name, several)) is not None:
        names = trained.legend.names
        count = write_polygons(
            products[0].path, polygons, names, section.min_area, section.simplify
        )
        log.info(f"inference: {count} polygons in {polygons}")


def warn_of_gsd(scene: Scene, trained: Trained, log: VerbosityLogger) -> None:
    """Say so where a scene's pixels are much larger or smaller than the training scenes'."""
    if trained.reading.gsd is not None or trained.gsd is None or not scene.grid.georeferenced:
        return
    found = ground_gsd(scene.grid)
    if not 1 / GSD_RATIO <= found / trained.gsd <= GSD_RATIO:
        log.warning(
            f"{scene.path}: {found:.3g} m per pixel, the training scenes had {trained.gsd:.3g}; "
            "train with dataset.gsd to read all scenes alike"
        )


def write_products(
    section: Inference, scene: Scene, products: Sequence[Product], segment: Segment,
    trained: Trained, device: torch.device, log: VerbosityLogger,
) -> None:  # fmt: skip
    """Predict a scene on the grid it is read on."""
    grid, flips = scene.grid, views(section.tta)
    plan = tiles(grid.height, grid.width, section.tile_size, section.overlap)
    log.info(
        f"inference: {scene.path.name}, {grid.height}×{grid.width} pixels, "
        f"{len(plan)} tiles of {section.tile_size}, {len(flips)} view(s)"
    )
    count = len(trained.legend.names)
    blend = Blend(
        grid.height, grid.width, section.tile_size, section.overlap, count, device, section.blend
    )
    predictions = predict_tiles(
        scene, plan, lambda images: mean_of_views(segment, images, flips), section.batch_size,
        device,
    )  # fmt: skip
    with contextlib.ExitStack() as stack:
        writers = [
            stack.enter_context(
                MapWriter(each.path, grid, each.content, section.format, trained.tags)
            )
            for each in products
        ]
        work = log.progress(predictions, "inference", total=len(plan), unit="tile", every=50)
        for tile, probabilities, valid in work:
            _append(blend.feed(tile, probabilities, valid), products, writers)
        _append(blend.finish(grid.height), products, writers)


def _append(rows: Rows, products: Sequence[Product], writers: Sequence[MapWriter]) -> None:
    if len(rows.valid):
        for product, writer in zip(products, writers, strict=True):
            writer.write(product.of(rows))


def resample_products(
    section: Inference, scene: Scene, file: SceneFile, products: Sequence[Product],
    segment: Segment, trained: Trained, device: torch.device, log: VerbosityLogger,
) -> None:  # fmt: skip
    """Predict at dataset.gsd into drafts, then write these on the scene's own grid."""
    drafts = [
        each._replace(path=each.path.with_name(f".{each.path.stem}.draft.tmp"))
        for each in products
    ]
    plain = section.model_copy(update={"format": "gtiff"})
    try:
        write_products(plain, scene, drafts, segment, trained, device, log)
        own = replace(trained.reading, gsd=None)
        with open_scene(file.path, own, file.name) as source:
            for draft, product in zip(drafts, products, strict=True):
                write_on_grid(draft.path, product, source, section.format, trained.tags)
    finally:
        for draft in drafts:
            for ending in ("", ".aux.xml"):
                Path(f"{draft.path}{ending}").unlink(missing_ok=True)


def write_on_grid(
    draft: Path, product: Product, scene: Scene, format: str, tags: Mapping[str, str]
) -> None:
    """Write a raster again on a scene's own grid, nearest neighbour, where it has valid pixels."""
    grid, row = scene.grid, 0
    with MapWriter(product.path, grid, product.content, format, tags) as writer:
        for rows in rows_on(draft, grid):
            count = rows.shape[1]
            valid = scene.read(Tile(row, 0, count, grid.width)).valid
            writer.write(np.where(valid, rows, product.content.nodata).astype(rows.dtype))
            row += count
