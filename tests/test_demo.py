"""The demo project: complete, seeded, in two CRSs, and it runs."""

import os
import re
import signal

import numpy as np
import pytest
import torch
from rasterio.crs import CRS

import main
from config import load_config
from models.backbone import build_backbone, describe_backbone
from utils import demo
from utils.label_values import LabelRules
from utils.labels import open_labels
from utils.landscape import CLASSES, paint
from utils.opening import open_raster
from utils.raster import open_scene, read_whole, write_raster
from utils.tiling import Tile

SIZE = 384
RULES = LabelRules(len(CLASSES), {str(number): number for number in range(len(CLASSES))})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small demo project, written but not run."""
    path = tmp_path_factory.mktemp("demo") / "project"
    demo.write_project(path, size=SIZE)
    return path


@pytest.fixture(scope="module")
def run_folder(folder):
    """The same project after a run of one epoch."""
    handler, threads = signal.getsignal(signal.SIGTERM), os.environ.get("OMP_NUM_THREADS")
    assert main.main([str(folder / "config.yml"), "--set", "train.epochs=1"]) == 0
    signal.signal(signal.SIGTERM, handler)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads
    return folder


def contents(folder):
    """Bytes of all files below a folder, by their place."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_the_project_has_everything_that_a_run_needs(folder):
    names = set(contents(folder))
    assert names >= {
        "config.yml", "labels.tif", "scenes/north.tif", "scenes/south.tif", "unseen/unseen.tif",
        "truth/unseen.tif", "backbone/config.json", "backbone/model.safetensors",
        "backbone/preprocessor_config.json",
    }  # fmt: skip
    assert all(not name.endswith(".tmp") for name in names)


@pytest.mark.parametrize("name", ["scenes/north", "scenes/south", "unseen/unseen"])
def test_scenes_are_rgb_in_a_utm_crs_with_a_wedge_of_nodata(folder, name):
    with open_raster(folder / f"{name}.tif") as dataset:
        assert dataset.crs == CRS.from_epsg(32633)
        assert dataset.transform.a == -dataset.transform.e == 0.5
        assert (dataset.count, dataset.height, dataset.width) == (3, SIZE, SIZE)
        assert set(dataset.dtypes) == {"uint8"}
        assert dataset.nodata == 0
        empty = 1 - (dataset.dataset_mask() > 0).mean()
    assert 0.005 < empty < 0.4


def test_the_labels_lie_in_another_crs_at_another_resolution_and_cover_a_part(folder):
    with open_raster(folder / "labels.tif") as dataset:
        assert dataset.crs == CRS.from_epsg(3035)
        assert dataset.transform.a == pytest.approx(0.4)
        assert dataset.nodata == 255
        assert set(np.unique(dataset.read(1))) == {*range(len(CLASSES)), 255}
    shares = []
    for name in ("north", "south"):
        with (
            open_scene(folder / "scenes" / f"{name}.tif") as scene,
            open_labels([folder / "labels.tif"], scene, RULES) as labels,
        ):
            shares.append(np.mean(labels.read(Tile(0, 0, SIZE, SIZE)) != 255))
    assert 0.6 < min(shares) < 0.97  # small scenes lie so that the cut misses one of them


@pytest.mark.parametrize(("number", "name"), [(0, "north"), (1, "south")])
def test_the_labels_lie_where_the_scenes_show_them(folder, number, name):
    wanted = paint(SIZE, SIZE, number)
    with (
        open_scene(folder / "scenes" / f"{name}.tif") as scene,
        open_labels([folder / "labels.tif"], scene, RULES) as labels,
    ):
        found = labels.read(Tile(0, 0, SIZE, SIZE))
    labelled = found != 255
    assert 0.5 < labelled.mean() < 0.97
    agreement = {
        (south, east): (np.roll(wanted.classes, (south, east), (0, 1)) == found)[
            labelled & wanted.valid
        ].mean()
        for south in (-1, 0, 1)
        for east in (-1, 0, 1)
    }
    assert agreement[0, 0] == max(agreement.values()) > 0.97


