"""Files made to run code, to fill the memory or to have other files overwritten: none gets its way.

Each attack is a run of the program in a child of its own, which may take so much memory and time.
"""

import io
import json
import os
import pickle
import resource
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import project
import pytest
import torch
from forked import Child, forked
from size import figure

MEBIBYTE = 2**20
MOST = 160 * MEBIBYTE  # what an attacked run may grow by, of which its own needs take most
ROOM = 4096 * MEBIBYTE  # of address space: what asks for more gets an error and not the machine
BOMB = 256 * MEBIBYTE

Attack = Callable[[Path, Path], list[str]]  # (folder, marker) to the run's settings


class Payload:
    """Code in a pickle: it would make the marker."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small project that ran once, in a child: cache, checkpoint, state and map are there.

    Maps are no COGs: GDAL makes those with threads, which a child misses if its parent had some.
    """
    folder = tmp_path_factory.mktemp("trained")
    changes = {"train": {"epochs": 1}, "inference": {"format": "gtiff"}}
    config = project.write_project(folder, height=100, width=130, **changes)
    assert forked(lambda: project.run(config, "logging.level=error")) == 0
    return folder


def tile_of(folder: Path) -> Path:
    return sorted((folder / "cache").glob("*.pt"))[0]


def legacy_pickle(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps(Payload(marker)))


def pickle_in_zip(path: Path, marker: Path) -> None:
    """An archive as torch.save writes one, with code in its directory of objects."""
    torch.save({"image": Payload(marker)}, path)


