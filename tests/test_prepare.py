"""Prepare: what it caches is what the backbone says of the pixels, and only what is missing."""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import project as projects
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rasterio.features import rasterize
from rasterio.transform import Affine
from rasterio.warp import transform_geom
from shapely.geometry import box, mapping

from config import Config, ConfigError, Model, Prepare
from models.backbone import build_backbone, describe_backbone
from utils.cache import load_tile, tile_path
from utils.data import verify
from utils.distributed import Runtime
from utils.grids import ground_gsd
from utils.logging import VerbosityLogger
from utils.manifest import CacheError, Manifest, read_manifest, write_manifest
from utils.opening import RasterError
from utils.prepare import Encode, encode_on, fate_of, prepare
from utils.raster import open_scene
from utils.sources import begun_in, cached_ranges, describe_cache, find_sources
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
        return encode_on(CPU, self.wanted(find_sources(self.config)), self.backbone)

    def changed(self, **keys) -> "Project":
        """The same project with other keys in its prepare section."""
        section = self.config.prepare.model_copy(update=keys)
        return replace(self, config=self.config.model_copy(update={"prepare": section}))

    def with_dataset(self, **keys) -> "Project":
        """The same project with other keys in its dataset section, as a file would give them."""
        data = self.config.model_dump(exclude={"prepare"}) | {"prepare": self.config.prepare}
        data["dataset"] = keys
        classes = keys.get("classes")
        data["model"]["num_classes"] = len(classes) if classes else 3
        return replace(self, config=Config.model_validate(data))

    def wanted(self, sources) -> Manifest:
        return describe_cache(self.config, sources, self.backbone, CPU)

    def prepare(self, run: Runtime | None = None, encode: Encode | None = None) -> str:
        """Run the phase; what it said."""
        log = VerbosityLogger("debug", timestamps=False, stream=io.StringIO())
        try:
            sources = find_sources(self.config)
            manifest = self.wanted(sources)
            encode, seed = encode or self.encode, self.config.resources.seed
            prepare(self.config.prepare, sources, manifest, encode, seed, run or Runtime(), log)
        finally:
            self.said = log.stream.getvalue()
        return self.said

    def tiles(self) -> list[str]:
        return sorted(path.stem for path in self.cache.glob("*.pt"))

    def label(self, name: str) -> torch.Tensor:
        return load_tile(tile_path(self.cache, name))["label"]

    def held(self) -> dict[str, int]:
        """Tiles of each scene by the manifest."""
        manifest = read_manifest(self.cache)
        names = [name.rpartition("__")[0] for name in manifest.tiles]
        return {scene: names.count(scene) for scene in manifest.scenes}

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
            "resources": {"precision": "fp32"},
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


@pytest.mark.parametrize(("batch_size", "cores"), [(1, 1), (5, 2), (16, 16)])
def test_the_cache_holds_what_the_backbone_says_of_the_pixels(
    project, batch_size, cores, monkeypatch
):
    monkeypatch.setattr("utils.prepare.cores_of_rank", lambda: cores)
    project = project.changed(batch_size=batch_size)
    project.prepare()
    manifest = read_manifest(project.cache)
    for path in sorted(project.config.prepare.raw_images_dir.iterdir()):
        with open_scene(path) as scene:  # bands 1 to 3, as they are
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
        parts = [stored["image"], stored["label"], stored["features"]]
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
    assert project_counts(manifest, "north") == counts.tolist()
    assert prepared.held() == {"north": 9, "south": 4}
    assert manifest.complete
    assert "scene north: 9 tiles, 0.0% of pixels ignored" in prepared.said
    assert "2 scenes, 13 tiles made, 0 reused, 0 other files, " in prepared.said


def project_counts(manifest: Manifest, scene: str) -> list[int]:
    """Labelled pixels per class of a scene's tiles by the manifest."""
    counts = [own for name, own in manifest.tiles.items() if name.startswith(f"{scene}__")]
    return np.sum(counts, 0).tolist()


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

    def gather(self, value):
        return [value]

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
    assert "12 tiles made, 0 reused, 1 left out without a labelled pixel" in said
    assert "0 tiles made, 12 reused, 1 left out without a labelled pixel" in project.prepare()


