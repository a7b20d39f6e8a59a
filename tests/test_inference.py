"""Inference: a map is the best class of the dense mosaic of its tiles; it is whole or absent."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import project
import pytest
import rasterio
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blending import dense_mosaic

import main
from config import TTA, Inference, Model
from models import build_head
from models.backbone import build_backbone, describe_backbone, write_random_backbone
from models.segmenter import Segmenter
from utils.inference import (
    mean_of_views,
    predict_scene,
    predict_scenes,
    views,
    warn_of_gsd,
)
from utils.locks import LockError
from utils.logging import VerbosityLogger
from utils.maps import default_legend
from utils.opening import RasterError
from utils.outputs import Trained
from utils.products import InferenceError, Mosaic
from utils.raster import Reading, open_scene
from utils.scenes import SceneFile, find_scenes
from utils.tiling import stride_of, tiles
from utils.turns import Turn

CPU = torch.device("cpu")
QUIET = VerbosityLogger("error", silent=True)


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


def trained_on(classes, **reading) -> Trained:
    return Trained(default_legend(classes), Reading(**reading), None, {"made": "by a test"})


def predict(section, network, classes, **reading):
    """Map the scene of a section; returns where the map is."""
    file = SceneFile("scene", section.input_tif)
    trained = trained_on(classes, **reading)
    predict_scene(section, file, False, network, trained, CPU, QUIET)
    return section.output_tif


def seen_in(folder):
    """The files of a folder but for the rows that are kept to go on with."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".resume"))


def write_scene(folder, height, width, nodata=None, seed=1):
    image, _ = project.land(height, width, seed)
    return project.write_scene(folder / "scene.tif", image, project.grid(height, width), nodata)


# ---- flips and turns ----

PLAIN, MIRRORED, UPSIDE = Turn(), Turn(hflip=True), Turn(vflip=True)


@pytest.mark.parametrize(
    ("horizontal", "vertical", "wanted"),
    [
        (False, False, [PLAIN]),
        (True, False, [PLAIN, MIRRORED]),
        (False, True, [PLAIN, UPSIDE]),
        (True, True, [PLAIN, MIRRORED, UPSIDE, Turn(hflip=True, vflip=True)]),
    ],
)
def test_views_are_the_flips_that_the_config_asks_for(horizontal, vertical, wanted):
    assert views(TTA(horizontal_flip=horizontal, vertical_flip=vertical)) == wanted


ALL_VIEWS = views(TTA(horizontal_flip=True, vertical_flip=True))


def test_quarter_turns_and_both_flips_are_the_eight_ways_to_lay_a_square():
    everything = views(TTA(horizontal_flip=True, vertical_flip=True, rotate90=True))
    square = torch.arange(9).view(3, 3)
    assert len(everything) == 8
    assert len({tuple(turn.apply(square).flatten().tolist()) for turn in everything}) == 8
    assert len(views(TTA(rotate90=True))) == 4


@pytest.mark.parametrize("most", [1, 2, 3, 7, None])
def test_all_views_of_all_tiles_are_one_batch_in_parts_of_the_size_that_is_asked_for(most):
    sizes = []

    def network(pixels):
        sizes.append(len(pixels))
        return Unlike(16, 2)(pixels)

    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    found = mean_of_views(network, pixels, ALL_VIEWS, most)
    assert torch.allclose(found, mean_of_views(Unlike(16, 2), pixels, ALL_VIEWS), atol=1e-6)
    assert sum(sizes) == 3 * 4
    assert max(sizes) == min(most or 12, 12)


def test_each_turned_view_is_laid_back_before_the_mean():
    def brightness(pixels):  # whatever is done to the tile is done to its answer
        shares = pixels.float()[:, :1] / 255
        return torch.cat([shares, 1 - shares], 1)

    pixels = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    everything = views(TTA(horizontal_flip=True, vertical_flip=True, rotate90=True))
    mean = mean_of_views(brightness, pixels, everything)
    assert torch.allclose(mean, brightness(pixels), atol=1e-6)


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
        predict(section, network, 3)
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
        assert predict(section, network, 3) == section.output_tif
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
    predict(section, network, 3)
    with rasterio.open(section.output_tif) as dataset:
        classes = dataset.read(1)
    assert np.array_equal(classes == 255, (image == 0).all(0))
    assert network.tiles == 4 * 5 - 2 - 3  # two whole tiles at the top left, three at the bottom


