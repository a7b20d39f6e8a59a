"""Inference: a blend is the dense mosaic of its tiles in float64; a map is whole or absent."""

import subprocess
import sys

import numpy as np
import project
import pytest
import rasterio
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import main
from config import TTA, Inference, Model
from models import build_head
from models.backbone import build_backbone, describe_backbone, write_random_backbone
from models.segmenter import Segmenter
from utils.inference import (
    Blend,
    axis_weights,
    hann,
    mean_of_views,
    predict_scene,
    predict_tiles,
    views,
)
from utils.logging import VerbosityLogger
from utils.raster import RasterError, open_scene
from utils.tiling import Tile, origins, stride_of, tiles

CPU = torch.device("cpu")
QUIET = VerbosityLogger("error", silent=True)
OVERLAPS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.97)

sides = st.integers(1, 75)
sizes = st.sampled_from([8, 16, 32])
overlaps = st.sampled_from(OVERLAPS)


class Probabilities(Blend):
    """A blend that keeps the probabilities of the rows that leave it."""

    def __init__(self, *arguments) -> None:
        super().__init__(*arguments)
        self.gone = []

    def finish(self, row: int) -> np.ndarray:
        count = min(row, self.height) - self.top
        self.gone.append(self._sums[:, :count, : self.width].clone())
        return super().finish(row)


