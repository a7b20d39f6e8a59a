"""What would end a later phase, found before an earlier one computes for hours.

From cheap to dear: paths, then locks, then what lies in files, of which only headers are read. What
a phase of the run is to make itself is not asked for.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from config import Config
from utils.agreement import require_cache
from utils.checkpoint import require_there
from utils.distributed import Runtime
from utils.keeping import best_path
from utils.locks import alone_in
from utils.manifest import COPY, read_manifest, require_manifest
from utils.opening import RasterError
from utils.outputs import check_outputs, in_folder, scenes_to_map
from utils.scenes import files_of
from utils.space import nearest
from utils.splits import require_list


class PlaceError(Exception):
    """A place that cannot be written to."""

    exit_code = 4


def check_paths(config: Config) -> None:
    """Raise the error of a path that a phase of this run is to read or write in vain."""
    if config.prepare.enable:
        require_files(config.prepare.raw_images_dir, "paths.raw_images_dir")
        require_files(config.prepare.label_path, "paths.label_path")
    if uses_older_cache(config) and not (config.train.processed_dir / COPY).is_file():
        require_manifest(config.train.processed_dir)
    for path in lists_of(config) if config.train.enable else ():
        require_list(path)
    for key, folder in outputs_of(config):
        require_writable(folder, key)
    if config.inference.enable:
        require_weights(config)
        require_files(config.inference.input_tif, "inference.input_tif")


def check_content(config: Config) -> None:
    """Raise the error that what is there already will end a phase with: cache, then headers."""
    if uses_older_cache(config):
        require_cache(config, read_manifest(config.train.processed_dir))
    if config.inference.enable:
        scenes = scenes_to_map(config.inference)
        several = in_folder(config.inference, scenes)
        check_outputs(config.inference, scenes, several, inputs_of(config))


def require_files(sources: Path | tuple[Path, ...], key: str) -> None:
    """Raise RasterError where one of the sources that a setting names is not there."""
    for source in each_of(sources):
        next(files_of(source, key), None)


def require_weights(config: Config) -> None:
    """Raise CheckpointError where weights to map with are missing that no training is to write."""
    best = best_path(config.train.weights_dir, config.model.head)
    path = config.inference.checkpoint or best
    if not (config.train.enable and path == best):
        require_there(path)


def each_of(sources: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    """One path or several, as several.

    >>> each_of(Path("scenes")) == each_of((Path("scenes"),)) == (Path("scenes"),)
    True
    """
    return (sources,) if isinstance(sources, Path) else sources


def uses_older_cache(config: Config) -> bool:
    """Whether training is to use tiles that this run does not make."""
    making = config.prepare.processed_dir if config.prepare.enable else None
    return config.train.enable and config.train.processed_dir != making


def caches_of(config: Config) -> set[Path]:
    """The folders of tiles that the enabled phases use."""
    sections = (config.prepare, config.verify, config.train)
    return {section.processed_dir for section in sections if section.enable}


def lists_of(config: Config) -> list[Path]:
    """The files that the split is made by."""
    splits = config.dataset.splits
    return [path for path in (splits.regions, splits.train_list, splits.val_list) if path]


def inputs_of(config: Config) -> dict[Path, str]:
    """The files of a project that no map may replace, each with what it is."""
    found: dict[Path, str] = {}
    sources = ((config.prepare.raw_images_dir, "a training scene"),
               (config.prepare.label_path, "a label file"))  # fmt: skip
    for given, what in sources:
        for source in each_of(given or ()):
            with contextlib.suppress(RasterError):  # where prepare is off they may be gone
                found |= {path.resolve(): what for _, path in files_of(source, "")}
    return found | {path.resolve(): "a file that the split is made by" for path in lists_of(config)}


def outputs_of(config: Config) -> Iterator[tuple[str, Path]]:
    """The folders that the enabled phases write in, each with the key that names it."""
    if config.prepare.enable:
        yield "paths.processed_dir", config.prepare.processed_dir
    if config.train.enable:
        yield "train.weights_dir", config.train.weights_dir
    if config.inference.enable:
        for name in ("output_tif", "probabilities", "confidence", "polygons"):
            if (path := getattr(config.inference, name)) is not None:
                yield f"inference.{name}", path.parent if path.suffix else path


def require_writable(folder: Path, key: str) -> None:
    """Raise PlaceError where a folder can neither be written in nor be made.

    >>> from tempfile import NamedTemporaryFile
    >>> with NamedTemporaryFile() as file:
    ...     require_writable(Path(file.name, "cache"), "paths.processed_dir")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    utils.preflight.PlaceError: ...: is no folder, so nothing ...; correct paths.processed_dir
    """
    place = nearest(folder)
    if not place.is_dir():
        raise PlaceError(f"{place}: is no folder, so nothing can be written below; correct {key}")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PlaceError(f"{place}: no permission to write there; grant it, or correct {key}")


@contextlib.contextmanager
def cache_held(config: Config, run: Runtime) -> Iterator[None]:
    """Hold the cache against other runs, where prepare or verify is to work in it."""
    held: set[Path] = set()
    with contextlib.ExitStack() as stack:
        for name in ("prepare", "verify") if run.is_main else ():
            section = getattr(config, name)
            if section.enable and section.processed_dir not in held:
                held.add(section.processed_dir)
                key, make = f"{name}.processed_dir", name == "prepare"
                stack.enter_context(alone_in(section.processed_dir, key, make))
        yield


@contextlib.contextmanager
def weights_held(config: Config, run: Runtime) -> Iterator[None]:
    """Hold the folder of weights against other runs, where training is to write there."""
    wanted = config.train.enable and run.is_main
    folder = config.train.weights_dir
    with alone_in(folder, "train.weights_dir") if wanted else contextlib.nullcontext():
        yield
