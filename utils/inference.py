"""Inference: scenes of any size to class maps, streamed by windows from disk to disk."""

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import TTA, Inference
from utils.artefacts import sweep, temporary_of
from utils.blending import Strip
from utils.devices import autocast, most_at_once, upload
from utils.grids import ground_gsd
from utils.ground import PolygonError
from utils.journal import Journal, journal_held
from utils.logging import VerbosityLogger
from utils.maps import MapError, MapWriter, UnwrittenError
from utils.opening import RasterError
from utils.outputs import (
    Trained,
    check_outputs,
    check_space,
    in_folder,
    is_finished,
    outputs_of,
    polygons_path,
    tags_of,
)
from utils.polygons import UnwrittenPolygonsError, write_polygons
from utils.process import STOP
from utils.products import (
    MB,
    InferenceError,
    Layout,
    Mosaic,
    Prediction,
    Product,
    Sheet,
    blend_of,
    layout_of,
    products_of,
    raster_path,
    stored_rows,
    work_left,
)
from utils.raster import Pixels, Scene, open_scene, rows_on
from utils.scenes import SceneFile
from utils.streaming import ahead, behind
from utils.tiling import Tile, batched, tiles
from utils.turns import Turn, distinct_turns

Network = Callable[[Tensor], Tensor]  # pixels (B, bands, S, S) to probabilities (B, K, S, S)
Segment = Callable[[np.ndarray], Tensor]  # the same, from raw pixels in memory
GSD_RATIO = 1.5  # a scene's metres per pixel to the training scenes': beyond, a warning


def views(tta: TTA) -> list[Turn]:
    """The ways to lay a tile, the first as it is: flips, and quarter turns of each.

    >>> views(TTA(vertical_flip=True))[1]
    Turn(hflip=False, vflip=True, quarters=0)
    """
    return distinct_turns(tta.horizontal_flip, tta.vertical_flip, tta.rotate90)


def segment_on(
    device: torch.device, precision: str, network: Network, turns: Sequence[Turn]
) -> Segment:
    """A network as a function of pixels in memory: they go up raw, probabilities stay there."""

    def segment(images: np.ndarray) -> Tensor:
        with torch.no_grad(), autocast(device, precision):
            return mean_of_views(network, upload(images, device), turns, most_at_once(device))

    return segment


def mean_of_views(
    network: Network, pixels: Tensor, turns: Sequence[Turn], most: int | None = None
) -> Tensor:
    """Probabilities (B, K, S, S) averaged over the views, each laid back; all views are one batch.

    most: images that the network is given at once, None for all.
    """
    laid = torch.cat([turn.apply(pixels) for turn in turns]) if len(turns) > 1 else pixels
    total = None
    for first in range(0, len(laid), most or len(laid)):
        found = network(laid[first : first + (most or len(laid))])
        if len(found) == len(laid) == len(pixels):
            return found
        if total is None:
            total = found.new_zeros(len(pixels), *found.shape[1:])
        for number, probabilities in enumerate(found, start=first):
            view, place = divmod(number, len(pixels))
            total[place] += turns[view].undo(probabilities)
    return total / len(turns)


def predict_batch(
    group: Sequence[Tile], found: Sequence[Pixels], segment: Segment
) -> list[Prediction]:
    """Run the network on those of some tiles that have a valid pixel."""
    seen = [number for number, pixels in enumerate(found) if pixels.valid.any()]
    answers: dict[int, Tensor] = {}
    if seen:
        images = np.stack([found[number].image for number in seen])
        answers = dict(zip(seen, segment(images), strict=True))
    return [
        Prediction(tile, answers.get(number), pixels.valid)
        for number, (tile, pixels) in enumerate(zip(group, found, strict=True))
    ]


def predict_scenes(
    section: Inference, scenes: Sequence[SceneFile], network: Network, trained: Trained,
    device: torch.device, log: VerbosityLogger,
) -> None:  # fmt: skip
    """Map every scene; finished maps are kept, failures are listed and stop nothing else."""
    several = in_folder(section, scenes)
    check_outputs(section, scenes, several)
    for folder in {path.parent for path in outputs_of(section, scenes[0].name, several)}:
        sweep(folder)
    failures = []
    for scene in scenes:
        output = raster_path(section.output_tif, scene.name, several)
        if several and is_finished(section, scene, trained):
            log.info(f"inference: {scene.name}: {output} is there already, kept")
            continue
        try:
            predict_scene(section, scene, several, network, trained, device, log)
            log.info(f"inference: map in {output}")
        except (RasterError, MapError, PolygonError) as error:
            if len(scenes) == 1 or isinstance(error, UnwrittenError | UnwrittenPolygonsError):
                raise
            log.error(f"inference: {error}")
            failures.append(scene.name)
    if failures:
        raise InferenceError(
            f"{len(failures)} of {len(scenes)} scenes were not mapped: {', '.join(failures)}"
        )