class Unlike(torch.nn.Module):
    """Probabilities that depend on a pixel's colour and on its place in the tile."""

    def __init__(self, size: int, num_classes: int, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.place = 3 * torch.randn(num_classes, size, size, generator=generator)
        self.colour = torch.randn(num_classes, 3, generator=generator)
        self.tiles = 0

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        self.tiles += len(pixels)
        seen = torch.einsum("kc,bchw->bkhw", self.colour, pixels.float() / 64)
        return (seen + self.place).softmax(1)


def section_of(folder, **keys) -> Inference:
    keys = {"input_tif": folder / "scene.tif", "output_tif": folder / "map.tif"} | keys
    return Inference(enable=True, **keys)


def dense_mosaic(probabilities, height, width, size, overlap):
    """Σ w·p / Σ w over tiles, in float64 and without tricks; probabilities by (row, col)."""
    stride = stride_of(size, overlap)
    classes = len(next(iter(probabilities.values())))
    sums = np.zeros((classes, max(height, size), max(width, size)))
    weights = np.zeros(sums.shape[1:])
    line = np.sin(np.pi * (np.arange(size) + 0.5) / size) ** 2
    window = np.outer(line, line)
    for row in origins(height, size, stride):
        for col in origins(width, size, stride):
            place = np.s_[row : row + size, col : col + size]
            sums[:, *place] += window * probabilities[row, col]
            weights[place] += window
    return (sums / weights)[:, :height, :width]


def fed(blend, found, valid=None):
    """The class rows that a blend gives for tiles' probabilities by (row, col)."""
    size = blend._sums.shape[1]
    rows = []
    for (row, col), part in found.items():
        mask = np.ones((size, size), bool) if valid is None else valid[row, col]
        rows.append(blend.feed(Tile(row, col, size, size), part, mask))
    return np.concatenate([*rows, blend.finish(blend.height)])


def random_tiles(height, width, size, overlap, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    plan = tiles(height, width, size, overlap)
    shape = (classes, size, size)
    return {(t.row, t.col): (3 * torch.randn(shape, generator=generator)).softmax(0) for t in plan}


def write_scene(folder, height, width, nodata=None, seed=1):
    image, _ = project.land(height, width, seed)
    return project.write_scene(folder / "scene.tif", image, project.grid(height, width), nodata)


# ---- blending ----


@settings(max_examples=80, deadline=None)
@given(sides, sides, sizes, overlaps, st.integers(2, 4), st.integers(0, 9))
@example(height=3, width=70, size=32, overlap=0.5, classes=2, seed=0)  # lower than a tile
@example(height=70, width=3, size=32, overlap=0.5, classes=2, seed=0)  # narrower than a tile
@example(height=1, width=1, size=8, overlap=0.9, classes=3, seed=0)
@example(height=64, width=64, size=32, overlap=0.97, classes=3, seed=0)
@example(height=33, width=65, size=32, overlap=0.0, classes=2, seed=0)
def test_a_blend_is_the_dense_mosaic_of_the_same_probabilities(
    height, width, size, overlap, classes, seed
):
    found = random_tiles(height, width, size, overlap, classes, seed)
    wanted = dense_mosaic(
        {place: part.double().numpy() for place, part in found.items()},
        height, width, size, overlap,
    )  # fmt: skip
    blend = Probabilities(height, width, size, overlap, classes, CPU)
    rows = fed(blend, found)
    probabilities = torch.cat(blend.gone, dim=1).numpy()
    assert np.abs(probabilities - wanted).max() < 1e-5
    assert rows.shape == (height, width)
    best = np.sort(wanted, axis=0)
    clear = best[-1] - best[-2] > 2e-5
    assert (rows == wanted.argmax(0))[clear].all()


@settings(max_examples=40, deadline=None)
@given(sides, sides, sizes, overlaps)
def test_constants_blend_to_constants(height, width, size, overlap):
    constant = torch.tensor([0.2, 0.5, 0.3])[:, None, None].expand(3, size, size)
    found = {(tile.row, tile.col): constant for tile in tiles(height, width, size, overlap)}
    blend = Probabilities(height, width, size, overlap, 3, CPU)
    assert (fed(blend, found) == 1).all()
    probabilities = torch.cat(blend.gone, dim=1)
    assert (probabilities - constant[:, :1, :1]).abs().max() < 1e-5


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.sampled_from([16, 64, 512]), st.floats(0, 0.999))
def test_weights_are_never_zero_and_add_up_to_one_at_each_pixel(length, size, overlap):
    weights = axis_weights(length, size, stride_of(size, overlap))
    total = torch.zeros(max(length, size), dtype=torch.float64)
    for start, weight in weights.items():
        assert weight.min() > 0
        total[start : start + size] += weight
    assert (total - 1).abs().max() < 1e-5


def test_the_window_is_symmetric_and_positive_even_in_the_corner_of_a_big_tile():
    window = hann(512).float()
    assert torch.equal(window, window.flip(0))
    assert window[0] ** 2 > 0


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_a_blend_takes_no_more_memory_for_a_higher_scene(overlap):
    def held(height):
        blend = Blend(height, 100, 32, overlap, 4, CPU)
        for tile in tiles(height, 100, 32, overlap):
            if tile.row > 4 * 32:
                break
            blend.feed(tile, torch.full((4, 32, 32), 0.25), np.ones((32, 32), bool))
        return blend._sums.numel(), blend._valid.size

    assert held(200) == held(20_000) == (4 * 32 * 100, 32 * 100)


def test_rows_leave_as_soon_as_no_later_tile_reaches_them():
    blend = Blend(height=100, width=40, size=32, overlap=0.5, num_classes=2, device=CPU)
    half = torch.full((2, 32, 32), 0.5)
    counts = {}
    for tile in tiles(100, 40, 32, 0.5):
        rows = blend.feed(tile, half, np.ones((32, 32), bool))
        counts[tile.row] = counts.get(tile.row, 0) + len(rows)
    assert counts == {0: 0, 16: 16, 32: 16, 48: 16, 64: 16, 68: 4}
    assert len(blend.finish(100)) == 32


@settings(max_examples=30, deadline=None)
@given(sides, sides, overlaps, st.integers(0, 9))
def test_only_pixels_that_are_valid_somewhere_get_a_class(height, width, overlap, seed):
    size = 16
    mask = np.random.default_rng(seed).random((max(height, size), max(width, size))) < 0.3
    found = random_tiles(height, width, size, overlap, 3, seed)
    valid = {(r, c): mask[r : r + size, c : c + size] for r, c in found}
    found = {place: part if valid[place].any() else None for place, part in found.items()}
    rows = fed(Blend(height, width, size, overlap, 3, CPU), found, valid)
    assert np.array_equal(rows != 255, mask[:height, :width])


# ---- flips ----


@pytest.mark.parametrize(
    ("horizontal", "vertical", "wanted"),
    [
        (False, False, [()]),
        (True, False, [(), (-1,)]),
        (False, True, [(), (-2,)]),
        (True, True, [(), (-1,), (-2,), (-2, -1)]),
    ],
)
def test_views_are_the_flips_that_the_config_asks_for(horizontal, vertical, wanted):
    assert views(TTA(horizontal_flip=horizontal, vertical_flip=vertical)) == wanted


ALL_VIEWS = views(TTA(horizontal_flip=True, vertical_flip=True))


def test_flips_change_nothing_for_a_network_that_does_not_care_about_them():
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)

    def equivariant(image):
        return image.float().cumsum(1).softmax(1)

    assert torch.allclose(mean_of_views(equivariant, pixels, ALL_VIEWS), equivariant(pixels))


