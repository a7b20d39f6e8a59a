"""Caches of tiles only: training gives them the very features that prepare would have cached."""

import csv

import project
import pytest
import torch
from torch import nn

import main
from models.backbone import (
    DinoBackbone,
    build_backbone,
    describe_backbone,
    write_random_backbone,
)
from utils.cache import TileError, check_tile, load_tile, tile_path, write_tile
from utils.checkpoint import load_checkpoint
from utils.manifest import read_manifest
from utils.step import Step

OFF = ("inference.enable=false", "verify.enable=false")
STILL = "dataset.augmentations.enable=false"


def history(folder) -> list[dict[str, float]]:
    with (folder / "weights" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def trained(folder, kind: str, *settings: str):
    """A project whose head was trained from a cache of a kind."""
    config = project.write_project(folder, train={"epochs": 2, "muon_lr": 1e-3})
    assert project.run(config, *OFF, f"dataset.cache={kind}", *settings) == 0
    return config


@pytest.mark.parametrize(("precision", "feature_dtype", "near"), [
    ("fp32", "fp16", 1e-6), ("fp32", "int8", 1e-6), ("bf16", "bf16", 1e-3), ("bf16", "fp16", 1e-3),
])  # fmt: skip
def test_training_from_tiles_is_training_from_features(tmp_path, precision, feature_dtype, near):
    settings = (
        STILL, f"resources.precision={precision}", f"prepare.feature_dtype={feature_dtype}"
    )  # fmt: skip
    for kind in ("features", "tiles"):
        trained(tmp_path / kind, kind, *settings, "model.head=unet")
    features, tiles = (history(tmp_path / kind) for kind in ("features", "tiles"))
    for one, other in zip(features, tiles, strict=True):
        for key in ("train_loss", "val_loss"):
            assert one[key] == pytest.approx(other[key], rel=near), key
        assert one["miou"] == pytest.approx(other["miou"], abs=20 * near)


def test_the_backbone_that_runs_in_training_is_compiled_like_that_of_the_other_phases(
    tmp_path, monkeypatch, capsys
):
    """By dynamo alone, without the compiler behind it, which a machine may lack."""
    plain, networks = torch.compile, []

    def compile_eagerly(network):
        networks.append(network)
        return plain(network, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    found = []
    for wanted in ("false", "auto", "true"):
        trained(tmp_path / wanted, "tiles", STILL, f"resources.compile={wanted}")
        found.append(history(tmp_path / wanted))
        if wanted != "true":
            assert networks == []
    assert [each.__name__ for each in networks if not isinstance(each, nn.Module)] == ["encode"]
    assert found[0] == found[1]
    for one, other in zip(found[0], found[2], strict=True):
        assert one == pytest.approx(other, rel=1e-5)
    said = capsys.readouterr().err
    assert said.count("resources.compile: compiles as configured; on a CPU") == 2  # with prepare


def test_a_cache_of_tiles_holds_image_and_label_of_the_same_tiles(tmp_path):
    for kind in ("features", "tiles"):
        config = project.write_project(tmp_path / kind)
        off = ("train.enable=false", "inference.enable=false")
        assert project.run(config, f"dataset.cache={kind}", *off) == 0
    whole, bare = (read_manifest(tmp_path / kind / "cache") for kind in ("features", "tiles"))
    assert bare.cache == "tiles"
    assert bare.tiles == whole.tiles
    assert bare.backbone_hash == whole.backbone_hash
    for name in bare.tiles:
        ours, theirs = (load_tile(tile_path(tmp_path / kind / "cache", name))
                        for kind in ("tiles", "features"))  # fmt: skip
        assert set(ours) == {"image", "label", "stamp"}
        assert ours.pop("stamp") != theirs["stamp"]
        assert all(torch.equal(ours[part], theirs[part]) for part in ours)


def test_prepare_runs_no_network_for_a_cache_of_tiles(tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("a forward in prepare")

    monkeypatch.setattr(DinoBackbone, "forward", never)
    monkeypatch.setattr(DinoBackbone, "encode", never)
    config = project.write_project(tmp_path)
    assert project.run(config, "dataset.cache=tiles", *OFF, "train.enable=false") == 0
    assert "reused" in (tmp_path / "run.log").read_text()


def test_images_are_turned_before_the_backbone_sees_them(tmp_path, monkeypatch):
    """The features of a step are those of the turned pixels, not turned ones of the tile."""
    seen, features = [], Step.features

    def watched(step, batch, image):
        found = features(step, batch, image)
        seen.append((batch, found))
        return found

    monkeypatch.setattr(Step, "features", watched)
    config = trained(tmp_path, "tiles")
    section = main.load_config(config).model
    backbone = build_backbone(section, describe_backbone(section))
    turned = 0
    for batch, found in seen:
        assert batch.features == []
        with torch.no_grad():
            expected = backbone(batch.image)
        assert all(map(torch.equal, found, expected))
        for image, name in zip(batch.image, batch.name, strict=True):
            stored = load_tile(tile_path(tmp_path / "cache", name))["image"]
            turned += not torch.equal(image, stored)
    assert turned


def test_the_backbone_is_neither_trained_nor_kept(tmp_path, monkeypatch):
    steps, init = [], Step.__init__

    def kept(step, *arguments, **named):
        init(step, *arguments, **named)
        steps.append(step)

    monkeypatch.setattr(Step, "__init__", kept)
    trained(tmp_path, "tiles", "train.ema_decay=0.5")
    [step] = steps
    own = {id(parameter) for parameter in step.head.parameters()}
    optimized = {id(each) for group in step.optimizer.param_groups for each in group["params"]}
    assert optimized == own
    assert not any(isinstance(module, DinoBackbone) for module in step.ema.modules())
    state = load_checkpoint(tmp_path / "weights" / "linear_best.pth").state
    assert set(state) == set(nn.Module.state_dict(step.head))


@pytest.mark.parametrize("harm", ["other weights", "other blocks", "another mean"])
def test_another_backbone_than_the_tiles_were_cached_for_is_refused(tmp_path, capsys, harm):
    config = trained(tmp_path, "tiles")
    settings = []
    if harm == "other weights":
        write_random_backbone(tmp_path / "backbone", seed=1, **project.BACKBONE)
    elif harm == "other blocks":
        settings = ["model.layers=[1, 3]"]
    else:
        settings = ["model.image_mean=[0.1, 0.2, 0.3]", "model.image_std=[0.1, 0.2, 0.3]"]
    capsys.readouterr()
    train_only = ("prepare.enable=false", *OFF)
    assert project.run(config, *train_only, "dataset.cache=tiles", *settings) == 3
    said = capsys.readouterr().err
    assert {"other weights": "(model.backbone)", "other blocks": "(model.layers)",
            "another mean": "(model.image_mean)"}[harm] in said  # fmt: skip


@pytest.mark.parametrize(("made", "asked"), [("features", "tiles"), ("tiles", "features")])
@pytest.mark.parametrize("phase", ["prepare", "train"])
def test_a_cache_of_another_kind_is_refused_unless_auto(tmp_path, capsys, made, asked, phase):
    config = project.write_project(tmp_path, train={"epochs": 1})
    assert project.run(config, f"dataset.cache={made}", "train.enable=false", *OFF) == 0
    off = [f"{name}.enable=false" for name in ("prepare", "train") if name != phase]
    capsys.readouterr()
    assert project.run(config, *off, *OFF, f"dataset.cache={asked}") == 3
    said = capsys.readouterr().err
    assert "dataset.cache" in said
    assert project.run(config, *off, *OFF, "dataset.cache=auto") == 0
    assert read_manifest(tmp_path / "cache").cache == made
    assert "measured for a tile" not in capsys.readouterr().err


def test_verify_knows_both_kinds(tmp_path, capsys):
    config = trained(tmp_path / "tiles", "tiles")
    whole = trained(tmp_path / "features", "features")
    cache, other = (each.parent / "cache" for each in (config, whole))
    names = sorted(read_manifest(cache).tiles)
    tile_path(cache, names[0]).write_bytes(tile_path(other, names[0]).read_bytes())
    for folder, name, said in ((cache, names[0], "keys are not image, label$"),
                               (other, names[1], "keys are not image, features, label$")):
        stored = load_tile(tile_path(other, names[0]))
        if folder is other:
            write_tile(folder, name, stored["image"], stored["label"])
        with pytest.raises(TileError, match=said):
            check_tile(tile_path(folder, name), read_manifest(folder))
    capsys.readouterr()
    only_verify = ("prepare.enable=false", "train.enable=false", "inference.enable=false")
    assert project.run(config, *only_verify) == 3
    count, said = len(names), capsys.readouterr().err
    assert f"{count} tiles checked, 1 deleted" in said
    assert "1 tiles lack, those that were bad are deleted; run prepare again" in said
    rest = ("train.enable=false", *OFF)
    assert project.run(config, "dataset.cache=tiles", *rest) == 0
    assert f"1 tiles made, {count - 1} reused" in capsys.readouterr().err
    assert project.run(whole, *rest) == 0  # the bare tile, found at a glance
    assert f"1 tiles made, {count - 1} reused" in capsys.readouterr().err


def test_tiles_become_a_map_with_augmentation_and_workers(tmp_path):
    config = project.write_project(tmp_path, model={"head": "unet_v2"})
    assert project.run(config, "dataset.cache=tiles", "train.num_workers=1") == 0
    assert (tmp_path / "map.tif").is_file()
