"""Inputs changed by chance: each is read as it was, or refused in one line; nothing else happens.

A file of ours (tile, checkpoint, state of training, manifest) certifies itself: a mutant gives what
the file gave, or an error. Texts and files of others may say something else once they are changed,
and pixels of a TIFF have no checksum: of them it is asked that nothing but values changes.
"""

import json
import random
import resource
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import project
import pytest
import rasterio.shutil
import torch
from forked import Child, forked
from pyogrio.raw import read as read_ogr
from pyogrio.raw import write as write_ogr
from size import figure, sized

from config import Model, load_config
from models.backbone import describe_backbone
from utils import resume
from utils.cache import check_tile, load_tile, tile_names
from utils.checkpoint import load_checkpoint
from utils.footprints import footprints
from utils.label_values import LabelRules
from utils.labels import check_values, find_labels, labels_identity, open_labels
from utils.manifest import read_manifest
from utils.polygons import write_polygons
from utils.process import ending_of, out_of_memory
from utils.raster import Reading, open_scene
from utils.scenes import band_ranges, default_bands, find_scenes
from utils.splits import split_by_lists
from utils.tiling import tiles

ROOM = 1536 * 2**20  # bytes of address space to read mutants in
LONGEST = 20  # seconds that reading a mutant may take
KNOWN = (2, 3, 4)
TOKENS = [
    b"0", b"-1", b"1e999", b"NaN", b"null", b"true", b"[]", b"{}", b'""', b"4294967296", b"..",
    b"/", b"\0", b"\n", b"\xff\xfe", b"99999999999999999999999", b"[[", b"}}", b"'", b"&a *a",
    b"\t", b"<", b"\xe2\x80\xae", b"\x1b[2J", b"!!python/name:os.system", b"0x10", b"1e-400",
    b"north",
]  # fmt: skip


class Kind(NamedTuple):
    """A kind of file: the file that is changed, what reads it, whether it certifies itself."""

    name: str
    path: Path
    read: Callable[[], Any]
    sealed: bool = False
    text: bool = False


# What is done to the bytes of a file


def flip(content: bytearray, dice: random.Random) -> None:
    for _ in range(dice.choice([1, 1, 1, 2, 8])):
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def run_of_bytes(content: bytearray, dice: random.Random) -> None:
    start, length = part_of(content, dice)
    content[start : start + length] = dice.randbytes(length)


def cut(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content)) :]


def insert(content: bytearray, dice: random.Random) -> None:
    start, length = part_of(content, dice)
    content[start:start] = dice.randbytes(length)


def double(content: bytearray, dice: random.Random) -> None:
    start, length = part_of(content, dice)
    content[start:start] = content[start : start + length]


def drop(content: bytearray, dice: random.Random) -> None:
    start, length = part_of(content, dice)
    del content[start : start + length]


def blank(content: bytearray, dice: random.Random) -> None:
    start, length = part_of(content, dice)
    value = dice.choice([0, 0, 255])
    content[start : start + length] = bytes([value]) * len(content[start : start + length])


def extreme(content: bytearray, dice: random.Random) -> None:
    """A number of 1, 2, 4 or 8 bytes becomes an odd one: where headers have lengths and offsets."""
    size = dice.choice([1, 2, 4, 8])
    start = dice.randrange(min(len(content), dice.choice([64, 512, len(content)])))
    value = dice.choice([0, 1, 2 ** (8 * size) - 1, 2 ** (8 * size - 1), 2 ** (4 * size)])
    content[start : start + size] = value.to_bytes(size, dice.choice(["little", "big"]))


def swap_token(content: bytearray, dice: random.Random) -> None:
    """A word or number of a text becomes another one."""
    words = [m for m in split_words(bytes(content)) if m[1] > m[0]]
    start, stop = dice.choice(words) if words else (0, 0)
    others = [bytes(content[a:b]) for a, b in dice.sample(words, min(4, len(words)))]
    content[start:stop] = dice.choice(TOKENS + others)