def test_a_scene_without_a_labelled_pixel_is_reported(project, rng):
    classes = rng.integers(0, 3, (300, 100), dtype=np.uint8)
    classes[200:] = IGNORE
    project.write_tiff("labels.tif", classes, transform=PLACE)
    said = project.prepare()
    assert "scene south: 0 tiles, 100.0% of pixels ignored" in said
    assert project.held() == {"north": 9, "south": 0}


def test_no_labelled_pixel_at_all_is_an_error(project):
    project.write_tiff("labels.tif", np.full((300, 100), IGNORE, np.uint8), transform=PLACE)
    with pytest.raises(CacheError, match="no tile is left .*13 left out without a labelled pixel"):
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
    assert "1 value(s) on scene north are no class, first 7; pixels per value" in line
    assert "add - {name: NAME, values: [7]} to dataset.classes" in line
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
    assert "declares as nodata means class 0 (class 0); it stays a class" in said
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
    assert project.held() == {"dot": 1, "line": 2, "small": 1}
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
    with pytest.raises(RasterError, match=r"gone\.tif: no such file or .*paths\.label_path"):
        project.changed(label_path=tmp_path / "gone.tif").prepare()


def test_a_tile_size_that_no_patches_fill_is_a_config_error(project):
    class OfPatches:
        spec = replace(project.backbone.spec, patch_size=14)
        weights_hash = ""

    with pytest.raises(ConfigError, match="multiple of 14"):
        describe_cache(project.config, find_sources(project.config), OfPatches, CPU)


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
        def wanted(self, sources) -> Manifest:
            return describe_cache(self.config, sources, described, CPU)

    return Described(project.config, project.backbone, project.write_tiff)


def test_changed_classes_are_refused(prepared, rng):
    names = [{"name": name} for name in ("field", "wood", "water", "road")]
    more = prepared.with_dataset(classes=names)
    assert "num_classes 3, this run has 4" in refused(more)


def test_labels_that_were_saved_again_make_their_scenes_again(prepared, rng, tmp_path):
    prepared.write_tiff(
        "labels.tif", rng.integers(0, 3, (301, 100), dtype=np.uint8), transform=PLACE
    )
    said = prepared.prepare()
    assert "north: it or its labels changed since" in said
    assert "south: it or its labels changed since" in said
    assert "13 tiles made, 0 reused" in said
    fresh = prepared.changed(processed_dir=tmp_path / "other")
    fresh.prepare()
    assert same_files(prepared, fresh)


def same_files(one: Project, other: Project) -> bool:
    """Whether two caches hold the same files, byte for byte."""
    found, wanted = (
        {path.name: path.read_bytes() for path in each.cache.glob("*.pt")} for each in (one, other)
    )
    return found == wanted


def test_labels_of_other_ground_leave_a_scene_as_it_is(prepared, rng, tmp_path):
    """A second file on the south only: the north's tiles stay; without it the south's change."""
    before = prepared.times()
    ids = rng.integers(0, 3, (20, 20), dtype=np.uint8)
    south = prepared.write_tiff("south.tif", ids, transform=BELOW)
    both = prepared.changed(label_path=(south, prepared.config.prepare.label_path))
    said = both.prepare()
    assert "4 tiles made, 9 reused" in said
    assert "north: it" not in said
    after = both.times()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {name for name in before if name.startswith("south")}
    assert "4 tiles made, 9 reused" in prepared.prepare()


def test_only_the_tiles_of_a_changed_scene_are_made_again(prepared, rng):
    before = prepared.times()
    pixels = rng.integers(1, 256, (3, 64, 64), dtype=np.uint8)
    prepared.write_tiff("scenes/south.tif", pixels, transform=BELOW)
    said = prepared.prepare()
    assert "south: it or its labels changed since" in said
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
    assert prepared.held() == {"north": 9}
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


@pytest.mark.parametrize("cores", [2, 16])
def test_a_write_that_fails_leaves_no_half_tile(project, monkeypatch, cores):
    monkeypatch.setattr("utils.prepare.cores_of_rank", lambda: cores)
    written, save = [], torch.save

    def save_some(stored, file):
        written.append(file)
        if len(written) == 5:
            file.write(b"half")
            raise OSError("disk full")
        save(stored, file)

    monkeypatch.setattr(torch, "save", save_some)
    with pytest.raises(OSError, match="disk full"):
        project.prepare()
    made = project.tiles()
    assert len(made) == 4 if cores == 2 else 4 <= len(made) <= 5  # that of the sixth was under way
    assert all("features" in load_tile(tile_path(project.cache, name)) for name in made)
    assert len(list(project.cache.iterdir())) == len(made) + len({"manifest", "its copy"})


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
        assert f"class {number}: {share:.1%}" in prepared.said
    size = sum(path.stat().st_size for path in prepared.cache.glob("*.pt"))
    assert f"{size / 1e6:.1f} MB in {prepared.cache}" in prepared.said