def test_nothing_that_the_map_is_scored_on_is_labelled(folder):
    with open_scene(folder / "unseen" / "unseen.tif") as scene:
        unseen = scene.grid.footprint()
        truth = read_whole(folder / "truth" / "unseen.tif")[0]
    for name in ("north", "south"):
        with open_scene(folder / "scenes" / f"{name}.tif") as scene:
            assert not unseen.intersects(scene.grid.footprint())
    image = read_whole(folder / "unseen" / "unseen.tif")
    assert np.array_equal(truth == 255, (image == 0).all(0))


def test_the_config_turns_all_phases_on_and_names_what_is_there(folder):
    config = load_config(folder / "config.yml")
    assert all(
        getattr(config, phase).enable for phase in ("prepare", "verify", "train", "inference")
    )
    assert config.model.num_classes == len(CLASSES)
    for path in (config.prepare.raw_images_dir, config.prepare.label_path,
                 config.inference.input_tif):  # fmt: skip
        assert path.exists()
    text = (folder / "config.yml").read_text(encoding="utf-8")
    assert "config.schema.json" in text.splitlines()[0]


def test_the_backbone_folder_loads_like_one_from_the_hub(folder):
    from transformers import AutoConfig, AutoModel

    assert AutoConfig.from_pretrained(folder / "backbone").model_type == "dinov3_vit"
    theirs = AutoModel.from_pretrained(folder / "backbone")
    section = load_config(folder / "config.yml").model
    backbone = build_backbone(section, describe_backbone(section))
    pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        states = theirs(pixel_values=backbone.normalize(pixels)).last_hidden_state
        ours = backbone(pixels)[-1].float()
    tokens = ours.flatten(2).transpose(1, 2)
    assert torch.allclose(tokens, states[:, backbone.prefix :], atol=5e-3)  # ours are halves


def test_the_project_is_the_same_each_time_it_is_written(tmp_path):
    for name in ("a", "b"):
        demo.write_project(tmp_path / name, size=256)
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_a_whole_project_is_left_as_it_is(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    demo.write_project(folder, size=SIZE)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_project_runs_from_its_config_to_a_map(run_folder):
    with open_raster(run_folder / "map.tif") as dataset:
        assert (dataset.height, dataset.width) == (SIZE, SIZE)
        assert (dataset.crs, dataset.nodata) == (CRS.from_epsg(32633), 255)
        empty = dataset.read(1) == 255
    assert np.array_equal(empty, read_whole(run_folder / "truth" / "unseen.tif")[0] == 255)
    assert (run_folder / "weights" / "unet_v2_best.pth").is_file()


def test_the_report_names_the_products_and_scores_each_class(run_folder, capsys):
    assert demo.main([str(run_folder), "--report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(lines)
    for name in ("map.tif", "weights", "cache", "picture.png"):
        assert str(run_folder / name) in text
        assert (run_folder / name).exists()
    for name in (*CLASSES, "mean"):
        assert re.search(rf"^\s*{name}\s+(0|1)\.\d{{4}}\s+(0|1)\.\d{{4}}$", text, re.MULTILINE)


def test_a_perfect_map_scores_one(run_folder, tmp_path, capsys):
    for name in ("truth", "unseen"):
        (tmp_path / name).symlink_to(run_folder / name)
    with open_scene(tmp_path / "unseen" / "unseen.tif") as scene:
        write_raster(tmp_path / "map.tif", read_whole(tmp_path / "truth/unseen.tif"), scene.grid)
    assert demo.report(tmp_path) == 0
    assert re.search(r"mean\s+1\.0000\s+1\.0000", capsys.readouterr().out)
    picture = read_whole(tmp_path / "picture.png")
    assert picture.shape == (3, SIZE // 2, 3 * SIZE // 2)
    truth, classes = np.split(picture, 3, axis=2)[1:]
    assert np.array_equal(truth, classes)


def test_a_report_without_a_map_says_what_to_run(tmp_path, capsys):
    assert demo.main([str(tmp_path), "--report"]) == 3
    assert f"run python main.py {tmp_path}/config.yml first" in capsys.readouterr().out