def test_each_view_is_flipped_back_before_the_mean():
    network = Unlike(16, num_classes=2)
    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    wanted = torch.stack(
        [
            network(pixels),
            network(pixels.flip(-1)).flip(-1),
            network(pixels.flip(-2)).flip(-2),
            network(pixels.flip(-1).flip(-2)).flip(-2).flip(-1),
        ]
    ).mean(0)
    mean = mean_of_views(network, pixels, ALL_VIEWS)
    assert torch.allclose(mean, wanted, atol=1e-6)
    assert torch.allclose(mean.sum(1), torch.ones(2, 16, 16))


def test_a_map_with_all_flips_is_the_flip_of_the_flipped_scenes_map(tmp_path):
    image, _ = project.land(64, 96, seed=3)
    network = Unlike(32, num_classes=3)
    maps = []
    for name, pixels in (("plain", image), ("mirrored", image[:, :, ::-1])):
        project.write_scene(tmp_path / name / "scene.tif", pixels, project.grid(64, 96))
        tta = TTA(horizontal_flip=True, vertical_flip=True)
        section = section_of(tmp_path / name, tile_size=32, overlap=0.5, tta=tta)
        predict_scene(section, network, 3, CPU, QUIET)
        with rasterio.open(section.output_tif) as dataset:
            maps.append(dataset.read(1))
    assert np.array_equal(maps[0], maps[1][:, ::-1])


# ---- scenes ----


@pytest.mark.parametrize(
    ("height", "width"), [(70, 90), (64, 32), (20, 75), (75, 20), (9, 5), (1, 1)]
)
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.9])
def test_a_map_is_the_best_class_of_the_dense_mosaic_for_any_batch_size(
    tmp_path, height, width, overlap
):
    write_scene(tmp_path, height, width)
    network = Unlike(32, num_classes=3)
    with open_scene(tmp_path / "scene.tif") as scene:
        plan = tiles(height, width, 32, overlap)
        found = {
            (t.row, t.col): network(torch.from_numpy(scene.read(t).image)[None])[0].double().numpy()
            for t in plan
        }
    wanted = dense_mosaic(found, height, width, 32, overlap)
    best = np.sort(wanted, axis=0)
    clear = best[-1] - best[-2] > 2e-5
    maps = []
    for batch_size in (1, 3, 64):
        section = section_of(tmp_path, tile_size=32, overlap=overlap, batch_size=batch_size)
        assert predict_scene(section, network, 3, CPU, QUIET) == section.output_tif
        with rasterio.open(section.output_tif) as dataset:
            maps.append(dataset.read(1))
    assert (maps[0] == wanted.argmax(0))[clear].all()
    for other in maps[1:]:
        assert np.array_equal(maps[0][clear], other[clear])


def test_nodata_pixels_stay_nodata_and_empty_tiles_never_reach_the_network(tmp_path):
    image, _ = project.land(128, 160, seed=2)
    image[:, :70, :40] = 0
    image[:, 96:, 64:] = 0
    project.write_scene(tmp_path / "scene.tif", image, project.grid(128, 160), nodata=0)
    network = Unlike(32, num_classes=3)
    section = section_of(tmp_path, tile_size=32, overlap=0.0, batch_size=3)
    predict_scene(section, network, 3, CPU, QUIET)
    with rasterio.open(section.output_tif) as dataset:
        classes = dataset.read(1)
    assert np.array_equal(classes == 255, (image == 0).all(0))
    assert network.tiles == 4 * 5 - 2 - 3  # two whole tiles at the top left, three at the bottom