# Which tiles are kept


def test_tiles_with_few_valid_pixels_are_left_out(project, rng):
    pixels = rng.integers(1, 256, (3, 64, 64), dtype=np.uint8)
    pixels[:, :20, :32] = 0
    project.write_tiff("scenes/south.tif", pixels, transform=BELOW, nodata=0)
    said = project.changed(min_valid=0.4).prepare()
    assert "12 tiles made, 0 reused, 1 left out below prepare.min_valid" in said
    assert "south__r000000_c000000" not in project.tiles()
    again = project.changed(min_valid=0.4).prepare()
    assert "0 tiles made, 12 reused, 1 left out below prepare.min_valid" in again


def test_tiles_with_few_labelled_pixels_are_left_out(project, rng):
    classes = rng.integers(0, 3, (300, 100), dtype=np.uint8)
    classes[:20, :32] = IGNORE
    project.write_tiff("labels.tif", classes, transform=PLACE)
    said = project.changed(min_labeled=0.4).prepare()
    assert "north__r000000_c000000" not in project.tiles()
    # and the three moved-back ones: of their pixels only those that no other tile holds count
    assert "left out below prepare.min_labeled" in said
    for path in project.cache.glob("*.pt"):
        assert (load_tile(path)["label"] != IGNORE).float().mean() >= 0.4


def test_a_share_of_tiles_with_background_only_is_kept(project, rng):
    classes = np.zeros((300, 100), np.uint8)
    classes[:10, :10] = 1
    project.write_tiff("labels.tif", classes, transform=PLACE)
    said = project.changed(background_keep=0.0).prepare()
    assert project.tiles() == ["north__r000000_c000000"]
    assert "1 tiles made, 0 reused, 12 left out of background only" in said


def test_the_kept_share_is_seeded_and_the_same_on_every_rank(project, rng):
    project.write_tiff("labels.tif", np.zeros((300, 100), np.uint8), transform=PLACE)
    half = project.changed(background_keep=0.5)
    half.prepare()
    kept = half.tiles()
    assert 1 <= len(kept) <= 12
    parts = half.changed(processed_dir=project.cache.with_name("ranks"))
    for rank in range(3):
        parts.prepare(RunAlone(rank, rank, 3))
    assert parts.tiles() == kept
    other = half.changed(processed_dir=project.cache.with_name("seed"))
    seed = other.config.resources.model_copy(update={"seed": 5})
    other = replace(other, config=other.config.model_copy(update={"resources": seed}))
    other.prepare()
    assert other.tiles() != kept
    mixed = replace(half, config=half.config.model_copy(update={"resources": seed}))
    assert "'seed': 5" in refused(mixed)  # a union of two choices would be none


