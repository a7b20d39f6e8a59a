"""What mapping scenes writes: where, over nothing that is to stay, and what of it is there already.

A map says in its tags which weights, settings and scene it was made from: by them a finished one is
told from one to make again.
"""

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from config import Inference, Resources
from utils.artefacts import require_replaceable
from utils.checkpoint import Checkpoint
from utils.formats import is_tiff
from utils.journal import journal_folder
from utils.maps import Legend
from utils.opening import RasterError, is_whole, read_tags
from utils.products import InferenceError, Product, products_of, raster_path, room_for
from utils.raster import Reading, Scene, open_scene
from utils.scenes import SceneFile, find_scenes
from utils.space import Need, bytes_below, require_space
from utils.vectors import is_vector


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


def polygons_path(section: Inference, name: str, several: bool) -> Path | None:
    """Where a scene's polygons go, if they are wanted.

    >>> polygons_path(Inference(polygons=Path("out")), "north", several=True).as_posix()
    'out/north.gpkg'
    """
    if section.polygons is None or not several:
        return section.polygons
    return section.polygons / f"{name}.gpkg"


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