def split_words(text: bytes) -> list[tuple[int, int]]:
    """Where the words and numbers of a text start and stop."""
    places, start = [], None
    for place, byte in enumerate(text + b" "):
        inside = chr(byte).isalnum() or byte in b"_.-#"
        if inside and start is None:
            start = place
        elif not inside and start is not None:
            places.append((start, place))
            start = None
    return places


def part_of(content: bytearray, dice: random.Random) -> tuple[int, int]:
    return dice.randrange(len(content)), dice.choice([1, 2, 4, 16, 64, 512, 4096])


BINARY = [flip, flip, run_of_bytes, cut, insert, double, drop, blank, extreme, extreme]
TEXT = [flip, cut, insert, double, drop, blank, swap_token, swap_token, swap_token, swap_token]


def mutant(content: bytes, seed: str, text: bool) -> bytes:
    dice = random.Random(seed)
    changed = bytearray(content)
    for _ in range(dice.choice([1, 1, 1, 2, 3])):
        if changed:
            dice.choice(TEXT if text else BINARY)(changed, dice)
    return bytes(changed)


# What reads them


def read_pixels(path: Path) -> int:
    """A scene as prepare, training and inference read it: headers, a sample, every tile."""
    find_scenes(path)
    bands = default_bands(path)
    reading = Reading(bands, band_ranges([path], bands, "auto", None))
    with open_scene(path, reading) as scene:
        scene.identity  # noqa: B018
        grid = scene.grid
        few = tiles(min(grid.height, 512), min(grid.width, 512), project.TILE, 0.0)
        return sum(int(scene.read(tile).image.sum()) for tile in few)


def read_at_gsd(path: Path) -> int:
    """A scene read at other pixels than its own, as `dataset.gsd` has it."""
    with open_scene(path, Reading(gsd=0.7)) as scene:
        return int(scene.read(next(iter(tiles(64, 64, project.TILE, 0.0)))).image.sum())


def read_labels(path: Path, scene_path: Path, attribute: str | None = None) -> int:
    """Label files on a scene's grid, as prepare reads them."""
    ids = {str(number): number for number in range(project.CLASSES)}
    rules = LabelRules(project.CLASSES, ids, attribute=attribute)
    found = find_labels(path)
    labels_identity(found)
    with open_scene(scene_path) as scene, open_labels(found, scene, rules) as labels:
        whole = list(tiles(scene.grid.height, scene.grid.width, project.TILE, 0.0))
        check_values(labels, scene, whole)
        return sum(int(labels.read(tile).sum()) for tile in whole)


def read_tile(path: Path, folder: Path) -> Any:
    """A tile as verify reads it; what it finds sound is loaded as training does."""
    manifest = read_manifest(folder)
    check_tile(path, manifest)
    return load_tile(path, mmap=True)


def read_lists(train: Path, val: Path, folder: Path) -> Any:
    manifest = read_manifest(folder)
    places = footprints(tile_names(folder, manifest), manifest)
    return split_by_lists(places, train, val).sides()


def read_state(path: Path) -> Any:
    return resume.load(path)