@given(st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_the_kept_share_of_background_is_the_one_asked_for(share, seed):
    valid = np.ones((4, 4), bool)
    section = Prepare(background_keep=share)
    wanted = SimpleNamespace(ignore_index=IGNORE, label_rules={"background": 0})
    fates = [fate_of([16, 0], valid, section, wanted, f"{seed} {n}") for n in range(400)]
    assert abs(fates.count(None) / 400 - share) < 0.13
    assert fate_of([15, 1], valid, section, wanted, str(seed)) is None


@pytest.mark.parametrize("key", ["min_valid", "min_labeled", "background_keep"])
def test_other_filters_are_refused(prepared, key):
    said = refused(prepared.changed(**{key: 0.5}))
    assert "this cache was made with filters" in said
    assert "(prepare.min_valid, min_labeled, background_keep, resources.seed)" in said


# Other settings of the data


@pytest.mark.parametrize(
    ("dataset", "said"),
    [
        ({"labels": {"erode_borders": 2}}, "(dataset.classes and dataset.labels)"),
        ({"labels": {"unlisted": "ignore"}}, "(dataset.classes and dataset.labels)"),
        ({"labels": {"nodata": 1.0}}, "(dataset.classes and dataset.labels)"),
        ({"classes": [{"name": f"class {n}", "values": [2 - n]} for n in range(3)]},
         "(dataset.classes and dataset.labels)"),
        ({"ignore_index": 9}, "ignore_index 255, this run has 9"),
        ({"bands": [3, 2, 1]}, "bands [1, 2, 3], this run has [3, 2, 1]"),
        ({"input_range": [0.0, 100.0]}, "(dataset.input_range)"),
        ({"nodata": 0.0}, "nodata None, this run has 0.0 (dataset.nodata)"),
        ({"gsd": 1.0}, "gsd None, this run has 1.0 (dataset.gsd)"),
    ],
)  # fmt: skip
def test_changed_rules_for_pixels_or_labels_are_refused(prepared, dataset, said):
    assert said in refused(prepared.with_dataset(**dataset))


def test_other_names_and_colors_of_the_same_classes_are_not_refused(prepared):
    names = [{"name": name, "color": "#112233"} for name in ("field", "wood", "water")]
    assert "0 tiles made, 13 reused" in prepared.with_dataset(classes=names).prepare()


def test_a_second_label_file_or_another_order_makes_its_scene_again(prepared, tmp_path, rng):
    more = prepared.write_tiff(
        "more.tif", rng.integers(0, 3, (30, 30), dtype=np.uint8), transform=PLACE
    )
    paths = (prepared.config.prepare.label_path, more)
    for number, order in enumerate((paths, paths[::-1])):
        changed = prepared.changed(label_path=order)
        assert "9 tiles made, 4 reused" in changed.prepare()
        fresh = changed.changed(processed_dir=tmp_path / f"other{number}")
        fresh.prepare()
        assert same_files(changed, fresh)


def test_a_tile_of_another_cache_is_made_again(prepared, tmp_path):
    """One of the same shapes, features and name, but of other pixels."""
    other = prepared.changed(processed_dir=tmp_path / "other").with_dataset(input_range=(0, 99))
    other.prepare()
    before, name = prepared.times(), prepared.tiles()[5]
    whole = tile_path(prepared.cache, name).read_bytes()
    tile_path(prepared.cache, name).write_bytes(tile_path(other.cache, name).read_bytes())
    assert "1 tiles made, 12 reused" in prepared.prepare()
    assert tile_path(prepared.cache, name).read_bytes() == whole
    assert {each for each in before if before[each] != prepared.times()[each]} == {name}


# Whatever goes in


def polygons_over_north(path: Path) -> np.ndarray:
    """Write GeoJSON in degrees with texts; the whole-scene burn of it as class ids."""
    shapes = [(5, 5, 40, 60, "wood"), (30, 20, 66, 70, "Forêt"), (50, 60, 60, 85, "255")]
    ids = {"wood": 1, "Forêt": 1, "255": IGNORE}
    features, burnt = [], []
    for top, left, bottom, right, kind in shapes:
        polygon = box(*(PLACE @ (left, bottom)), *(PLACE @ (right, top)))
        geometry = transform_geom("EPSG:32633", "EPSG:4326", mapping(polygon))
        features.append(
            {"type": "Feature", "geometry": geometry, "properties": {"kind": kind, "id": 1}}
        )
        burnt.append((polygon, ids[kind]))
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return rasterize(burnt, (70, 90), transform=PLACE, dtype=np.int32)


def whole_label(project: Project, scene: str, height: int, width: int) -> np.ndarray:
    """A scene's label put together from its cached tiles; -1 where no tile has a say."""
    whole = np.full((height, width), -1, np.int32)
    for tile in tiles(height, width, SIZE):
        path = tile_path(project.cache, f"{scene}__{tile.name}")
        rows, cols = repeated(tile)
        if path.exists():
            label = load_tile(path)["label"].numpy()[rows:, cols:]
            inside = whole[tile.row + rows : tile.row + SIZE, tile.col + cols : tile.col + SIZE]
            inside[:] = label[: inside.shape[0], : inside.shape[1]]
    return whole


def test_polygons_with_texts_become_labels(project, tmp_path):
    (project.config.prepare.raw_images_dir / "south.tif").unlink()
    expected = polygons_over_north(tmp_path / "l.geojson")
    classes = [{"name": "other"}, {"name": "wood", "values": ["wood", "Forêt"]}]
    project = project.with_dataset(classes=classes, labels={"attribute": "kind"})
    project = project.changed(label_path=tmp_path / "l.geojson")
    said = project.prepare()
    assert "9 tiles made" in said
    assert np.array_equal(whole_label(project, "north", 70, 90), expected)
    manifest = read_manifest(project.cache)
    assert manifest.class_names == ["other", "wood"]
    assert project_counts(manifest, "north") == [(expected == 0).sum(), (expected == 1).sum()]
    assert f"other: {(expected == 0).sum() / (expected != IGNORE).sum():.1%}" in said


def test_polygons_come_before_or_after_a_raster_and_borders_are_ignored(project, tmp_path):
    (project.config.prepare.raw_images_dir / "south.tif").unlink()
    burnt = polygons_over_north(tmp_path / "l.geojson")
    raster = np.full((300, 100), 2, np.uint8)
    project.write_tiff("labels.tif", raster, transform=PLACE)
    classes = [{"name": "other", "values": [7]}, {"name": "wood", "values": ["wood", "Forêt"]},
               {"name": "road", "values": [2]}]  # fmt: skip
    labels = {"attribute": "kind", "erode_borders": 1}
    project = project.with_dataset(classes=classes, labels=labels).changed(
        label_path=(tmp_path / "l.geojson", tmp_path / "labels.tif")
    )
    project.prepare()
    merged = np.where(burnt == 0, 2, burnt)
    found = whole_label(project, "north", 70, 90)
    near = np.zeros((70, 90), bool)
    for row, col in np.ndindex(70, 90):
        around = merged[max(0, row - 1) : row + 2, max(0, col - 1) : col + 2]
        near[row, col] = len(set(around[around != IGNORE].tolist())) > 1
    assert near.any()
    assert np.array_equal(found, np.where(near, IGNORE, merged))


def test_unlisted_texts_of_polygons_are_refused_before_anything_is_made(project, tmp_path):
    (project.config.prepare.raw_images_dir / "south.tif").unlink()
    polygons_over_north(tmp_path / "l.geojson")
    classes = [{"name": "other"}, {"name": "wood", "values": ["wood"]}]
    project = project.with_dataset(classes=classes, labels={"attribute": "kind"})
    with pytest.raises(RasterError, match=r'first "Forêt"; polygons per value: .*"wood": 1'):
        project.changed(label_path=tmp_path / "l.geojson").prepare()
    assert not project.cache.exists()


@pytest.mark.parametrize("rgb", [None, (2, 3, 4), (4,)])
def test_four_bands_of_sixteen_bits_reach_head_and_backbone(project, backbone_folder, rng, rgb):
    scenes = {}
    for name, shape, place in (("north", (70, 90), PLACE), ("south", (64, 64), BELOW)):
        scenes[name] = rng.integers(5000, 20000, (5, *shape)).astype(np.uint16)
        scenes[name][:, :4] = 0
        project.write_tiff(f"scenes/{name}.tif", scenes[name], transform=place, nodata=0)
    bands = (4, 3, 2, 1)
    project = project.with_dataset(bands=bands, rgb=rgb)
    section = Model(backbone=str(backbone_folder), layers=[1, 3], num_classes=3)
    backbone = build_backbone(section, describe_backbone(section, bands, rgb))
    project = replace(project, backbone=backbone)
    said = project.prepare()
    assert "13 tiles made" in said
    manifest = read_manifest(project.cache)
    values = np.concatenate([each[:, 4:].reshape(5, -1) for each in scenes.values()], 1)
    expected = np.percentile(values[[3, 2, 1, 0]].astype(float), (1, 99), axis=1).T
    assert np.allclose(manifest.ranges, expected)
    seen = [bands.index(band) for band in rgb or bands[:3]]
    assert manifest.bands == list(bands)
    assert manifest.rgb == (seen * 3 if len(seen) == 1 else seen)
    stored = load_tile(tile_path(project.cache, "north__r000000_c000000"))
    low, high = expected.T[:, :, None, None]
    pixels = scenes["north"][[3, 2, 1, 0], :32, :32]
    image = np.rint(((pixels - low) / (high - low)).clip(0, 1) * 255)
    assert np.abs(stored["image"].numpy() - image).max() <= 1
    assert (stored["label"][:4] == IGNORE).all()
    with torch.inference_mode():
        features = backbone(stored["image"][None])
    for level, own in zip(stored["features"], features, strict=True):
        assert torch.equal(level, own[0].half())


def test_one_band_is_enough(project, backbone_folder, rng):
    for name, shape, place in (("north", (70, 90), PLACE), ("south", (64, 64), BELOW)):
        pixels = rng.normal(0, 1, (1, *shape)).astype(np.float32)
        pixels[0, 3, 3] = np.nan
        project.write_tiff(f"scenes/{name}.tif", pixels, transform=place)
    section = Model(backbone=str(backbone_folder), layers=[1, 3], num_classes=3)
    backbone = build_backbone(section, describe_backbone(section, (1,)))
    project = replace(project, backbone=backbone)
    assert "13 tiles made" in project.prepare()
    manifest = read_manifest(project.cache)
    assert (manifest.bands, manifest.rgb) == ([1], [0, 0, 0])
    stored = load_tile(tile_path(project.cache, "north__r000000_c000000"))
    assert stored["image"].shape == (1, SIZE, SIZE)
    assert stored["label"][3, 3] == IGNORE


def test_scenes_in_nested_folders_patterns_and_lists_are_cached_apart(project, rng, tmp_path):
    pixels = rng.integers(1, 256, (3, 64, 64), dtype=np.uint8)
    project.write_tiff("scenes/2021/south.tif", pixels, transform=BELOW)
    project.prepare()
    assert project.held() == {"north": 9, "south": 4, "2021__south": 4}
    stored = load_tile(tile_path(project.cache, "2021__south__r000000_c000000"))["image"]
    assert np.array_equal(stored, pixels[:, :32, :32])
    folder = tmp_path / "scenes"
    listed = project.changed(
        raw_images_dir=(folder / "n*.tif", folder / "2021"), processed_dir=tmp_path / "other"
    )
    listed.prepare()
    assert listed.held() == {"north": 9, "south": 4}
    none = project.changed(raw_images_dir=(folder / "2021",), label_path=folder)
    with pytest.raises(RasterError, match="2021: holds no raster"):
        none.prepare()


@pytest.mark.parametrize("gsd", [None, 1.0])
def test_a_gsd_shrinks_scenes_and_their_labels(project, gsd, rng):
    project = project.with_dataset(gsd=gsd)
    project.prepare()
    manifest = read_manifest(project.cache)
    factor = 1 if gsd is None else 2
    north = manifest.scenes["north"]
    assert (north["height"], north["width"]) == (70 // factor, 90 // factor)
    assert manifest.gsd == gsd
    assert manifest.ground_gsd == pytest.approx(0.5 * factor, rel=0.01)
    assert sum(project_counts(manifest, "north")) == 70 * 90 // factor**2
    with open_scene(project.config.prepare.raw_images_dir / "north.tif") as scene:
        assert ground_gsd(scene.grid) == pytest.approx(0.5, rel=0.01)


def test_a_truncated_scene_is_named_before_anything_is_made(project):
    path = project.config.prepare.raw_images_dir / "south.tif"
    path.write_bytes(path.read_bytes()[:-200])

    def fail(_):
        raise AssertionError("features computed")

    with pytest.raises(RasterError, match=r"south\.tif: truncated"):
        project.prepare(encode=fail)
    assert not project.cache.exists()


def begun(folder, **changes) -> None:
    folder.mkdir()
    one = {"bands": [1], "rgb": [0] * 3, "image_mean": [0.5], "image_std": [0.25]}
    write_manifest(projects.manifest_of(ranges=[[10.0, 90.0]], **one, **changes), folder)


def test_what_auto_found_once_is_kept_and_numbers_given_are_not(tmp_path):
    begun(tmp_path / "found", auto_range=True)
    begun(tmp_path / "given", auto_range=False)
    assert cached_ranges(begun_in(tmp_path / "found"), (1,)) == ((10.0, 90.0),)
    assert cached_ranges(begun_in(tmp_path / "found"), (2,)) is None
    assert cached_ranges(begun_in(tmp_path / "given"), (1,)) is None
    assert cached_ranges(begun_in(tmp_path), (1,)) is None


def test_a_cache_says_whether_auto_found_its_ranges(prepared):
    assert read_manifest(prepared.cache).auto_range
    section = prepared.config.dataset.model_copy(update={"input_range": (0.0, 255.0)})
    given = replace(prepared, config=prepared.config.model_copy(update={"dataset": section}))
    assert not given.wanted(find_sources(given.config)).auto_range
