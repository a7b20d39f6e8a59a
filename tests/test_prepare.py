"""Prepare: what it caches is what the backbone says of the pixels, and only what is missing."""

import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rasterio.transform import Affine

from config import Config, ConfigError, Prepare
from utils import prepare as module
from utils.cache import CacheError, Manifest, load_tile, read_manifest, tile_path
from utils.data import verify
from utils.distributed import Runtime
from utils.logging import VerbosityLogger
from utils.prepare import Encode, describe_cache, encode_on, prepare
from utils.raster import RasterError, open_scene
from utils.tiling import Tile, repeated, tiles

CPU, SIZE, IGNORE = torch.device("cpu"), 32, 255
PLACE = Affine(0.5, 0, 412000, 0, -0.5, 5326000)
BELOW = Affine(0.5, 0, 412000, 0, -0.5, 5325900)


@dataclass
class Project:
    """Two scenes, labels over both, and the backbone of the tests."""

    config: Config
    backbone: torch.nn.Module
    write_tiff: object

    @property
    def cache(self) -> Path:
        return self.config.prepare.processed_dir

    @property
    def encode(self) -> Encode:
        return encode_on(CPU, self.backbone)

    def changed(self, **keys) -> "Project":
        """The same project with other keys in its prepare section."""
        section = self.config.prepare.model_copy(update=keys)
        return replace(self, config=self.config.model_copy(update={"prepare": section}))

    def wanted(self) -> Manifest:
        return describe_cache(self.config, self.backbone, CPU)

    def prepare(self, run: Runtime | None = None, encode: Encode | None = None) -> str:
        """Run the phase; what it said."""
        log = VerbosityLogger("debug", timestamps=False, stream=io.StringIO())
        try:
            prepare(
                self.config.prepare, self.wanted(), encode or self.encode, run or Runtime(), log
            )
        finally:
            self.said = log.stream.getvalue()
        return self.said

    def tiles(self) -> list[str]:
        return sorted(path.stem for path in self.cache.glob("*.pt"))

    def times(self) -> dict[str, int]:
        return {path.stem: path.stat().st_mtime_ns for path in self.cache.glob("*.pt")}


@pytest.fixture
def project(tmp_path, write_tiff, rng, backbone) -> Project:
    """North is 70 × 90 pixels (12 tiles of 32), south 64 × 64 (4); a class per quarter."""
    for name, shape, place in (("north", (70, 90), PLACE), ("south", (64, 64), BELOW)):
        pixels = rng.integers(1, 256, (3, *shape), dtype=np.uint8)
        write_tiff(f"scenes/{name}.tif", pixels, transform=place)
    write_tiff("labels.tif", rng.integers(0, 3, (300, 100), dtype=np.uint8), transform=PLACE)
    section = {
        "raw_images_dir": tmp_path / "scenes",
        "label_path": tmp_path / "labels.tif",
        "processed_dir": tmp_path / "cache",
        "tile_size": SIZE,
        "batch_size": 3,
    }
    config = Config.model_validate(
        {
            "model": {"num_classes": 3},
            "prepare": section,
            "verify": {"enable": False},
            "train": {"enable": False},
        }
    )
    return Project(config, backbone, write_tiff)


@pytest.fixture
def prepared(project) -> Project:
    project.prepare()
    return project


@pytest.mark.parametrize("batch_size", [1, 5, 16])
def test_the_cache_holds_what_the_backbone_says_of_the_pixels(project, batch_size):
    project = project.changed(batch_size=batch_size)
    project.prepare()
    manifest = read_manifest(project.cache)
    for path in sorted(project.config.prepare.raw_images_dir.iterdir()):
        with open_scene(path) as scene:
            for tile in tiles(scene.grid.height, scene.grid.width, SIZE):
                stored = load_tile(tile_path(project.cache, f"{scene.name}__{tile.name}"))
                pixels = torch.from_numpy(scene.read(tile).image)
                assert torch.equal(stored["image"], pixels)
                with torch.inference_mode():
                    features = project.backbone(pixels[None])
                assert len(features) == len(stored["features"]) == len(manifest.layers)
                for level, expected in zip(stored["features"], features, strict=True):
                    assert torch.equal(level, expected[0].half())