def same(first: Any, second: Any) -> bool:
    """Whether two contents are alike to the last bit."""
    if isinstance(first, torch.Tensor):
        alike = isinstance(second, torch.Tensor) and first.dtype == second.dtype
        return alike and first.shape == second.shape and bool((first == second).all())
    if isinstance(first, dict):
        return isinstance(second, dict) and first.keys() == second.keys() and all(
            same(first[key], second[key]) for key in first
        )
    if isinstance(first, list | tuple):
        return type(first) is type(second) and len(first) == len(second) and all(
            map(same, first, second)
        )
    return type(first) is type(second) and repr(first) == repr(second)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small project that ran once, with its labels in every format.

    It is made in a child: threads that GDAL leaves behind would be missed by the children to come.
    """
    folder = tmp_path_factory.mktemp("trained")
    assert forked(partial(make_project, folder)) == 0
    return folder


def make_project(folder: Path) -> int:
    changes = {"train": {"epochs": 1}, "inference": {"format": "gtiff"}}
    config = project.write_project(folder, 100, 130, ("north", "south"), **changes)
    assert project.run(config, "logging.level=error") == 0
    classes = [f"class {number}" for number in range(project.CLASSES)]
    for ending in ("geojson", "gpkg"):
        write_polygons(folder / "map.tif", folder / f"map.{ending}", classes)
    layer = read_ogr(folder / "map.gpkg", columns=["class_id"])
    for ending, driver in (("fgb", "FlatGeobuf"), ("shp", "ESRI Shapefile")):
        write_ogr(
            folder / f"map.{ending}", layer[2], layer[3], layer[0]["fields"], driver=driver,
            crs=layer[0]["crs"], geometry_type="Unknown" if ending == "fgb" else "Polygon",
        )  # fmt: skip
    rasterio.shutil.copy(folder / "unseen.tif", folder / "unseen.png", driver="PNG")
    rasterio.shutil.copy(folder / "unseen.tif", folder / "unseen.jp2", driver="JP2OpenJPEG")
    rasterio.shutil.copy(folder / "unseen.tif", folder / "unseen.vrt", driver="VRT")
    names = sorted(path.stem for path in (folder / "cache").glob("*.pt"))
    (folder / "train.txt").write_text("north # whole\n" + "\n".join(names[:1]) + "\n")
    (folder / "val.txt").write_text("\n".join(n for n in names if n.startswith("south")) + "\n")
    return 0


def kinds_in(folder: Path) -> list[Kind]:
    """The kinds of files, the ones of our own twice as often."""
    cache, weights, scene = folder / "cache", folder / "weights", folder / "unseen.tif"
    tile, best = sorted(cache.glob("*.pt"))[0], weights / "linear_best.pth"
    last, config = weights / "linear_last.pth", folder / "config.yml"
    train, val = folder / "train.txt", folder / "val.txt"
    ours = [
        Kind("tile", tile, partial(read_tile, tile, cache), sealed=True),
        Kind("checkpoint", best, lambda: asdict_of(load_checkpoint(best)), sealed=True),
        Kind("state", last, partial(read_state, last), sealed=True),
        Kind("manifest", cache / "manifest.json", lambda: asdict_of(read_manifest(cache)),
             sealed=True, text=True),
    ]  # fmt: skip
    texts = [
        Kind("config", config, lambda: repr(load_config(config, [])), text=True),
        Kind("list", train, partial(read_lists, train, val, cache), text=True),
        Kind("vrt", folder / "unseen.vrt", partial(read_pixels, folder / "unseen.vrt"), text=True),
        Kind("geojson", folder / "map.geojson",
             partial(read_labels, folder / "map.geojson", scene, "class_id"), text=True),
        Kind("config.json", folder / "backbone" / "config.json",
             lambda: repr(describe_backbone(Model(backbone=str(folder / "backbone")))), text=True),
    ]  # fmt: skip
    others = [
        Kind("scene", scene, partial(read_pixels, scene)),
        Kind("scene at a gsd", scene, partial(read_at_gsd, scene)),
        Kind("labels", folder / "labels.tif",
             partial(read_labels, folder / "labels.tif", folder / "scenes" / "north.tif")),
        Kind("png", folder / "unseen.png", partial(read_pixels, folder / "unseen.png")),
        Kind("jp2", folder / "unseen.jp2", partial(read_pixels, folder / "unseen.jp2")),
        *(Kind(ending, folder / f"map.{ending}",
               partial(read_labels, folder / f"map.{ending}", scene, "class_id"))
          for ending in ("gpkg", "fgb", "shp")),
    ]  # fmt: skip
    return [*ours, *texts, *ours, *others]


def asdict_of(found: Any) -> dict[str, Any]:
    return {each.name: getattr(found, each.name) for each in fields(found)}


def verdict_of(kind: Kind, whole: Any) -> tuple[str, str]:
    """What comes of reading a mutant: same, other, refused, or wrong, and what was said."""
    try:
        found = kind.read()
    except Exception as error:  # noqa: BLE001  what it is, is what is asked
        code, said = ending_of(error)
        lines = getattr(error, "faults", [str(error)])
        if code not in KNOWN or any("\n" in line for line in lines) or not said:
            return "wrong", f"{code}: {type(error).__name__}: {said}"
        if out_of_memory(error):
            return "wrong", f"takes memory: {said}"
        return "refused", f"{code}: {said}"
    if same(found, whole):
        return "same", ""
    return ("wrong", "another value") if kind.sealed else ("other", "")


def work(kinds: list[Kind], first: int, count: int, seed: int, journal: Path) -> int:
    """Read the mutants from `first` on, noting each before and after."""
    space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (space + ROOM, space + ROOM))
    wholes: dict[str, Any] = {}
    with journal.open("a", encoding="utf-8") as file:
        for number in range(first, count):
            kind = kinds[number % len(kinds)]
            content = kind.path.read_bytes()
            if kind.name not in wholes:
                wholes[kind.name] = kind.read()
            changed = mutant(content, f"{seed} {kind.name} {number}", kind.text)
            file.write(json.dumps([number, "begun", ""]) + "\n")
            file.flush()
            kind.path.write_bytes(changed)
            signal.alarm(LONGEST)
            verdict = verdict_of(kind, wholes[kind.name])
            signal.alarm(0)
            kind.path.write_bytes(content)
            file.write(json.dumps([number, *verdict]) + "\n")
    return 0


def told_by(journal: Path) -> dict[int, tuple[str, str]]:
    """The last that was noted of each mutant."""
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    return {number: (verdict, said) for number, verdict, said in map(json.loads, lines)}


def test_whatever_is_changed_in_a_file_it_is_read_as_it_was_or_refused(trained, tmp_path):
    count, journal, seed = sized(500, 10_000), tmp_path / "journal", 20
    kinds, known = kinds_in(trained), set(trained.rglob("*"))
    wholes = {kind.path: kind.path.read_bytes() for kind in kinds}
    reached = 0
    while reached < count:
        child = Child(partial(work, kinds, reached, count, seed, journal))
        code = child.wait(3600)
        told = told_by(journal)
        for path, content in wholes.items():
            path.write_bytes(content)
        if code:
            last = max(told, default=-1)
            assert last >= reached, child.said  # else it is the test that fails
            how = "hangs" if code == -signal.SIGALRM else f"crashes with {code}"
            with journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps([last, "wrong", f"{how}: {child.said[-500:]}"]) + "\n")
        reached = max(told, default=-1) + 1
    told = told_by(journal)
    wrong = {
        (number, kinds[number % len(kinds)].name): said
        for number, (verdict, said) in told.items()
        if verdict not in ("same", "other", "refused")
    }
    assert not wrong, "\n".join(f"{key}: {said[:600]}" for key, said in wrong.items())
    assert len(told) == count
    assert set(trained.rglob("*")) == known, "something was written beside the inputs"
    verdicts = Counter(verdict for verdict, _ in told.values())
    assert verdicts["refused"] > count / 3 and verdicts["same"]
    figure(
        "mutated inputs",
        f"{count}: 0 tracebacks, hangs, executions, silently different values "
        f"({verdicts['refused']} refused, {verdicts['same']} as they were, {verdicts['other']} "
        "other texts, or pixels without a checksum)",
    )


def test_the_mutants_of_a_seed_are_the_same_and_differ_from_the_file():
    content = bytes(range(256)) * 20
    made = [mutant(content, f"{seed}", text) for seed in range(200) for text in (False, True)]
    assert made == [mutant(content, f"{s}", text) for s in range(200) for text in (False, True)]
    assert sum(each != content for each in made) > 380 and len(set(made)) > 380


def test_two_contents_are_the_same_only_to_the_last_bit():
    zeros = {"state": [torch.zeros(3), 1, "a"]}
    assert same(zeros, {"state": [torch.zeros(3), 1, "a"]})
    for other in (torch.zeros(4), torch.tensor([0.0, 0, 1e-30]), torch.zeros(3).double()):
        assert not same(zeros, {"state": [other, 1, "a"]})
    assert not same(zeros, {"state": (torch.zeros(3), 1, "a")}) and not same(1, 1.0)