def test_a_scene_without_a_valid_pixel_maps_to_nodata_without_a_network(tmp_path):
    image = np.zeros((3, 40, 50), np.uint8)
    project.write_scene(tmp_path / "scene.tif", image, project.grid(40, 50), nodata=0)
    section = section_of(tmp_path, tile_size=32)
    predict_scene(section, None, 3, CPU, QUIET)
    with rasterio.open(section.output_tif) as dataset:
        assert (dataset.read(1) == 255).all()


def test_pixels_behind_an_external_mask_stay_nodata(tmp_path):
    path = write_scene(tmp_path, 50, 60)
    mask = np.full((50, 60), 255, np.uint8)
    mask[10:30, 20:50] = 0
    with rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    section = section_of(tmp_path, tile_size=32)
    predict_scene(section, Unlike(32, 3), 3, CPU, QUIET)
    with rasterio.open(section.output_tif) as dataset:
        assert np.array_equal(dataset.read(1) == 255, mask == 0)


def test_a_map_has_its_own_profile_and_the_scenes_place(tmp_path):
    image, _ = project.land(70, 90, seed=1)
    where = project.grid(70, 90, crs="EPSG:3857", gsd=0.3)
    path = tmp_path / "scene.tif"
    profile = {"driver": "GTiff", "count": 3, "height": 70, "width": 90, "dtype": "uint8"}
    profile |= {"compress": "jpeg", "interleave": "pixel", "nodata": 0}
    with rasterio.open(path, "w", crs=where.crs, transform=where.transform, **profile) as dataset:
        dataset.write(image)
    predict_scene(section_of(tmp_path, tile_size=32), Unlike(32, 3), 3, CPU, QUIET)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert (dataset.crs, dataset.transform) == (where.crs, where.transform)
        assert (dataset.count, dataset.height, dataset.width) == (1, 70, 90)
        assert (dataset.dtypes, dataset.nodata) == (("uint8",), 255)
        assert dataset.profile["tiled"] and dataset.profile["compress"] == "deflate"
        assert dataset.block_shapes == [(512, 512)]


def test_a_scene_without_a_place_gives_a_map_without_one(tmp_path):
    image, _ = project.land(40, 50, seed=1)
    profile = {"driver": "GTiff", "count": 3, "height": 40, "width": 50, "dtype": "uint8"}
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning):
        with rasterio.open(tmp_path / "scene.tif", "w", **profile) as dataset:
            dataset.write(image)
        predict_scene(section_of(tmp_path, tile_size=32), Unlike(32, 3), 3, CPU, QUIET)
        with rasterio.open(tmp_path / "map.tif") as dataset:
            assert dataset.crs is None


@pytest.mark.parametrize(
    ("classes", "dtype", "nodata"), [(254, "uint8", 255), (300, "uint16", 65535)]
)
def test_maps_of_more_than_254_classes_have_16_bits(tmp_path, classes, dtype, nodata):
    image, _ = project.land(40, 50, seed=1)
    image[:, :8] = 0
    project.write_scene(tmp_path / "scene.tif", image, project.grid(40, 50), nodata=0)

    def last_class(pixels):
        return torch.eye(classes)[-1][None, :, None, None].expand(len(pixels), -1, 32, 32)

    predict_scene(section_of(tmp_path, tile_size=32), last_class, classes, CPU, QUIET)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert (dataset.dtypes, dataset.nodata) == ((dtype,), nodata)
        assert (dataset.read(1)[:8] == nodata).all()
        assert (dataset.read(1)[8:] == classes - 1).all()


def test_a_failure_half_way_leaves_the_old_map_and_no_other_file(tmp_path):
    write_scene(tmp_path, 200, 64)
    (tmp_path / "map.tif").write_bytes(b"the map of yesterday")
    network, calls = Unlike(32, 3), []

    def failing(pixels):
        calls.append(len(pixels))
        if len(calls) == 5:
            raise MemoryError
        return network(pixels)

    with pytest.raises(MemoryError):
        section = section_of(tmp_path, tile_size=32, batch_size=2, overlap=0.0)
        predict_scene(section, failing, 3, CPU, QUIET)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["map.tif", "scene.tif"]
    assert (tmp_path / "map.tif").read_bytes() == b"the map of yesterday"


