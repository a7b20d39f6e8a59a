"""Wrong inputs of every kind: one line that names file or key, the right exit code, no debris."""

import json
from pathlib import Path

import numpy as np
import project
import pytest
import rasterio
import yaml
from rasterio.transform import Affine

import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A small project that ran once: cache, checkpoint and map are there."""
    folder = tmp_path_factory.mktemp("trained")
    config = project.write_project(folder, height=100, width=130)
    assert project.run(config) == 0
    return folder


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    """Links to the project's inputs in a folder of this test's own."""
    for path in trained.iterdir():
        if path.name not in ("cache", "weights", "map.tif", "map.tif.aux.xml", "run.log"):
            (tmp_path / path.name).symlink_to(path, target_is_directory=path.is_dir())
    return tmp_path


def settings_of(folder: Path) -> dict:
    return yaml.safe_load((folder / "config.yml").read_text())


def scene(folder: Path, name: str = "odd.tif", **changes) -> str:
    """A scene of 100 × 130 with something odd about it, alone in a folder."""
    image, _ = project.land(100, 130, seed=5)
    where = project.grid(100, 130)
    bands = changes.pop("bands", image)
    profile = {"driver": "GTiff", "height": 100, "width": 130, "count": len(bands)}
    profile |= {"crs": where.crs, "transform": where.transform, "dtype": bands.dtype} | changes
    path = folder / "in" / name
    path.parent.mkdir(exist_ok=True)
    with rasterio.open(path, "w", **profile) as dataset:
        dataset.write(bands)
    return str(path)


def label(folder: Path, values=None, **changes) -> str:
    values = np.zeros((100, 130), np.uint8) if values is None else values
    return scene(folder, "label.tif", bands=values[None], **changes)


def cut_short(path: str, share: float = 0.5) -> str:
    content = Path(path).read_bytes()
    Path(path).write_bytes(content[: int(len(content) * share)])
    return path


def text(folder: Path, name: str, content: str) -> str:
    path = folder / "in" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return str(path)


def polygons(folder: Path, rings, name: str = "p.geojson", **properties) -> str:
    features = [
        {
            "type": "Feature",
            "properties": properties,
            "geometry": {"type": "Polygon", "coordinates": [ring]},
        }
        for ring in rings
    ]
    return text(folder, name, json.dumps({"type": "FeatureCollection", "features": features}))


SQUARE = [[13.8, 48.0], [13.9, 48.0], [13.9, 48.1], [13.8, 48.1], [13.8, 48.0]]
FAR = [[1.0, 1.0], [1.1, 1.0], [1.1, 1.1], [1.0, 1.1], [1.0, 1.0]]
LOW = np.full((100, 130), 7, np.uint8)
PLAIN = {"transform": Affine.identity(), "crs": None}

# what is changed in config.yml (dotted key: value or a function of the folder), what the line says
PREPARE = [
    ({"paths.raw_images_dir": "nowhere"}, "nowhere"),
    ({"paths.raw_images_dir": "*.nothing"}, "no such file or folder"),
    ({"paths.raw_images_dir": lambda f: text(f, "a.txt", "no raster")}, "not a raster"),
    ({"paths.raw_images_dir": lambda f: str(Path(text(f, "a.txt", "-")).parent)}, "no raster"),
    ({"paths.raw_images_dir": lambda f: cut_short(scene(f))}, "truncated"),
    ({"paths.raw_images_dir": lambda f: cut_short(scene(f), 0.001)}, "odd.tif"),
    ({"paths.raw_images_dir": lambda f: text(f, "odd.tif", "II*\0")}, "odd.tif"),
    ({"paths.raw_images_dir": lambda f: text(f, "odd.vrt", "<VRTDataset/>")}, "odd.vrt"),
    ({"paths.raw_images_dir": lambda f: scene(f, bands=np.zeros((2, 100, 130), np.uint8))},
     "bands"),
    ({"paths.raw_images_dir": lambda f: scene(f, bands=np.zeros((3, 100, 130), np.complex64))},
     "real numbers"),
    ({"paths.raw_images_dir": lambda f: scene(f, **PLAIN)}, "no CRS"),
    ({"paths.raw_images_dir": lambda f: scene(f, crs=None)}, "no CRS"),
    ({"paths.raw_images_dir": lambda f: scene(f, crs="EPSG:32601")}, "overlap"),
    ({"dataset.bands": [1, 2, 7]}, "dataset.bands"),
    ({"dataset.input_range": "dtype",
      "paths.raw_images_dir": lambda f: [scene(f), scene(f, "b.tif", dtype="uint16")]}, "dtype"),
    ({"paths.label_path": "nowhere.tif"}, "nowhere.tif"),
    ({"paths.label_path": lambda f: cut_short(label(f))}, "truncated"),
    ({"paths.label_path": lambda f: text(f, "label.tif", "no raster")}, "label.tif"),
    ({"paths.label_path": lambda f: label(f, **PLAIN)}, "no CRS"),
    ({"paths.label_path": lambda f: label(f, LOW)}, "7"),
    ({"paths.label_path": lambda f: label(f, LOW.astype(np.float32) / 2)}, "3.5"),
    ({"paths.label_path": lambda f: label(f, np.full((100, 130), 255, np.uint8))}, "no tile"),
    ({"paths.label_path": lambda f: label(f, LOW.astype(np.int16) - 8)}, "-1"),
    ({"paths.label_path": lambda f: scene(f, "label.tif")}, "bands"),
    ({"paths.label_path": lambda f: text(f, "p.geojson", "{")}, "p.geojson"),
    ({"paths.label_path": lambda f: text(f, "p.geojson", "[]")}, "p.geojson"),
    ({"paths.label_path": lambda f: text(f, "p.gpkg", "no database")}, "p.gpkg"),
    ({"paths.label_path": lambda f: polygons(f, [])}, "p.geojson"),
    ({"paths.label_path": lambda f: polygons(f, [FAR])}, "overlap"),
    ({"paths.label_path": lambda f: polygons(f, [SQUARE], kind="oak"),
      "dataset.labels": {"attribute": "knd"}}, "kind"),
    ({"paths.label_path": lambda f: polygons(f, [SQUARE], kind="oak"),
      "dataset.labels": {"attribute": "kind"}}, "oak"),
    ({"dataset.gsd": 2.0, "paths.raw_images_dir": lambda f: scene(f, **PLAIN)}, "gsd"),
    ({"prepare.min_labeled": 1.0, "paths.label_path": lambda f: label(
        f, np.where(np.arange(130) % 2, 255, 0).astype(np.uint8).repeat(100).reshape(130, 100).T
    )}, "no tile"),
]  # fmt: skip
TRAIN = [
    ({"dataset.splits": {"train_list": "no.txt", "val_list": "no.txt"}}, "no.txt"),
    ({"dataset.splits": {"train_list": lambda f: text(f, "t", "nrth"),
                         "val_list": lambda f: text(f, "v", "north")}}, "did you mean"),
    ({"dataset.splits": {"train_list": lambda f: text(f, "t", "north"),
                         "val_list": lambda f: text(f, "v", "north")}}, "one side"),
    ({"dataset.splits": {"train_list": lambda f: text(f, "t", "north"),
                         "val_list": lambda f: text(f, "v", "# none")}}, "names no tile"),
    ({"dataset.splits": {"regions": "no.gpkg"}}, "no.gpkg"),
    ({"dataset.splits": {"regions": lambda f: polygons(f, [SQUARE])}}, "split"),
    ({"dataset.splits": {"regions": lambda f: polygons(f, [SQUARE], split="tset")}}, "tset"),
    ({"dataset.splits": {"regions": lambda f: polygons(f, [SQUARE], split="train")}}, "val"),
    ({"dataset.splits": {"buffer": 1e6}}, "lower block or buffer"),
    ({"train.processed_dir": "in"}, "manifest.json"),
]  # fmt: skip
INFER = [
    ({"inference.input_tif": "no.tif"}, "no.tif"),
    ({"inference.input_tif": lambda f: cut_short(scene(f))}, "truncated"),
    ({"inference.input_tif": lambda f: scene(f, bands=np.zeros((1, 100, 130), np.uint8))}, "bands"),
    ({"inference.checkpoint": "no.pth"}, "no.pth"),
    ({"inference.checkpoint": lambda f: text(f, "bad.pth", "no checkpoint")}, "bad.pth"),
    ({"model.head": "unet"}, "unet"),
    ({"model.num_classes": 4}, "num_classes"),
    ({"dataset.bands": [3, 2, 1]}, "bands"),
    ({"dataset.gsd": 3.0}, "gsd"),
    ({"model.layers": [0, 1]}, "layers"),
    ({"model.image_mean": [0.5, 0.5, 0.5], "model.image_std": [0.2, 0.2, 0.2]}, "image_mean"),
]
CASES = [
    *(("prepare", changes, said) for changes, said in PREPARE),
    *(("train", changes, said) for changes, said in TRAIN),
    *(("inference", changes, said) for changes, said in INFER),
]


def written(value, folder: Path):
    if callable(value):
        return value(folder)
    if isinstance(value, dict):
        return {key: written(each, folder) for key, each in value.items()}
    return value


@pytest.mark.parametrize(("phase", "changes", "said"), CASES, ids=lambda value: str(value)[:40])
def test_a_wrong_input_is_one_line_of_its_kind(trained, folder, capsys, phase, changes, said):
    settings = settings_of(trained)
    (folder / "in").mkdir()
    for other in ("prepare", "verify", "train", "inference"):
        settings.setdefault(other, {})["enable"] = other == phase
    if phase != "prepare":
        settings["paths"]["processed_dir"] = str(trained / "cache")
    if phase == "inference":
        settings["train"]["weights_dir"] = str(trained / "weights")
    for key, value in changes.items():
        *above, last = key.split(".")
        section = settings
        for name in above:
            section = section.setdefault(name, {})
        section[last] = written(value, folder)
    settings["logging"] = {"level": "error", "timestamps": False}
    (folder / "wrong.yml").write_text(yaml.safe_dump(settings))
    before = {path.name for path in folder.iterdir()}

    code = main.main([str(folder / "wrong.yml")])

    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if "failed after" not in line]
    assert code in (2, 3), lines
    assert len(lines) == 1, lines
    assert said in lines[0], lines
    assert "Traceback" not in lines[0] and "\n" not in lines[0]
    left = {path.name for path in folder.iterdir()} - before
    assert left <= {"cache", "weights"}, left
    assert not list(folder.rglob("*.tmp")) and not list(folder.rglob("map*.tif"))


def test_there_are_forty_of_them():
    assert len(CASES) >= 40
