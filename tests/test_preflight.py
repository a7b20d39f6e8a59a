"""What would end a later phase ends the run before the first one computes."""

import os
import shutil
from pathlib import Path

import project
import pytest

import main
from models.backbone import build_backbone
from utils import phases
from utils.locks import alone_in
from utils.preflight import PlaceError, require_writable


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A small project of four phases that nothing was made of yet."""
    return project.write_project(tmp_path_factory.mktemp("whole"), height=100, width=130)


@pytest.fixture
def config(whole, tmp_path, monkeypatch) -> Path:
    """A copy of it, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(whole.parent, tmp_path / "copy") / "config.yml"


@pytest.fixture
def entered(monkeypatch) -> list[str]:
    """The phases that a run came to; none of them does anything."""
    names: list[str] = []
    monkeypatch.setattr(main, "enter", lambda phase, *_: names.append(phase.__name__))
    return names


def last_line(capsys) -> str:
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_a_run_whose_paths_are_right_comes_to_every_phase(config, entered):
    assert project.run(config) == 0
    assert entered == ["prepare", "verify", "train", "inference"]


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        (["inference.input_tif=nowhere.tif"], 3, "nowhere.tif: no such file or folder"),
        (["inference.input_tif=copy/config.yml"], 3, "config.yml: "),
        (["inference.output_tif=copy/unseen.tif/map.tif"], 4, "correct inference.output_tif"),
        (["inference.confidence=copy/unseen.tif", "inference.input_tif=copy/unseen.tif"], 3,
         "would be written over the scene"),
        (["inference.checkpoint=nowhere.pth"], 3, "nowhere.pth: no such checkpoint"),
        (["train.enable=false"], 3, "linear_best.pth: no such checkpoint"),
        (["dataset.splits.regions=nowhere.geojson"], 3, "nowhere.geojson: no such file"),
        (["dataset.splits.train_list=a.txt", "dataset.splits.val_list=b.txt"], 3, "a.txt: no such"),
        (["train.weights_dir=copy/config.yml"], 4, "correct train.weights_dir"),
        (["paths.processed_dir=copy/config.yml/x"], 4, "correct paths.processed_dir"),
        (["paths.raw_images_dir=nowhere"], 3, "nowhere: no such file or folder"),
        (["paths.label_path=nowhere"], 3, "nowhere: no such file or folder (paths.label_path)"),
        (["model.layers=[99]"], 2, "model.layers: found [99]"),
        (["model.backbone=./nowhere"], 3, "nowhere: "),
        (["prepare.enable=false", "verify.enable=false"], 3, "run prepare first"),
        (["train.processed_dir=copy/elsewhere"], 3, "elsewhere/manifest.json: no such file"),
    ],
)  # fmt: skip
def test_a_fault_of_any_phase_ends_the_run_before_the_first(
    config, entered, capsys, changes, code, said
):
    assert project.run(config, *changes) == code
    assert said in last_line(capsys)
    assert entered == []
    assert not list((config.parent / "cache").glob("[!.]*"))


def test_of_several_faults_the_one_that_is_cheapest_to_find_is_told(config, capsys, monkeypatch):
    assert project.run(config, "train.epochs=1", "inference.enable=false") == 0
    monkeypatch.setattr(phases, "build_backbone", never)
    faults = [
        ("inference.output_tif=copy/unseen.tif/map.tif", 4, "correct inference.output_tif"),
        ("train.weights_dir=copy/held", 4, "in use by process"),
        ("model.layers=[99]", 2, "model.layers: found [99]"),
        ("model.num_classes=9", 3, "num_classes 3, this run has 9"),
        ("inference.input_tif=copy/config.yml", 3, "config.yml: "),
        ("dataset.splits.regions=copy/labels.tif", 3, "labels.tif: no vector file"),
    ]
    with alone_in(config.parent / "held", "train.weights_dir"):
        for first, (_, code, said) in enumerate(faults):
            settings = [setting for setting, *_ in faults[first:]]
            capsys.readouterr()
            assert project.run(config, *settings, "prepare.enable=false") == code
            assert said in last_line(capsys)


def test_what_an_earlier_phase_makes_is_not_asked_for(config, entered):
    weights = "inference.checkpoint=copy/weights/linear_best.pth"
    assert project.run(config, weights) == 0
    assert len(entered) == 4


def test_a_disabled_phase_is_not_looked_at(config, entered):
    off = ("inference.enable=false", "inference.input_tif=nowhere.tif")
    assert project.run(config, *off, "inference.output_tif=map.tif") == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_is_named_by_its_key(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(PlaceError, match="no permission.*train.weights_dir"):
        require_writable(tmp_path / "weights", "train.weights_dir")


def test_the_permission_is_that_of_the_nearest_folder_that_exists(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("utils.preflight.os.access", lambda path, mode: asked.append(path))
    with pytest.raises(PlaceError, match="no permission to write there"):
        require_writable(tmp_path / "some" / "cache", "paths.processed_dir")
    assert asked == [tmp_path]


def never(*_, **__):
    raise AssertionError("weights were loaded")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("prepare.tile_size=48",), "prepare.tile_size"),
        (("model.layers=[1]", "prepare.enable=false"), "made with layers [0, 1, 2, 3]"),
        (("train.enable=false", "model.layers=[1]", "prepare.enable=false"), "layers is"),
    ],
    ids=["prepare", "train", "inference"],
)
def test_other_settings_are_refused_before_weights_are_loaded(
    config, monkeypatch, capsys, settings, said
):
    assert project.run(config, "train.epochs=1", "dataset.cache=tiles") == 0
    capsys.readouterr()
    monkeypatch.setattr(phases, "build_backbone", never)
    assert project.run(config, *settings, "dataset.cache=tiles", "verify.enable=false") == 3
    assert said in last_line(capsys)


def test_locks_are_taken_before_the_first_phase_and_given_back(config, monkeypatch, capsys):
    held = []

    def noted(phase, *_):
        folders = (config.parent / "cache", config.parent / "weights")
        held.append((phase.__name__, *((folder / ".lock.json").exists() for folder in folders)))

    monkeypatch.setattr(main, "enter", noted)
    assert project.run(config) == 0
    assert held == [
        ("prepare", True, True), ("verify", True, True), ("train", False, True),
        ("inference", False, False),
    ]  # fmt: skip


def test_a_backbone_of_other_weights_is_refused_after_they_are_loaded(config, monkeypatch, capsys):
    assert project.run(config, "train.epochs=1", "inference.enable=false") == 0
    loaded = []

    def other(*arguments):
        backbone = build_backbone(*arguments)
        backbone.weights_hash = "f" * 64
        loaded.append(backbone)
        return backbone

    monkeypatch.setattr(phases, "build_backbone", other)
    assert project.run(config, "train.enable=false", "verify.enable=false") == 3
    assert len(loaded) == 1
    assert "model.backbone" in last_line(capsys)