def test_files_are_small_and_their_tensors_plain(prepared):
    for path in prepared.cache.glob("*.pt"):
        stored = load_tile(path)
        parts = [stored["image"], stored["label"], *stored["features"]]
        for part in parts:
            assert type(part) is torch.Tensor
            assert not part.requires_grad
            assert not part.is_inference()
            assert part.untyped_storage().nbytes() == part.nbytes
        overhead = path.stat().st_size - sum(part.nbytes for part in parts)
        assert overhead < 3000  # what zip and pickle need, whatever the tile's size


def test_every_labelled_pixel_counts_once(prepared, rng):
    manifest = read_manifest(prepared.cache)
    counts = torch.zeros(3, dtype=torch.int64)
    for path in prepared.cache.glob("north__*.pt"):
        label = load_tile(path)["label"].long()
        counts += torch.bincount(label[label != IGNORE], minlength=3)
    assert counts.sum() == 70 * 90
    assert manifest.tiles == {"north": 9, "south": 4}
    assert manifest.complete
    assert "scene north: 9 tiles, 0.0% of pixels ignored" in prepared.said
    assert "2 scenes, 13 tiles made, 0 reused, 0 skipped without a label" in prepared.said


def test_a_moved_back_tile_ignores_what_its_neighbour_holds(prepared):
    label = load_tile(tile_path(prepared.cache, "north__r000038_c000058"))["label"]
    rows, cols = repeated(Tile(38, 58, SIZE, SIZE))
    assert (rows, cols) == (26, 6)
    assert (label[:rows] == IGNORE).all()
    assert (label[:, :cols] == IGNORE).all()
    assert (label[rows:, cols:] != IGNORE).all()


def test_a_second_run_reuses_every_tile(prepared):
    before = prepared.times()

    def fail(_):
        raise AssertionError("features computed again")

    said = prepared.prepare(encode=fail)
    assert prepared.times() == before
    assert "0 tiles made, 13 reused" in said


def test_ranks_share_the_tiles(project):
    made = []
    for rank in range(3):
        project.prepare(RunAlone(rank, rank, 3))
        made.append(set(project.tiles()) - set().union(*made))
    assert [len(part) for part in made] == [5, 4, 4]


class RunAlone(Runtime):
    """A rank that waits for nobody and sums only its own."""

    def sum(self, tensor):
        return tensor

    def wait(self) -> None:
        pass


# Labels


def test_masked_pixels_of_a_scene_have_ignored_labels(project, rng):
    pixels = rng.integers(1, 256, (3, 64, 64), dtype=np.uint8)
    pixels[:, :10, 5:] = 0
    project.write_tiff("scenes/south.tif", pixels, transform=BELOW, nodata=0)
    said = project.prepare()
    label = load_tile(tile_path(project.cache, "south__r000000_c000000"))["label"]
    assert (label[:10, 5:] == IGNORE).all()
    assert (label[10:] != IGNORE).all()
    assert (label[:, :5] != IGNORE).all()
    assert f"scene south: 4 tiles, {10 * 59 / 64**2:.1%} of pixels ignored" in said


def test_a_tile_without_a_labelled_pixel_is_left_out(project, rng):
    classes = rng.integers(0, 3, (300, 100), dtype=np.uint8)
    classes[:32, :32] = IGNORE
    project.write_tiff("labels.tif", classes, transform=PLACE)
    said = project.prepare()
    assert "north__r000000_c000000" not in project.tiles()
    assert "12 tiles made, 0 reused, 1 skipped without a label" in said
    assert "0 tiles made, 12 reused, 1 skipped without a label" in project.prepare()


def test_a_scene_without_a_labelled_pixel_is_reported(project, rng):
    classes = rng.integers(0, 3, (300, 100), dtype=np.uint8)
    classes[200:] = IGNORE
    project.write_tiff("labels.tif", classes, transform=PLACE)
    said = project.prepare()
    assert "scene south: 0 tiles, 100.0% of pixels ignored" in said
    assert read_manifest(project.cache).tiles == {"north": 9, "south": 0}