def deflated(path: Path, marker: Path) -> None:
    """A quarter of a GiB of zeros in 1 MB, as a sound archive of torch's with one tensor in it."""
    whole = io.BytesIO()
    torch.save({"image": torch.zeros(BOMB, dtype=torch.uint8)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", 8, compresslevel=1) as bomb:
        for member in source.infolist():
            bomb.writestr(member.filename, source.read(member))
    assert path.stat().st_size < BOMB / 100


def overlapping(path: Path, marker: Path) -> None:
    """An archive whose directory names one stored member over and over."""
    one = io.BytesIO()
    with zipfile.ZipFile(one, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(MEBIBYTE))
    stored = one.getvalue()
    start = stored.index(b"PK\x01\x02")
    entry = stored[start : stored.index(b"PK\x05\x06")]
    many = 20_000
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, many, many, many * len(entry), start, 0)
    path.write_bytes(stored[:start] + entry * many + end)


def strided(path: Path, marker: Path) -> None:
    """One stored number that stands for a tensor of 4 TB."""
    torch.save({"image": torch.zeros(1).expand(2**20, 2**20)}, path)


def weights_of_one_number(path: Path, marker: Path) -> None:
    """A checkpoint in all its fields, whose weights are one number seen 10^12 times."""
    content = torch.load(path, weights_only=True)
    content["state"] = {key: torch.zeros(1).expand(2**20, 2**20) for key in content["state"]}
    torch.save(content, path)


def claims(path: Path, marker: Path) -> None:
    """A checkpoint in all its fields, for a head as wide as no memory could hold."""
    torch.save(torch.load(path, weights_only=True) | {"channels": 2**40}, path)


MADE = [legacy_pickle, pickle_in_zip, deflated, overlapping, strided]


def in_a_tile(make: Callable) -> Attack:
    def attack(folder: Path, marker: Path) -> list[str]:
        for path in (folder / "cache").glob("*.pt"):
            make(path, marker)
        return [*project.only("train"), "train.resume=never"]

    return attack


def in_all_tiles(make: Callable) -> Attack:
    def attack(folder: Path, marker: Path) -> list[str]:
        first, *others = sorted((folder / "cache").glob("*.pt"))
        make(first, marker)
        for path in others:
            shutil.copy(first, path)
        return project.only("verify")

    return attack


def in_the_weights(make: Callable) -> Attack:
    def attack(folder: Path, marker: Path) -> list[str]:
        make(folder / "weights" / "linear_best.pth", marker)
        return project.only("inference")

    return attack


def as_the_scene(write: Callable[[Path], object]) -> Attack:
    def attack(folder: Path, marker: Path) -> list[str]:
        path = folder / "odd" / "scene.tif"
        path.parent.mkdir()
        write(path)
        return [*project.only("inference"), f"inference.input_tif={path}"]

    return attack


def as_a_source(write: Callable[[Path], object]) -> Attack:
    def attack(folder: Path, marker: Path) -> list[str]:
        path = folder / "odd" / "scene.tif"
        path.parent.mkdir()
        write(path)
        return [*project.only("prepare"), f"paths.raw_images_dir={path.parent}",
                f"paths.processed_dir={folder / 'anew'}"]  # fmt: skip

    return attack


def web_vrt(path: Path) -> None:
    source = "<SimpleSource><SourceFilename>/vsicurl/http://localhost:9/a.tif</SourceFilename>"
    path.write_text(
        "<VRTDataset rasterXSize='64' rasterYSize='64'><VRTRasterBand dataType='Byte' band='1'>"
        f"{source}</SimpleSource></VRTRasterBand></VRTDataset>"
    )


def header(width: int, height: int, bands: int, rows: int) -> Callable[[Path], object]:
    """A TIFF of one strip of eight bytes that claims to be of this size."""
    tags = [(256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (273, 4, 8),
            (277, 3, bands), (278, 4, rows), (279, 4, 8), (284, 3, 1)]  # fmt: skip
    directory = b"".join(struct.pack("<HHLL", code, kind, 1, value) for code, kind, value in tags)
    start = struct.pack("<4sL", b"II*\0", 16) + bytes(8) + struct.pack("<H", len(tags))
    return lambda path: path.write_bytes(start + directory + bytes(4))


def with_lists(text: bytes) -> Attack:
    def attack(folder: Path, marker: Path) -> list[str]:
        (folder / "train.txt").write_bytes(text)
        (folder / "val.txt").write_text("north\n")
        return [*project.only("train"), f"dataset.splits.train_list={folder / 'train.txt'}",
                f"dataset.splits.val_list={folder / 'val.txt'}"]  # fmt: skip

    return attack


def with_config(text: str) -> Attack:
    def attack(folder: Path, marker: Path) -> list[str]:
        (folder / "config.yml").write_text(text)
        return []

    return attack


def code_in_config(folder: Path, marker: Path) -> list[str]:
    path = folder / "config.yml"
    text = path.read_text().replace("resources:\n", "resources:\n  seed: CODE\n")
    path.write_text(text.replace("CODE", f"!!python/object/apply:os.mkdir [{marker}]"))
    return []


def with_backbone(change: Callable[[Path, Path], None]) -> Attack:
    def attack(folder: Path, marker: Path) -> list[str]:
        change(folder / "backbone", marker)
        return project.only("inference")

    return attack


def own_code(folder: Path, marker: Path) -> None:
    (folder / "modeling.py").write_text(f"import os\nos.mkdir({str(marker)!r})\n")
    classes = {"AutoConfig": "modeling.Config", "AutoModel": "modeling.Model"}
    told = json.loads((folder / "config.json").read_text())
    told |= {"model_type": "of_our_own", "auto_map": classes}
    (folder / "config.json").write_text(json.dumps(told))


def pickled_weights(folder: Path, marker: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(marker)))


def huge_config(folder: Path, marker: Path) -> None:
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text.replace('"hidden_size": 32', '"hidden_size": 3200000'))