def test_a_signal_half_way_leaves_no_map(tmp_path):
    write_scene(tmp_path, 200, 64)

    def interrupted(pixels):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict_scene(section_of(tmp_path, tile_size=32), interrupted, 3, CPU, QUIET)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from test_inference import CPU, QUIET, Unlike, predict_scene, section_of
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    predict_scene(section_of(folder, tile_size=32), Unlike(32, 3), 3, CPU, QUIET)
except OSError as error:
    sys.exit(4)
"""


def test_a_disk_that_is_full_at_the_last_block_leaves_no_map(tmp_path):
    write_scene(tmp_path, 300, 300)
    command = [sys.executable, "-c", FULL_DISK, tmp_path]
    surroundings = project.surroundings(PYTHONPATH=f"{project.ROOT}:{project.ROOT / 'tests'}")
    result = subprocess.run(command, env=surroundings, capture_output=True, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]
    assert result.returncode == 4


def test_a_scene_that_is_missing_is_named(tmp_path):
    with pytest.raises(RasterError, match=r"scene\.tif: no such file"):
        predict_scene(section_of(tmp_path), None, 3, CPU, QUIET)


def test_tiles_keep_their_order_whatever_the_batch_size(tmp_path):
    write_scene(tmp_path, 70, 90)
    plan = tiles(70, 90, 32, 0.25)
    with open_scene(tmp_path / "scene.tif") as scene:
        for batch_size in (1, 4, 100):
            found = predict_tiles(scene, plan, Unlike(32, 2), batch_size, CPU)
            assert [each.tile for each in found] == plan


# ---- the same features as prepare caches ----


class Recorder(torch.nn.Module):
    """A head's place in a Segmenter: keeps what it is given."""

    def __init__(self, head) -> None:
        super().__init__()
        self.head, self.seen = head, []

    def forward(self, image, features):
        self.seen += [[level[n] for level in features] for n in range(len(image))]
        return self.head(image, features)


def test_features_at_inference_are_those_that_prepare_caches_bit_for_bit(tmp_path):
    config_path = project.write_project(tmp_path / "one", height=100, width=150, nodata=None)
    off = ("verify.enable=false", "train.enable=false", "inference.enable=false")
    assert project.run(config_path, *off, "prepare.batch_size=3") == 0
    config = main.load_config(config_path)
    backbone = build_backbone(config.model, describe_backbone(config.model))
    recorder = Recorder(build_head("linear", 32, 4, 3))
    scene = tmp_path / "one" / "scenes" / "north.tif"
    section = section_of(
        tmp_path, input_tif=scene, tile_size=project.TILE, overlap=0.0, batch_size=3
    )
    predict_scene(section, Segmenter(backbone, recorder).eval(), 3, CPU, QUIET)
    plan = tiles(100, 150, project.TILE)
    assert len(recorder.seen) == len(plan) == 6
    for tile, features in zip(plan, recorder.seen, strict=True):
        cached = torch.load(tmp_path / "one" / "cache" / f"north__{tile.name}.pt")
        assert len(cached["features"]) == len(features) == 4
        for ours, theirs in zip(features, cached["features"], strict=True):
            assert ours.dtype == theirs.dtype == torch.float16
            assert torch.equal(ours, theirs)


def test_a_segmenter_gives_the_heads_probabilities_in_float32(tmp_path):
    write_random_backbone(tmp_path / "backbone", seed=0, **project.BACKBONE)
    section = Model(backbone=str(tmp_path / "backbone"), num_classes=3)
    backbone = build_backbone(section, describe_backbone(section))
    head = build_head("unet", 32, 4, 3)
    segmenter = Segmenter(backbone, head).eval()
    pixels = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        probabilities = segmenter(pixels)
        wanted = head(backbone.normalize(pixels), backbone(pixels)).logits.softmax(1)
    assert probabilities.dtype == torch.float32
    assert torch.equal(probabilities, wanted)
    assert torch.allclose(probabilities.sum(1), torch.ones(2, 64, 96), atol=1e-6)