def test_no_labelled_pixel_at_all_is_an_error(project):
    project.write_tiff("labels.tif", np.full((300, 100), IGNORE, np.uint8), transform=PLACE)
    with pytest.raises(CacheError, match="no scene has a labelled pixel"):
        project.prepare()
    assert not read_manifest(project.cache).complete


def test_a_scene_beside_the_labels_is_an_error_naming_both_extents(project, rng):
    far = Affine(0.5, 0, 500000, 0, -0.5, 5000000)
    pixels = rng.integers(1, 256, (3, 64, 64), dtype=np.uint8)
    path = project.write_tiff("scenes/far.tif", pixels, transform=far)
    with pytest.raises(RasterError, match="no overlap") as caught:
        project.prepare()
    assert str(path) in str(caught.value)
    assert not project.cache.exists()


def test_values_outside_the_classes_are_refused_with_a_histogram(project, rng):
    classes = np.zeros((300, 100), np.uint8)
    classes[10:20, 10:20] = 7
    classes[40, :30] = IGNORE
    project.write_tiff("labels.tif", classes, transform=PLACE)
    with pytest.raises(RasterError) as caught:
        project.prepare()
    line = str(caught.value)
    assert f"{{0: {70 * 90 - 130}, 7: 100, 255: 30}}" in line
    assert "values other than 0..2 and 255" in line
    assert "\n" not in line
    assert not project.cache.exists()


@pytest.mark.parametrize("georeferenced", [True, False])
def test_a_declared_nodata_beside_the_classes_is_no_outside_value(
    project, rng, georeferenced, recwarn
):
    place = {"transform": BELOW} if georeferenced else {"transform": None, "crs": None}
    (project.config.prepare.raw_images_dir / "north.tif").unlink()
    pixels = rng.integers(1, 256, (3, 64, 64), dtype=np.uint8)
    classes = rng.integers(0, 3, (64, 64), dtype=np.uint8)
    classes[:40] = 200
    project.write_tiff("scenes/south.tif", pixels, **place)
    project.write_tiff("labels.tif", classes, nodata=200, **place)
    said = project.prepare()
    assert "2 tiles made" in said
    label = load_tile(tile_path(project.cache, "south__r000032_c000000"))["label"]
    assert (label[:8] == IGNORE).all()
    assert (label[8:] < 3).all()


def test_a_declared_nodata_that_is_a_class_is_told_and_stays(project, rng):
    classes = rng.integers(0, 3, (300, 100), dtype=np.uint8)
    project.write_tiff("labels.tif", classes, transform=PLACE, nodata=0)
    said = project.prepare()
    assert "declares 0 as nodata, which is one of the 3 classes; it stays a class" in said
    label = load_tile(tile_path(project.cache, "north__r000000_c000000"))["label"]
    assert np.array_equal(label, classes[:32, :32])


def test_a_scene_smaller_than_a_tile_is_cached_once(project, rng):
    for path in project.config.prepare.raw_images_dir.iterdir():
        path.unlink()
    sizes = {"dot": (1, 1), "line": (40, 1), "small": (20, 30)}
    for name, shape in sizes.items():
        pixels = rng.integers(1, 256, (3, *shape), dtype=np.uint8)
        project.write_tiff(f"scenes/{name}.tif", pixels, transform=PLACE)
    project.prepare()
    assert read_manifest(project.cache).tiles == {"dot": 1, "line": 2, "small": 1}
    for name, (height, width) in sizes.items():
        labels = [load_tile(path)["label"] for path in project.cache.glob(f"{name}__*.pt")]
        assert sum(int((label != IGNORE).sum()) for label in labels) == height * width


# Folders


def test_the_label_raster_in_the_scenes_folder_is_no_scene(project, tmp_path):
    inside = tmp_path / "scenes" / "labels.tif"
    (tmp_path / "labels.tif").rename(inside)
    project.changed(label_path=inside).prepare()
    assert set(read_manifest(project.cache).scenes) == {"north", "south"}


