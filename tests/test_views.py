"""Cached views: the true features of turned tiles, drawn alike, and nothing else read."""

import re
from collections import Counter
from pathlib import Path

import project
import pytest
import torch
from project import manifest_of

import main
from config import Augmentations, Train
from models.backbone import build_backbone, describe_backbone
from utils.cache import TileError, check_tile, load_tile, tile_path
from utils.data import PrecomputedDataset
from utils.distributed import Runtime
from utils.loading import Collate, make_loaders
from utils.manifest import read_manifest, write_manifest
from utils.quantize import HALF, restored, rounding
from utils.splits import Split
from utils.turns import Turn, distinct_turns

EIGHT = distinct_turns(True, True, True)
OFF = ("inference.enable=false", "train.enable=false", "verify.enable=false")


def prepared(folder, count: int, *settings: str):
    """A project whose cache holds so many views; its config and backbone."""
    path = project.write_project(folder, height=64, width=128, nodata=None)
    assert project.run(path, *OFF, f"train.augment_views={count}", *settings) == 0
    config = main.load_config(path, settings)
    dtype = HALF[config.prepare.feature_dtype]
    return path, build_backbone(config.model, describe_backbone(config.model), dtype)


@pytest.mark.parametrize(("count", "feature_dtype"), [
    (1, "fp16"), (2, "fp16"), (3, "bf16"), (8, "fp16"), (8, "int8"),
])  # fmt: skip
def test_each_cached_view_has_the_features_of_the_turned_tile(tmp_path, count, feature_dtype):
    _, backbone = prepared(tmp_path, count, f"prepare.feature_dtype={feature_dtype}")
    manifest = read_manifest(tmp_path / "cache")
    turns = [Turn(*view) for view in manifest.views]
    assert turns == EIGHT[:count]
    for name in manifest.tiles:
        path = tile_path(tmp_path / "cache", name)
        check_tile(path, manifest)
        stored = load_tile(path)
        levels = iter(restored(stored["features"], stored.get("scales", ())))
        for turn in turns:
            with torch.inference_mode():
                expected = rounding(feature_dtype)(backbone(turn.apply(stored["image"])[None]))
            near = 0.05 if feature_dtype == "int8" else 4e-3  # two steps of either
            for level in expected:
                assert torch.allclose(next(levels).float(), level[0].float(), rtol=near, atol=near)
        assert list(levels) == []


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_of_views_is_what_the_backbone_says_of_the_turned_images(tmp_path, workers):
    _, backbone = prepared(tmp_path, 8)
    manifest = read_manifest(tmp_path / "cache")
    names, section = list(manifest.tiles), Train(
        processed_dir=tmp_path / "cache", num_workers=workers, batch_size=2, augment_views=8
    )  # fmt: skip
    split = Split(names, names)
    loaders = make_loaders(split, manifest, section, Augmentations(), 3, Runtime())
    seen = set()
    for epoch in range(12):
        loaders.sampler.epoch = epoch
        for batch in loaders.train:
            with torch.inference_mode():
                expected = backbone(batch.image)
            for ours, level in zip(batch.features, expected, strict=True):
                assert torch.allclose(ours.float(), level.float(), rtol=2e-3, atol=2e-3)
            seen |= {image.numpy().tobytes() for image in batch.image}
    assert len(seen) > 8  # of two tiles in eight views
    for batch in loaders.val:
        stored = [load_tile(tile_path(tmp_path / "cache", name)) for name in batch.name]
        assert torch.equal(batch.image, torch.stack([each["image"] for each in stored]))
        for number, level in enumerate(batch.features):
            assert torch.equal(level, torch.stack([each["features"][number] for each in stored]))


CHANNELS, LEVELS, SIDE = 512, 2, 512


@pytest.fixture
def cached_views(tmp_path) -> PrecomputedDataset:
    """A tile of eight views, each value of which is the number of its view."""
    views = [[turn.hflip, turn.vflip, turn.quarters] for turn in EIGHT]
    made = manifest_of(CHANNELS, LEVELS, views=views, tile_size=SIDE, complete=True)
    write_manifest(made, tmp_path)
    features = [
        torch.full((CHANNELS, SIDE // 16, SIDE // 16), float(view)).half()
        for view in range(8)
        for _ in range(LEVELS)
    ]
    image = torch.arange(SIDE * SIDE).view(1, SIDE, SIDE).expand(3, -1, -1).to(torch.uint8)
    project.write_stamped(tmp_path, "tile", image, image[0], features)
    return PrecomputedDataset(tmp_path, made, ["tile"], Augmentations(), seed=2)


def test_views_are_drawn_alike_often_and_their_features_taken_as_they_are(cached_views):
    drawn = Counter()
    for visit in range(400):
        batch = Collate(255)([cached_views[visit]])
        view = float(batch.features[0].flatten()[0])
        assert all((level == view).all() for level in batch.features)
        expected = EIGHT[int(view)].apply(load_tile(cached_views.folder / "tile.pt")["label"])
        assert torch.equal(batch.label[0], expected)
        assert torch.equal(batch.image[0, 2], expected)
        drawn[view] += 1
    assert len(drawn) == 8
    assert 30 < min(drawn.values()) <= max(drawn.values()) < 80


def resident(path: Path) -> int:
    """Bytes of a file that this process has mapped and in memory."""
    pattern = rf"{re.escape(str(path))}\nSize:.*?\nRss: +(\d+) kB"
    maps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    return sum(int(found) for found in re.findall(pattern, maps, re.DOTALL)) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="this system has no smaps")
def test_of_eight_views_only_the_drawn_one_is_read(cached_views):
    path = cached_views.folder / "tile.pt"
    kept = [cached_views[3]]
    batch = Collate(255)(kept)
    needed = sum(part.nbytes for part in (batch.image, batch.label, *batch.features))
    assert path.stat().st_size > 5 * needed
    assert 0.9 * needed < resident(path) < path.stat().st_size / 2  # pages come in large pieces
    del kept
    assert resident(path) == 0


def test_a_tile_of_other_views_is_condemned(cached_views):
    stored = load_tile(cached_views.folder / "tile.pt")
    stored["features"] = stored["features"][:-1]
    torch.save(stored, cached_views.folder / "tile.pt")
    with pytest.raises(TileError, match=r"features is \(15, 512, .*, expected \(16, 512, "):
        check_tile(cached_views.folder / "tile.pt", cached_views.manifest)


@pytest.mark.parametrize("phase", ["prepare", "train"])
def test_a_cache_of_other_views_is_refused_by_its_key(tmp_path, capsys, phase):
    path, _ = prepared(tmp_path, 2)
    off = [f"{name}.enable=false" for name in ("prepare", "train", "verify") if name != phase]
    capsys.readouterr()
    assert project.run(path, *off, "inference.enable=false", "train.augment_views=4") == 3
    assert "train.augment_views" in capsys.readouterr().err
    same = ("train.augment_views=2", "dataset.augmentations.hflip=false")
    assert project.run(path, *off, "inference.enable=false", *same) == 3
    assert "train.augment_views" in capsys.readouterr().err


def test_a_run_with_cached_views_becomes_a_map(tmp_path):
    config = project.write_project(tmp_path, train={"augment_views": 8, "epochs": 2})
    assert project.run(config, "prepare.feature_dtype=int8") == 0
    assert (tmp_path / "map.tif").is_file()