def predict_scene(
    section: Inference, file: SceneFile, several: bool, network: Network, trained: Trained,
    device: torch.device, log: VerbosityLogger,
) -> None:  # fmt: skip
    """Map one scene on its own grid; a product gets its name when it is whole."""
    products = products_of(section, file.name, several, trained.legend)
    resume = products[0].path
    with contextlib.ExitStack() as stack:
        scene = stack.enter_context(open_scene(file.path, trained.reading, file.name))
        warn_of_gsd(scene, trained, log)
        check_space(section, scene, products, several)
        stack.enter_context(journal_held(resume, "inference.output_tif"))
        write = write_products if scene.grid == scene.own_grid else resample_products
        journal = write(section, scene, products, resume, network, trained, device, log)
        if (polygons := polygons_path(section, file.name, several)) is not None:
            names, least = trained.legend.names, section.min_area
            count = write_polygons(resume, polygons, names, least, section.simplify)
            log.info(f"inference: {count} polygons in {polygons}")
        journal.discard()


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
    section: Inference, scene: Scene, products: Sequence[Product], resume: Path, network: Network,
    trained: Trained, device: torch.device, log: VerbosityLogger,
) -> Journal:  # fmt: skip
    """Predict a scene on the grid it is read on; rows that are finished go to a journal first.

    resume: the path that the journal lies beside.
    """
    grid, count = scene.grid, len(trained.legend.names)
    batch = min(section.batch_size, most_at_once(device) or section.batch_size)
    layout = layout_of(section, grid, products, count, batch)
    strips = layout.strips
    work = plan_of(section, scene, layout, log)
    rows = sorted({tile.row for _, tile in work})
    plan = journal_plan(section, scene, products, strips, trained)
    journal = Journal(resume, plan, stored_rows(strips, rows, grid.height, products))
    tags = tags_of(scene, trained)
    with contextlib.ExitStack() as stack:
        sheets = []
        for product in products:
            writer = MapWriter(
                product.path, scene.grid, product.content, section.format, tags
            )
            sheets.append(Sheet(product, stack.enter_context(writer), section.tile_size))
        mosaic = Mosaic(strips, rows, blend_of(section, grid, count, device), sheets, journal)
        left = work_left(work, mosaic, batch)
        if len(left) < len(work):
            log.info(f"inference: going on with tile {len(work) - len(left) + 1} of {len(work)}")
        segment = segment_on(device, trained.precision, network, views(section.tta))
        readers = [reader_of(scene) for _ in range(section.readers)]
        predict_tiles(left, batch, readers, segment, mosaic, layout.waiting, log)
    return journal


def journal_plan(
    section: Inference, scene: Scene, products: Sequence[Product], strips: Sequence[Strip],
    trained: Trained,
) -> dict[str, Any]:  # fmt: skip
    """All that the rows of a map depend on."""
    return {
        "tags": dict(trained.tags),
        "scene": scene.identity,
        "reading": str(scene.reading),
        "products": [[product.of.__name__, product.content.dtype] for product in products],
        "strips": strips,
        "size": [section.tile_size, section.overlap, section.blend],
    }


@contextlib.contextmanager
def reader_of(scene: Scene) -> Iterator[Callable[[Tile], Pixels]]:
    """A handle of its own on a scene, to read tiles by."""
    with open_scene(scene.path, scene.reading, scene.name) as own:
        yield own.read


def plan_of(
    section: Inference, scene: Scene, layout: Layout, log: VerbosityLogger
) -> list[tuple[Strip, Tile]]:
    """The tiles to predict, in order, each with the columns that it is for."""
    grid, strips = scene.grid, layout.strips
    plan = tiles(grid.height, grid.width, section.tile_size, section.overlap)
    work = [(strip, tile) for strip in strips for tile in plan if strip.meets(tile)]
    log.info(
        f"inference: {scene.path.name}, {grid.height}×{grid.width} pixels, "
        f"{len(plan)} tiles of {section.tile_size}, {len(views(section.tta))} view(s)"
    )
    if len(strips) > 1:
        log.info(
            f"inference: {len(strips)} strips, for inference.max_memory is {section.max_memory} "
            f"MB; {len(work) - len(plan)} tiles between them are mapped twice"
        )
    if layout.nbytes > section.max_memory * MB:
        needed = math.ceil(layout.nbytes / MB)
        log.warning(
            f"inference: holds {needed} MB of probabilities, though inference.max_memory is "
            f"{section.max_memory}; lower inference.batch_size or inference.tile_size, or raise "
            f"inference.max_memory to {needed}"
        )
    return work


def predict_tiles(
    work: Sequence[tuple[Strip, Tile]], batch: int,
    readers: Sequence[contextlib.AbstractContextManager], segment: Segment, mosaic: Mosaic,
    waiting: int, log: VerbosityLogger,
) -> None:  # fmt: skip
    """Run the network over tiles that other threads read before and blend behind it.

    waiting: batches that may be ready before the blend takes them.
    """
    plan = [tile for _, tile in work]

    def blend(strips: Sequence[Strip], predictions: Sequence[Prediction]) -> None:
        for strip, prediction in zip(strips, predictions, strict=True):
            mosaic.take(strip, prediction)

    with behind(waiting) as hand, ahead(readers, plan, 2 * batch) as found:
        steps = log.progress(zip(work, found, strict=True), "inference", len(work), "tile", 50)
        for group in batched(steps, batch):
            STOP.check()
            places, pixels = zip(*group, strict=True)
            strips, together = zip(*places, strict=True)
            hand(blend, strips, predict_batch(together, pixels, segment))
        hand(mosaic.finish)


def resample_products(
    section: Inference, scene: Scene, products: Sequence[Product], resume: Path, network: Network,
    trained: Trained, device: torch.device, log: VerbosityLogger,
) -> Journal:  # fmt: skip
    """Predict at dataset.gsd into drafts, then write these on the scene's own grid."""
    drafts = [each._replace(path=temporary_of(each.path, ".tif")) for each in products]
    plain = section.model_copy(update={"format": "gtiff"})
    try:
        journal = write_products(plain, scene, drafts, resume, network, trained, device, log)
        own = replace(trained.reading, gsd=None)
        with open_scene(scene.path, own, scene.name) as source:
            for draft, product in zip(drafts, products, strict=True):
                write_on_grid(draft.path, product, source, section.format, tags_of(scene, trained))
    finally:
        for draft in drafts:
            for ending in ("", ".aux.xml"):
                Path(f"{draft.path}{ending}").unlink(missing_ok=True)
    return journal


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