def test_other_files_are_reported_and_sidecars_are_not(project):
    folder = project.config.prepare.raw_images_dir
    (folder / "notes.txt").write_text("flown in May")
    (folder / "north.tfw").write_text("0.5")
    said = project.prepare()
    assert "skipped notes.txt: not a raster" in said
    assert "north.tfw" not in said
    assert "1 other files" in said


def test_an_empty_folder_and_missing_labels_are_named(project, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(RasterError, match="holds no raster"):
        project.changed(raw_images_dir=tmp_path / "empty").prepare()
    with pytest.raises(RasterError, match=r"gone\.tif: no such file \(paths\.label_path\)"):
        project.changed(label_path=tmp_path / "gone.tif").prepare()


def test_a_tile_size_that_no_patches_fill_is_a_config_error(project):
    class OfPatches:
        spec = replace(project.backbone.spec, patch_size=14)
        weights_hash = ""

    with pytest.raises(ConfigError, match="multiple of 14"):
        describe_cache(project.config, OfPatches, CPU)


# Caches that exist already


def refused(project: Project) -> str:
    before = project.times()
    with pytest.raises(CacheError) as caught:
        project.prepare()
    assert project.times() == before
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_another_tile_size_is_refused(prepared):
    assert "tile_size 32, this run has 64" in refused(prepared.changed(tile_size=64))


def test_other_blocks_or_weights_are_refused(prepared):
    class Other:
        spec = replace(prepared.backbone.spec, layers=(0, 2))
        weights_hash = prepared.backbone.weights_hash

    assert "layers [1, 3], this run has [0, 2]" in refused(with_backbone(prepared, Other))
    Other.spec, Other.weights_hash = prepared.backbone.spec, "f" * 64
    assert "(model.backbone)" in refused(with_backbone(prepared, Other))


def with_backbone(project: Project, described) -> Project:
    class Described(Project):
        def wanted(self) -> Manifest:
            return describe_cache(self.config, described, CPU)

    return Described(project.config, project.backbone, project.write_tiff)


def test_changed_labels_or_classes_are_refused(prepared, rng):
    classes = prepared.config.model.model_copy(update={"num_classes": 4})
    more = replace(prepared, config=prepared.config.model_copy(update={"model": classes}))
    assert "num_classes 3, this run has 4" in refused(more)
    prepared.write_tiff(
        "labels.tif", rng.integers(0, 3, (301, 100), dtype=np.uint8), transform=PLACE
    )
    assert "(paths.label_path)" in refused(prepared)


def test_only_the_tiles_of_a_changed_scene_are_made_again(prepared, rng):
    before = prepared.times()
    pixels = rng.integers(1, 256, (3, 64, 64), dtype=np.uint8)
    prepared.write_tiff("scenes/south.tif", pixels, transform=BELOW)
    said = prepared.prepare()
    assert "south: changed since it was cached" in said
    assert "4 tiles made, 9 reused" in said
    after = prepared.times()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("south")}
    stored = load_tile(tile_path(prepared.cache, "south__r000000_c000000"))["image"]
    assert np.array_equal(stored, pixels[:, :32, :32])


def test_a_removed_scene_is_left_out_and_made_again_if_it_returns_changed(prepared, rng, tmp_path):
    path = tmp_path / "scenes" / "south.tif"
    path.unlink()
    assert "1 scenes, 0 tiles made, 9 reused" in prepared.prepare()
    assert read_manifest(prepared.cache).tiles == {"north": 9}
    pixels = rng.integers(1, 256, (3, 64, 64), dtype=np.uint8)
    prepared.write_tiff("scenes/south.tif", pixels, transform=BELOW)
    assert "4 tiles made, 9 reused" in prepared.prepare()
    stored = load_tile(tile_path(prepared.cache, "south__r000000_c000000"))["image"]
    assert np.array_equal(stored, pixels[:, :32, :32])


