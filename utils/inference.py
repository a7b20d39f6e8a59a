"""Inference: scenes of any size to class maps, streamed by windows from disk to disk."""

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from config import TTA, Inference, Resources
from utils.artefacts import require_replaceable, sweep, temporary_of
from utils.blending import Strip
from utils.checkpoint import Checkpoint
from utils.devices import autocast, most_at_once, upload
from utils.formats import is_tiff
from utils.ground import PolygonError
from utils.journal import Journal, journal_folder, journal_held
from utils.logging import VerbosityLogger
from utils.maps import Legend, MapError, MapWriter, UnwrittenError
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
    room_for,
    stored_rows,
    work_left,
)
from utils.raster import (
    Pixels,
    RasterError,
    Reading,
    Scene,
    ground_gsd,
    is_whole,
    open_scene,
    read_tags,
    rows_on,
)
from utils.scenes import SceneFile, find_scenes
from utils.space import Need, bytes_below, require_space
from utils.streaming import ahead, behind
from utils.tiling import Tile, batched, tiles
from utils.turns import Turn, distinct_turns
from utils.vectors import is_vector

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


@dataclass(frozen=True, slots=True)
class Trained:
    """What inference needs to know of the weights: how to read scenes, what classes are called."""

    legend: Legend
    reading: Reading
    gsd: float | None
    tags: Mapping[str, str]
    precision: str = "fp32"


def trained_as(
    checkpoint: Checkpoint, path: Path, section: Inference, precision: str, resources: Resources
) -> Trained:
    """How a checkpoint's head was trained, and what a map says of where it comes from."""
    colors = tuple(tuple(color) for color in checkpoint.class_colors)
    told = {"tile_size", "overlap", "blend", "tta", "min_area", "simplify"}
    settings = section.model_dump(mode="json", include=told)
    settings |= {"precision": precision, "matmul_precision": resources.matmul_precision}
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


def polygons_path(section: Inference, name: str, several: bool) -> Path | None:
    """Where a scene's polygons go, if they are wanted.

    >>> polygons_path(Inference(polygons=Path("out")), "north", several=True).as_posix()
    'out/north.gpkg'
    """
    if section.polygons is None or not several:
        return section.polygons
    return section.polygons / f"{name}.gpkg"


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


def scenes_to_map(section: Inference) -> list[SceneFile]:
    """The scenes that `inference.input_tif` names, of which there must be one."""
    scenes, _ = find_scenes(section.input_tif, "inference.input_tif", except_in=written(section))
    if not scenes:
        given = section.input_tif
        named = ", ".join(map(str, [given] if isinstance(given, Path) else given))
        raise RasterError(f"{named}: holds no raster (inference.input_tif)")
    return scenes


def in_folder(section: Inference, scenes: Sequence[SceneFile]) -> bool:
    """Whether `inference.output_tif` and its like are folders, of a file for each scene.

    >>> in_folder(Inference(output_tif=Path("maps")), [SceneFile("north", Path("north.tif"))])
    True
    """
    return len(scenes) > 1 or section.output_tif.suffix == ""


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


def check_outputs(
    section: Inference, scenes: Sequence[SceneFile], several: bool,
    others: Mapping[Path, str] = MappingProxyType({}),
) -> None:  # fmt: skip
    """Refuse to write over a scene, over another output, or into a folder that is a file.

    others: more files to keep, resolved, each with what it is.
    """
    taken = {scene.path.resolve(): "the scene" for scene in scenes} | dict(others)
    for scene in scenes:
        journal = journal_folder(raster_path(section.output_tif, scene.name, several))
        if journal.exists() and not journal.is_dir():
            raise InferenceError(f"{journal}: is no folder, as the finished rows need; remove it")
        for path in outputs_of(section, scene.name, several):
            if other := taken.get(path.resolve()):
                raise InferenceError(f"{path}: would be written over {other}; name another file")
            require_replaceable(path)
            if several and path.parent.is_file():
                raise InferenceError(f"{path.parent}: is a file; several scenes need a folder")
            plain = path.is_file() and not path.is_symlink()  # a link is replaced, not followed
            if plain and not (is_vector(path) or is_tiff(path)):
                raise InferenceError(f"{path}: is a file but no map; name another one")
            taken[path.resolve()] = "another output"


def is_finished(section: Inference, file: SceneFile, trained: Trained) -> bool:
    """Whether all of a scene's files are there and whole, from the same scene, checkpoint and
    settings.

    The journal goes last: while it is there, some of them may be of an older run. Polygons, which
    say nothing of that, are made after the map.
    """
    paths = outputs_of(section, file.name, several=True)
    if not all(path.is_file() for path in paths) or journal_folder(paths[0]).exists():
        return False
    try:
        with open_scene(file.path, trained.reading, file.name) as scene:
            tags, modified = tags_of(scene, trained), scene.identity["modified"]
        return all(is_current(path, paths[0], tags, modified) for path in paths)
    except RasterError:
        return False


def is_current(path: Path, made_from: Path, tags: Mapping[str, str], modified: int) -> bool:
    """Whether an output is of these tags, whole, and not older than what it is made from."""
    changed = path.stat().st_mtime_ns
    if is_vector(path):
        return changed >= made_from.stat().st_mtime_ns
    return changed >= modified and tags.items() <= read_tags(path).items() and is_whole(path)


def tags_of(scene: Scene, trained: Trained) -> dict[str, str]:
    """What a map says of itself: how it was made, and of which scene; its file's time apart."""
    told = {name: value for name, value in scene.identity.items() if name != "modified"}
    text = json.dumps(told, sort_keys=True)
    identity = hashlib.sha256(text.encode()).hexdigest()
    return {**trained.tags, "DINOV3SEG_SCENE_SHA256": identity}


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


def check_spaces(section: Inference, scenes: Sequence[SceneFile], trained: Trained) -> None:
    """Compare what each scene's maps may take with what is free, before weights are loaded.

    Scenes that cannot be read, or may be finished, are passed over: their turn tells.
    """
    several = in_folder(section, scenes)
    for file in scenes:
        if several and all(path.is_file() for path in outputs_of(section, file.name, several)):
            continue
        products = products_of(section, file.name, several, trained.legend)
        with (
            contextlib.suppress(RasterError),
            open_scene(file.path, trained.reading, file.name) as scene,
        ):
            check_space(section, scene, products, several)


def check_space(
    section: Inference, scene: Scene, products: Sequence[Product], several: bool
) -> None:
    """Compare what mapping a scene may take on the disk with what is free, before it is begun.

    Polygons are counted like the map's own bytes; finished rows in the journal are there already.
    """
    keys = [name for name in ("output_tif", "probabilities", "confidence")
            if getattr(section, name) is not None]  # fmt: skip
    sizes = room_for(products, scene.grid, scene.own_grid, section.format)
    needs = [
        Need(product.path.parent, f"inference.{key}", size)
        for product, key, size in zip(products, keys, sizes, strict=True)
    ]
    if (polygons := polygons_path(section, scene.name, several)) is not None:
        size = scene.own_grid.height * scene.own_grid.width
        needs.append(Need(polygons.parent, "inference.polygons", size))
    there = bytes_below(journal_folder(products[0].path))
    needs[0] = needs[0]._replace(size=max(0, needs[0].size - there))
    require_space(needs, f"the maps of {scene.path.name}")


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