def test_a_scene_without_a_valid_pixel_maps_to_nodata_without_a_network(tmp_path):
    image = np.zeros((3, 40, 50), np.uint8)
    project.write_scene(tmp_path / "scene.tif", image, project.grid(40, 50), nodata=0)
    section = section_of(tmp_path, tile_size=32)
    predict(section, None, 3)
    with rasterio.open(section.output_tif) as dataset:
        assert (dataset.read(1) == 255).all()


def test_pixels_behind_an_external_mask_stay_nodata(tmp_path):
    path = write_scene(tmp_path, 50, 60)
    mask = np.full((50, 60), 255, np.uint8)
    mask[10:30, 20:50] = 0
    with rasterio.open(path, "r+") as dataset:
        dataset.write_mask(mask)
    section = section_of(tmp_path, tile_size=32)
    predict(section, Unlike(32, 3), 3)
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
    predict(section_of(tmp_path, tile_size=32), Unlike(32, 3), 3)
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
        predict(section_of(tmp_path, tile_size=32), Unlike(32, 3), 3)
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

    predict(section_of(tmp_path, tile_size=32), last_class, classes)
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
        predict(section, failing, 3)
    assert seen_in(tmp_path) == ["map.tif", "scene.tif"]
    assert (tmp_path / "map.tif").read_bytes() == b"the map of yesterday"