def test_a_run_that_was_stopped_goes_on_where_it_was(project):
    calls = []

    def encode(pixels):
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return project.encode(pixels)

    with pytest.raises(KeyboardInterrupt):
        project.prepare(encode=encode)
    assert len(project.tiles()) == 6
    assert not read_manifest(project.cache).complete
    assert [path for path in project.cache.iterdir() if path.name.endswith(".tmp")] == []
    assert "7 tiles made, 6 reused" in project.prepare()
    assert read_manifest(project.cache).complete


def test_a_write_that_fails_leaves_no_half_tile(project, monkeypatch):
    written, save = [], torch.save

    def save_some(stored, path):
        written.append(path)
        if len(written) == 5:
            Path(path).write_bytes(b"half")
            raise OSError("disk full")
        save(stored, path)

    monkeypatch.setattr(torch, "save", save_some)
    with pytest.raises(OSError, match="disk full"):
        project.prepare()
    assert len(project.tiles()) == 4
    assert len(list(project.cache.iterdir())) == 5


def test_files_of_other_origin_in_the_cache_are_left_alone(prepared):
    (prepared.cache / "notes.pt").write_text("mine")
    (prepared.cache / "readme.txt").write_text("mine")
    assert "13 reused" in prepared.prepare()
    verify(prepared.cache, 1, Runtime(), VerbosityLogger("error"))
    assert (prepared.cache / "notes.pt").read_text() == "mine"
    assert (prepared.cache / "readme.txt").read_text() == "mine"


def test_exactly_what_verify_deletes_is_made_again(prepared, log):
    before = {path.stem: path.read_bytes() for path in prepared.cache.glob("*.pt")}
    cut, flipped = prepared.tiles()[2], prepared.tiles()[7]
    tile_path(prepared.cache, cut).write_bytes(before[cut][:-500])
    middle = before[flipped].index(load_tile(tile_path(prepared.cache, flipped))["image"]
                                   .numpy().tobytes())  # fmt: skip
    damaged = bytearray(before[flipped])
    damaged[middle + 100] ^= 1
    tile_path(prepared.cache, flipped).write_bytes(damaged)
    verify(prepared.cache, 2, Runtime(), log)
    said = log.stream.getvalue()
    assert f"deleted {cut}.pt: not a whole file" in said
    assert f"deleted {flipped}.pt: checksum of" in said
    assert "13 tiles checked, 2 deleted" in said
    assert set(before) - set(prepared.tiles()) == {cut, flipped}
    assert "2 tiles made, 11 reused" in prepared.prepare()
    for name, whole in before.items():
        again, original = load_tile(tile_path(prepared.cache, name)), io.BytesIO(whole)
        original = torch.load(original, weights_only=True)
        assert torch.equal(again["image"], original["image"])
        assert torch.equal(again["label"], original["label"])
        assert all(map(torch.equal, again["features"], original["features"]))


def test_a_cut_tile_is_made_again_without_verify(prepared):
    path = tile_path(prepared.cache, prepared.tiles()[0])
    for kept in (0, 100, -1, path.stat().st_size // 2):
        whole = path.read_bytes()
        path.write_bytes(whole[:kept])
        assert "1 tiles made, 12 reused" in prepared.prepare()
        assert path.read_bytes() == whole


def test_tiles_are_batched_across_scenes(project):
    sizes = []

    def encode(pixels):
        sizes.append(len(pixels))
        return project.encode(pixels)

    project.changed(batch_size=5).prepare(encode=encode)
    assert sizes == [5, 5, 3]


def test_the_summary_tells_the_class_shares(prepared):
    labels = [load_tile(path)["label"] for path in prepared.cache.glob("*.pt")]
    counts = np.bincount(np.concatenate([label.flatten() for label in labels]), minlength=256)[:3]
    for number, share in enumerate(counts / counts.sum()):
        assert f"{number}: {share:.1%}" in prepared.said
    size = sum(path.stat().st_size for path in prepared.cache.glob("*.pt"))
    assert f"{size / 1e6:.1f} MB in {prepared.cache}" in prepared.said


def test_what_phases_need_is_taken_from_one_section():
    assert {"raw_images_dir", "label_path", "processed_dir"} <= set(Prepare.model_fields)
    assert [*module.batched(range(5), 2)] == [[0, 1], [2, 3], [4]]