ALIASES = "a0: &a0 [x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)
)
ATTACKS: dict[str, tuple[Attack, int]] = {
    **{f"tile, {make.__name__}": (in_a_tile(make), 3) for make in MADE},
    **{f"verified tiles, {make.__name__}": (in_all_tiles(make), 3) for make in MADE},
    **{f"checkpoint, {make.__name__}": (in_the_weights(make), 3)
       for make in (*MADE, weights_of_one_number, claims)},
    "VRT named .tif": (as_the_scene(web_vrt), 3),
    "VRT named .tif among scenes": (as_a_source(web_vrt), 3),
    "header of 2^31 pixels a side": (as_the_scene(header(2**31 - 1, 2**31 - 1, 3, 1)), 3),
    "header of 65535 bands": (as_the_scene(header(64, 64, 65535, 64)), 3),
    "header of a strip of 10 GB": (as_the_scene(header(60_000, 60_000, 3, 59_999)), 3),
    "header among scenes": (as_a_source(header(2**31 - 1, 2**31 - 1, 3, 1)), 3),
    "list with ../": (with_lists(b"../../../etc/passwd\n"), 3),
    "list with an absolute path": (with_lists(b"/etc/passwd\n"), 3),
    "list with a terminal's commands": (with_lists(b"north\n\x1b]0;owned\x07\x1b[2J\n"), 3),
    "list of one endless line": (with_lists(b"north" * 2**21), 3),
    "list of bytes": (with_lists(bytes(range(256))), 3),
    "YAML of aliases": (with_config(ALIASES), 2),
    "YAML nested": (with_config("a: " + "[" * 500_000), 2),
    "YAML endless": (with_config("a: " + "b" * 2 * MEBIBYTE), 2),
    "YAML with code": (code_in_config, 2),
    "backbone with code": (with_backbone(own_code), 3),
    "backbone of pickles": (with_backbone(pickled_weights), 3),
    "backbone of a size that no memory holds": (with_backbone(huge_config), 3),
}  # fmt: skip


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def attacked(folder: Path, settings: list[str]) -> tuple[int, list[str], int]:
    """Exit code, lines and growth in bytes of a run in a child of its own."""
    grown = folder / "grown"

    def run() -> int:
        space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (space + ROOM, space + ROOM))
        before = resident()
        code = project.run(folder / "config.yml", "logging.level=error", *settings)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        grown.write_text(str(peak - before))
        return code

    child = Child(run)
    code = child.wait()
    return code, child.said.splitlines(), int(grown.read_text()) if grown.exists() else -1


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """The project as it was left, for an attack of its own."""
    return Path(shutil.copytree(trained, tmp_path / "project"))


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_ends_in_one_line_and_does_nothing(folder, name):
    attack, expected = ATTACKS[name]
    marker = folder.parent / "marker"
    settings = attack(folder, marker)
    maps = (folder / "map.tif").read_bytes()

    code, lines, grown = attacked(folder, settings)

    assert code == expected, (code, lines)
    errors = [line for line in lines if line.startswith("error: ") or code == 2]
    assert len(errors) == 1 and set(lines) == set(errors), lines
    assert errors[0].isprintable() and len(errors[0]) < 2000
    assert not marker.exists()
    assert 0 <= grown < MOST, f"{grown / MEBIBYTE:.0f} MiB"
    assert (folder / "map.tif").read_bytes() == maps
    assert not list(folder.rglob("*.tmp*"))


def test_the_means_of_the_attacks_work(tmp_path):
    """What the attacks would do, they would do: code runs where it is let, bombs swell."""
    marker = tmp_path / "marker"
    for make in (legacy_pickle, pickle_in_zip):
        make(tmp_path / "made", marker)
        load = (lambda p: pickle.loads(p.read_bytes())) if make is legacy_pickle else (
            lambda p: torch.load(p, weights_only=False))  # fmt: skip
        load(tmp_path / "made")
        marker.rmdir()
    packed = zlib.compress(bytes(BOMB), 1)
    assert len(packed) < BOMB / 100
    assert torch.zeros(1).expand(2**20, 2**20).numel() == 2**40


def linked(folder: Path) -> Iterator[tuple[str, Path, list[str]]]:
    """A place in the project that becomes a link to a precious file, and a run that writes it."""
    tile = tile_of(folder).relative_to(folder)
    anew = ["train.resume=never"]
    yield "map", Path("map.tif"), project.only("inference")
    yield "legend of the map", Path("map.tif.aux.xml"), project.only("inference")
    yield "tile", tile, [*project.only("prepare"), "verify.enable=true"]
    yield "best weights", Path("weights/linear_best.pth"), [*project.only("train"), *anew]
    yield "state of training", Path("weights/linear_last.pth"), [*project.only("train"), *anew]
    yield "metrics", Path("weights/metrics.csv"), [*project.only("train"), *anew]
    yield "status", Path("weights/status.json"), project.only("inference")
    yield "manifest", Path("cache/manifest.json"), project.only("prepare")
    yield "copy of the manifest", Path("cache/manifest.copy.json"), project.only("prepare")


LINKS = ("map", "legend of the map", "tile", "best weights", "state of training", "metrics",
         "status", "manifest", "copy of the manifest")  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_place_of_an_output_is_replaced_and_never_followed(folder, name):
    places = {name: (place, settings) for name, place, settings in linked(folder)}
    assert set(places) == set(LINKS)
    place, settings = places[name]
    precious = folder.parent / "precious"
    precious.write_bytes(b"of great worth")
    (folder / place).unlink(missing_ok=True)
    (folder / place).symlink_to(precious)

    codes = [attacked(folder, settings)[0] for _ in range(2 if name == "tile" else 1)]

    assert precious.read_bytes() == b"of great worth"
    assert codes[-1] == 0
    assert not (folder / place).is_symlink()


def test_the_table_tells_of_the_attacks():
    figure("attack folder", f"0 successes of {len(ATTACKS) + len(LINKS)}")