def test_a_signal_half_way_leaves_no_map(tmp_path):
    write_scene(tmp_path, 200, 64)

    def interrupted(pixels):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        predict(section_of(tmp_path, tile_size=32), interrupted, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from test_inference import Unlike, predict, section_of
from utils.maps import MapError
from utils.process import exit_code_of
folder = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    predict(section_of(folder, tile_size=32), Unlike(32, 3), 3)
except (MapError, OSError) as error:
    sys.exit(exit_code_of(error))
"""


def test_a_disk_that_is_full_at_the_last_block_leaves_no_map(tmp_path):
    write_scene(tmp_path, 300, 300)
    command = [sys.executable, "-c", FULL_DISK, tmp_path]
    surroundings = project.surroundings(PYTHONPATH=f"{project.ROOT}:{project.ROOT / 'tests'}")
    result = subprocess.run(command, env=surroundings, capture_output=True, check=False)
    assert seen_in(tmp_path) == ["scene.tif"]
    assert result.returncode == 4


class Killed(BaseException):
    """Ends a run in the middle."""


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("memory", [1024, 0.2])
def test_a_run_that_ended_anywhere_goes_on_and_makes_the_same_map(
    tmp_path, monkeypatch, overlap, batch_size, memory
):
    """Whatever tile it ended at, with strips or without; tiles are predicted once, but for one
    overlap and one batch."""
    monkeypatch.setattr("utils.products.MB", 10**6 * memory / 1024)
    monkeypatch.setattr("utils.inference.most_at_once", lambda device: None)
    write_scene(tmp_path, 200, 600)
    network = Unlike(64, 3)
    keys = {"tile_size": 64, "overlap": overlap, "batch_size": batch_size}
    keys |= {"confidence": tmp_path / "sure.tif"}
    predict(section_of(tmp_path, **keys), network, 3)
    wanted = [(tmp_path / name).read_bytes() for name in ("map.tif", "sure.tif")]
    calls = -(-network.tiles // batch_size)
    for last in range(1, calls + 1, 1 + calls // 5):
        for path in [*tmp_path.glob("map.*"), tmp_path / "sure.tif"]:
            path.unlink()
        left = iter(range(last))

        def ending(pixels, left=left):
            if next(left, None) is None:
                raise Killed
            return network(pixels)

        try:
            predict(section_of(tmp_path, **keys), ending, 3)
        except Killed:
            assert seen_in(tmp_path) == ["scene.tif"]
            predict(section_of(tmp_path, **keys), network, 3)
        found = [(tmp_path / name).read_bytes() for name in ("map.tif", "sure.tif")]
        assert found == wanted
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == ["map.tif", "map.tif.aux.xml", "scene.tif", "sure.tif"]


def end_after(section, network, tiles_seen):
    """Predict until so many tiles went through the network."""

    def ending(pixels):
        if network.tiles >= tiles_seen:
            raise Killed
        return network(pixels)

    with pytest.raises(Killed):
        predict(section, ending, 3)


def test_finished_rows_are_not_predicted_again(tmp_path):
    write_scene(tmp_path, 640, 64)
    section, network = section_of(tmp_path, tile_size=64, overlap=0.0, batch_size=1), Unlike(64, 3)
    end_after(section, network, 7)
    predict(section, network, 3)
    assert network.tiles == 10


@pytest.mark.parametrize("change", ["settings", "scene", "weights", "damage"])
def test_rows_of_another_run_or_damaged_ones_are_made_again(tmp_path, change):
    write_scene(tmp_path, 640, 64)
    keys = {"tile_size": 64, "overlap": 0.0, "batch_size": 1}
    network, section = Unlike(64, 3), section_of(tmp_path, **keys)
    predict(section, network, 3)
    wanted = (tmp_path / "map.tif").read_bytes()
    network.tiles = 0
    end_after(section, network, 7)
    network.tiles = 0
    kept = sorted((tmp_path / ".map.tif.resume").glob("*.rows"))
    trained, again = trained_on(3), 10
    if change == "settings":
        section = section_of(tmp_path, **keys | {"blend": "linear"})
    elif change == "scene":
        write_scene(tmp_path, 640, 64, seed=2)
        write_scene(tmp_path, 640, 64)
    elif change == "weights":
        trained = Trained(default_legend(3), Reading(), None, {"made": "by another"})
    else:
        stored = bytearray(kept[3].read_bytes())
        stored[len(stored) // 2] ^= 1
        kept[3].write_bytes(stored)
        again = 10 - 3
    predict_scene(
        section, SceneFile("scene", section.input_tif), False, network, trained, CPU, QUIET
    )
    assert network.tiles == again
    if change != "weights":  # which the map's tags tell
        assert (tmp_path / "map.tif").read_bytes() == wanted


def test_a_second_run_that_maps_the_same_scene_is_refused_and_spoils_nothing(tmp_path):
    write_scene(tmp_path, 640, 64)
    section, network = section_of(tmp_path, tile_size=64, overlap=0.0, batch_size=1), Unlike(64, 3)
    predict(section, network, 3)
    wanted, refused = (tmp_path / "map.tif").read_bytes(), []

    def meeting_another(pixels):
        with pytest.raises(LockError, match=r"in use by process .*\(inference\.output_tif\)$"):
            predict(section, network, 3)
        refused.append(True)
        return network(pixels)

    predict(section, meeting_another, 3)
    assert refused
    assert (tmp_path / "map.tif").read_bytes() == wanted
    assert not (tmp_path / ".map.tif.resume").exists()


def test_a_scene_that_is_missing_is_named(tmp_path):
    with pytest.raises(RasterError, match=r"scene\.tif: no such file"):
        predict(section_of(tmp_path), None, 3)


@pytest.mark.parametrize(("batch_size", "readers"), [(1, 1), (4, 3), (100, 2)])
def test_the_network_sees_the_tiles_in_order_whatever_the_batch_size_and_readers(
    tmp_path, monkeypatch, batch_size, readers
):
    monkeypatch.setattr("utils.inference.most_at_once", lambda device: None)
    write_scene(tmp_path, 70, 90)
    seen = []

    def network(pixels):
        seen.extend(pixels.clone())
        return torch.full((len(pixels), 2, 32, 32), 0.5)

    section = section_of(tmp_path, tile_size=32, batch_size=batch_size, readers=readers)
    predict(section, network, 2)
    with open_scene(tmp_path / "scene.tif") as scene:
        wanted = [scene.read(tile).image for tile in tiles(70, 90, 32, 0.25)]
    assert len(seen) == len(wanted)
    assert all(np.array_equal(a, b) for a, b in zip(seen, wanted, strict=True))


def test_a_map_in_strips_is_the_map_of_one_piece_byte_for_byte(tmp_path, monkeypatch):
    """Tiles between two strips are predicted for both; every raster is the same."""
    write_scene(tmp_path, 300, 1400)
    network, found = Unlike(64, 3), []
    names = ("map.tif", "shares.tif", "sure.tif")
    for megabytes in (1024, 0.2):
        network.tiles = 0
        monkeypatch.setattr("utils.products.MB", 10**6 * megabytes / 1024)
        section = section_of(
            tmp_path, tile_size=64, overlap=0.3, probabilities=tmp_path / "shares.tif",
            confidence=tmp_path / "sure.tif", output_tif=tmp_path / "map.tif",
        )  # fmt: skip
        predict(section, network, 3)
        found.append(([(tmp_path / name).read_bytes() for name in names], network.tiles))
    (whole, once), (parts, more) = found
    assert whole == parts
    assert once == len(tiles(300, 1400, 64, 0.3)) < more


@pytest.mark.parametrize(("megabytes", "waiting"), [(1024, 2), (0.2, 1)])
def test_no_more_batches_are_held_than_were_counted(tmp_path, monkeypatch, megabytes, waiting):
    """Those that wait, one of them being blended, and the one that is to join them."""
    monkeypatch.setattr("utils.products.MB", 10**6 * megabytes / 1024)
    write_scene(tmp_path, 70, 400)
    network, taken, held = Unlike(64, 3), [], []
    take = Mosaic.take

    def slow(mosaic, strip, prediction):
        time.sleep(0.01)
        take(mosaic, strip, prediction)
        taken.append(prediction.tile)

    def counting(pixels):
        found = network(pixels)
        held.append(network.tiles - len(taken))
        return found

    monkeypatch.setattr(Mosaic, "take", slow)
    predict(section_of(tmp_path, tile_size=64, overlap=0.5, batch_size=1), counting, 3)
    assert max(held) <= waiting + 1


@pytest.mark.parametrize("answer", [float("nan"), float("inf")])
def test_probabilities_that_are_no_numbers_end_the_run_and_name_the_tile(tmp_path, answer):
    write_scene(tmp_path, 70, 90)

    def broken(pixels):
        return torch.full((len(pixels), 2, 32, 32), answer)

    with pytest.raises(InferenceError, match=r"tile r000000_c000000: probabilities are not finite"):
        predict(section_of(tmp_path, tile_size=32), broken, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["scene.tif"]


@settings(max_examples=200)
@given(st.integers(1, 400), st.integers(1, 400), st.sampled_from([16, 32, 64]), st.floats(0, 0.9))
def test_tiles_are_as_many_as_the_law_says(height, width, size, overlap):
    stride = stride_of(size, overlap)
    sides = [1 if n <= size else math.ceil((n - size) / stride) + 1 for n in (height, width)]
    assert len(tiles(height, width, size, overlap)) == sides[0] * sides[1]


# ---- the same features as prepare caches ----


def test_compiled_networks_make_the_cache_and_the_map_of_plain_ones(tmp_path, monkeypatch, capsys):
    """By dynamo alone, without the compiler behind it, which a machine may lack."""
    plain = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: plain(network, backend="eager"))
    found = []
    for name in ("plain", "compiled"):
        config = project.write_project(tmp_path / name, 130, 140, resources={"omp_threads": 1})
        keys = ("train.epochs=1", f"resources.compile={str(name == 'compiled').lower()}")
        assert project.run(config, *keys) == 0
        tile = sorted((tmp_path / name / "cache").glob("*.pt"))[0]
        with rasterio.open(tmp_path / name / "map.tif") as dataset:
            found.append((torch.load(tile)["features"], dataset.read(1)))
    assert torch.equal(found[0][0], found[1][0])
    assert np.array_equal(found[0][1], found[1][1])
    said = capsys.readouterr().err
    assert said.count("compiles as configured; on a CPU that was measured not to pay") == 2



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
    predict(section, Segmenter(backbone, recorder).eval(), 3)
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


# ---- several scenes, several products, another gsd ----


def write_scenes(folder, names):
    for number, name in enumerate(names):
        image, _ = project.land(50, 60, number)
        project.write_scene(folder / f"{name}.tif", image, project.grid(50, 60))
    return find_scenes(folder)[0]


def test_several_scenes_go_to_a_folder_and_finished_ones_are_kept(tmp_path):
    scenes = write_scenes(tmp_path / "in", ["a", "b", "2021/b"])
    section = section_of(tmp_path, output_tif=tmp_path / "out", tile_size=32)
    predict_scenes(section, scenes, Unlike(32, 3), trained_on(3), CPU, QUIET)
    maps = sorted((tmp_path / "out").glob("*.tif"))
    assert [path.name for path in maps] == ["2021__b.tif", "a.tif", "b.tif"]
    finished = [path.stat().st_mtime_ns for path in maps]
    network = Unlike(32, 3)
    predict_scenes(section, scenes, network, trained_on(3), CPU, QUIET)
    assert network.tiles == 0
    assert [path.stat().st_mtime_ns for path in maps] == finished
    other = Trained(default_legend(3), Reading(), None, {"made": "by another checkpoint"})
    predict_scenes(section, scenes, network, other, CPU, QUIET)
    assert network.tiles > 0


def test_polygons_asked_for_later_are_made_for_finished_maps_too(tmp_path):
    scenes = write_scenes(tmp_path / "in", ["a", "b"])
    section = section_of(tmp_path, output_tif=tmp_path / "out", tile_size=32)
    predict_scenes(section, scenes, Unlike(32, 3), trained_on(3), CPU, QUIET)
    section = section.model_copy(update={"polygons": tmp_path / "shapes"})
    predict_scenes(section, scenes, Unlike(32, 3), trained_on(3), CPU, QUIET)
    assert sorted(path.name for path in (tmp_path / "shapes").iterdir()) == ["a.gpkg", "b.gpkg"]


@pytest.mark.parametrize("product", ["output_tif", "confidence", "probabilities"])
def test_no_product_is_written_over_a_scene(tmp_path, product):
    scenes = write_scenes(tmp_path, ["scene"])
    section = section_of(tmp_path, tile_size=32, **{product: tmp_path / "scene.tif"})
    before = scenes[0].path.read_bytes()
    with pytest.raises(InferenceError, match="would be written over the scene"):
        predict_scenes(section, scenes, Unlike(32, 3), trained_on(3), CPU, QUIET)
    assert scenes[0].path.read_bytes() == before


def test_two_products_never_share_a_file(tmp_path):
    scenes = write_scenes(tmp_path, ["scene"])
    section = section_of(tmp_path, tile_size=32, confidence=tmp_path / "map.tif")
    with pytest.raises(InferenceError, match="another output"):
        predict_scenes(section, scenes, Unlike(32, 3), trained_on(3), CPU, QUIET)


def test_several_scenes_do_not_go_into_a_file(tmp_path):
    scenes = write_scenes(tmp_path / "in", ["a", "b"])
    (tmp_path / "map.tif").write_bytes(b"a map")
    section = section_of(tmp_path, tile_size=32)
    with pytest.raises(InferenceError, match="several scenes need a folder"):
        predict_scenes(section, scenes, Unlike(32, 3), trained_on(3), CPU, QUIET)


def test_maps_below_the_folder_of_scenes_are_no_scenes(tmp_path):
    write_scenes(tmp_path, ["a", "b", "maps/a"])
    scenes, _ = find_scenes(tmp_path, except_in=[tmp_path / "maps"])
    assert [scene.name for scene in scenes] == ["a", "b"]


def test_at_another_gsd_pixels_without_data_stay_nodata(tmp_path):
    image, _ = project.land(64, 96, seed=1)
    image[:, :, 31] = 0  # one column, half of a pixel at the other gsd
    where = project.grid(64, 96)
    project.write_scene(tmp_path / "scene.tif", image, where, nodata=0)
    predict(section_of(tmp_path, tile_size=32), Unlike(32, 3), 3, gsd=2 * abs(where.transform.a))
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert np.array_equal(dataset.read(1) == 255, (image == 0).all(0))


def test_a_scene_that_cannot_be_read_stops_no_other_and_is_listed(tmp_path):
    scenes = write_scenes(tmp_path / "in", ["a", "b", "c"])
    whole = scenes[1].path.read_bytes()
    scenes[1].path.write_bytes(whole[: len(whole) // 2])
    section = section_of(tmp_path, output_tif=tmp_path / "out", tile_size=32)
    with pytest.raises(InferenceError, match="1 of 3 scenes were not mapped: b"):
        predict_scenes(section, scenes, Unlike(32, 3), trained_on(3), CPU, QUIET)
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tif")) == ["a.tif", "c.tif"]


def test_probabilities_and_confidence_say_what_the_map_was_chosen_by(tmp_path):
    image, _ = project.land(70, 90, seed=1)
    image[:, :10, :10] = 0
    project.write_scene(tmp_path / "scene.tif", image, project.grid(70, 90), nodata=0)
    section = section_of(
        tmp_path, tile_size=32, probabilities=tmp_path / "p.tif", confidence=tmp_path / "c.tif"
    )
    predict(section, Unlike(32, 3), 3)
    classes, shares, winning = (
        rasterio.open(tmp_path / name).read() for name in ("map.tif", "p.tif", "c.tif")
    )
    empty = classes[0] == 255
    assert empty[:10, :10].all() and empty.sum() == 100
    assert shares.shape == (3, 70, 90) and (shares[:, empty] == 255).all()
    assert np.abs(shares[:, ~empty].sum(0).astype(int) - 250).max() <= 2
    assert np.array_equal(shares.max(0)[~empty], winning[0][~empty])
    best = np.sort(shares, 0)
    clear = ~empty & (best[-1] > best[-2])
    assert np.array_equal(shares.argmax(0)[clear], classes[0][clear])


def test_at_another_gsd_the_map_lies_on_the_scenes_own_grid(tmp_path):
    image, classes = project.land(64, 96, seed=1)
    where = project.grid(64, 96)
    project.write_scene(tmp_path / "scene.tif", image, where)

    def brightest(pixels):
        return torch.nn.functional.one_hot(pixels.argmax(1), 3).movedim(-1, 1).float()

    section = section_of(tmp_path, tile_size=32)
    gsd = 2 * abs(where.transform.a)
    predict(section, brightest, 3, gsd=gsd)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        found = dataset.read(1)
        assert (dataset.shape, dataset.transform) == ((64, 96), where.transform)
    blocks = image.reshape(3, 32, 2, 48, 2).astype(float).mean((2, 4))
    wanted = np.repeat(np.repeat(np.rint(blocks).argmax(0), 2, 0), 2, 1)
    assert np.mean(found == wanted) > 0.97  # a mean may round the other way
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".tif", ".tif", ".xml"]


def test_polygons_come_with_the_map(tmp_path):
    write_scene(tmp_path, 50, 60)
    section = section_of(tmp_path, tile_size=32, polygons=tmp_path / "map.geojson")
    predict(section, Unlike(32, 3), 3)
    features = json.loads((tmp_path / "map.geojson").read_text())["features"]
    assert {feature["properties"]["class_id"] for feature in features} <= {0, 1, 2}
    assert features


@pytest.mark.parametrize(("trained", "told"), [(0.5, False), (0.4, False), (0.25, True), (1, True)])
def test_pixels_of_another_size_than_trained_on_are_told(tmp_path, capsys, trained, told):
    write_scene(tmp_path, 40, 50)
    log = VerbosityLogger("info", timestamps=False)
    known = Trained(default_legend(3), Reading(), trained, {})
    with open_scene(tmp_path / "scene.tif") as scene:
        warn_of_gsd(scene, known, log)
    said = capsys.readouterr().err
    assert ("[WARNING]" in said and "0.5 m per pixel" in said and f"{trained:g}" in said) == told
