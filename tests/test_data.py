"""Verify, samples and loaders: bad tiles go, flips keep places together, epochs are exact."""

import errno
import gc
import json
import random
from collections import Counter
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ground import scene
from hypothesis import given
from hypothesis import strategies as st
from project import manifest_of, write_stamped
from torch import Tensor

from config import Augmentations, Splits, Train
from utils import cache
from utils.artefacts import temporary_of
from utils.cache import load_tile, tile_path
from utils.data import (
    EpochSampler,
    PrecomputedDataset,
    Sample,
    draw_turn,
    load_split,
    uniform_order,
    verify,
)
from utils.distributed import Runtime
from utils.loading import KEPT, Collate, Memory, array_of, make_loaders
from utils.logging import VerbosityLogger
from utils.manifest import CacheError, Manifest, read_manifest, write_manifest
from utils.process import exit_code_of, one_line
from utils.quantize import as_cached, restored
from utils.sampling import balanced_order
from utils.splits import Split, SplitError
from utils.turns import Turn, distinct_turns

SIZE, CELLS, LEVELS = 64, 4, 2
OFF = Augmentations(enable=False)
NAMES = [f"north__r{64 * row:06d}_c{64 * col:06d}" for row in range(3) for col in range(4)]
IDENTITY = scene(192, 256)
COUNTS = [256] * 16  # pixels per class of a placed tile
BANDS = {"bands": [1, 2, 3], "rgb": [0, 1, 2], "ranges": [[0.0, 255.0]] * 3}
CLASSES = {
    "num_classes": 16,
    "class_names": [f"class {number}" for number in range(16)],
    "class_colors": [[number] * 3 for number in range(16)],
}


def placed_tile() -> dict:
    """A tile each of whose numbers tells its place: patch by patch in all three parts."""
    cell = torch.arange(CELLS * CELLS).reshape(CELLS, CELLS)
    pixel = cell.repeat_interleave(16, 0).repeat_interleave(16, 1)
    inside = (torch.arange(SIZE)[:, None] % 16 * 16 + torch.arange(SIZE) % 16).expand(SIZE, SIZE)
    return {
        "image": torch.stack([pixel, inside, inside.flip(0)]).to(torch.uint8),
        "features": [(torch.stack([cell, -cell]) + 100.0 * n).half() for n in range(LEVELS)],
        "label": pixel.to(torch.uint8),
    }


def made_of(**changes) -> Manifest:
    """What the cache of these tests is."""
    tiles = dict.fromkeys(NAMES, COUNTS)
    settings = {"channels": 2, "scenes": {"north": IDENTITY}, "tiles": tiles, "complete": True}
    return manifest_of(**settings | BANDS | CLASSES | changes)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A finished cache of twelve tiles whose numbers tell their places."""
    write_manifest(made_of(), tmp_path)
    for name in NAMES:
        write_stamped(tmp_path, name, **placed_tile())
    return tmp_path


def dataset_of(folder: Path, augmentations: Augmentations | None = None, seed: int = 0):
    return PrecomputedDataset(folder, read_manifest(folder), NAMES, augmentations, seed)


def sample_of(data: PrecomputedDataset, index: int) -> Sample:
    """A tile as a batch of one, without the batch's axis."""
    batch = Collate(255)([data[index]])
    features, scales = ([level[0] for level in part] for part in (batch.features, batch.scales))
    return Sample(batch.image[0], features, batch.label[0], batch.name[0], scales)


# Flips and quarter turns


def turned_of(sample) -> list[Tensor]:
    """What each part of a sample says of where its patches come from, patch by patch."""
    by_features = [level[0] - 100 * number for number, level in enumerate(sample.features)]
    by_sign = [-(level[1] - 100 * number) for number, level in enumerate(sample.features)]
    return [sample.image[0, 8::16, 8::16], sample.label[8::16, 8::16], *by_features, *by_sign]


def test_image_features_and_label_are_turned_alike(folder):
    data = dataset_of(folder, Augmentations(), seed=5)
    for index in range(60):
        sample = sample_of(data, index)
        first, *others = (part.float() for part in turned_of(sample))
        assert all(torch.equal(first, part) for part in others)
        assert torch.equal(sample.image[0], sample.label)
        assert sample.image.is_contiguous()
        assert sample.label.is_contiguous()


def test_all_eight_ways_to_lay_a_tile_occur_and_no_more(folder):
    data = dataset_of(folder, Augmentations())
    labels = [sample_of(data, index).label for index in range(400)]
    seen = [tuple(label[8::16, 8::16].flatten().tolist()) for label in labels]
    assert len(set(seen)) == 8
    assert min(seen.count(way) for way in set(seen)) > 20


def test_turns_within_a_patch_follow_the_patches(folder):
    """The pixels of a patch are turned with it, not only moved along."""
    original = placed_tile()["image"]
    data = dataset_of(folder, Augmentations(), seed=1)
    for index in range(20):
        turn = draw_turn(Augmentations(), 1, *divmod(index, len(NAMES)))
        expected = original.flip(-1) if turn.hflip else original
        expected = expected.flip(-2) if turn.vflip else expected
        for _ in range(turn.quarters):  # once counter-clockwise: columns from the right become rows
            expected = expected.transpose(-2, -1).flip(-2)
        assert torch.equal(sample_of(data, index).image, expected)


@pytest.mark.parametrize(
    ("keys", "ways"),
    [
        ({"enable": False}, 1),
        ({"hflip": False, "vflip": False, "rotate90": False}, 1),
        ({"vflip": False, "rotate90": False}, 2),
        ({"rotate90": False}, 4),
        ({"hflip": False, "vflip": False}, 4),
    ],
)
def test_only_what_is_switched_on_is_drawn(keys, ways):
    settings = Augmentations(**keys)
    assert len({draw_turn(settings, 0, 0, index) for index in range(200)}) == ways


@given(st.integers(0, 99), st.integers(0, 99), st.integers(0, 999))
def test_a_draw_depends_on_seed_epoch_and_tile_only(seed, epoch, index):
    before = draw_turn(Augmentations(), seed, epoch, index)
    random.seed(index)
    assert draw_turn(Augmentations(), seed, epoch, index) == before


def test_draws_differ_between_seeds_epochs_and_tiles():
    settings = Augmentations()
    for vary in (lambda n: (n, 0, 0), lambda n: (0, n, 0), lambda n: (0, 0, n)):
        assert len({draw_turn(settings, *vary(number)) for number in range(100)}) > 8


def test_validation_samples_are_as_cached(folder):
    data, expected = dataset_of(folder), placed_tile()
    for index in range(len(NAMES)):
        sample = sample_of(data, index)
        assert torch.equal(sample.image, expected["image"])
        assert torch.equal(sample.label, expected["label"])
        assert all(map(torch.equal, sample.features, expected["features"]))
        assert sample.name == NAMES[index]


@given(
    st.integers(0, 9),
    st.sampled_from([torch.uint8, torch.int32, torch.float16, torch.bfloat16]),
    st.sampled_from([4, 80, 130]),
    st.booleans(),
)
def test_a_batch_is_its_tensors_turned_one_by_one(seed, dtype, side, channels_last):
    generator = torch.Generator().manual_seed(seed)
    turns = distinct_turns(True, True, True)
    stored = torch.randint(0, 200, (len(turns), 3, side, side), generator=generator).to(dtype)
    if seed % 2:
        stored = stored.contiguous(memory_format=torch.channels_last)
    batch = Collate(255).batch([*stored], turns, channels_last)
    expected = torch.stack([turn.apply(each) for turn, each in zip(turns, stored, strict=True)])
    assert torch.equal(batch, expected)
    assert batch.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


def test_a_batch_keeps_its_memory_as_long_as_anything_looks_at_it():
    memory = Memory()
    first, place = memory.take(64), None
    place, seen = first.data_ptr(), first.view(torch.int16).view(4, 8)[1:]
    del first
    assert memory.take(64).data_ptr() != place
    array = array_of(seen)
    del seen
    assert memory.take(64).data_ptr() != place
    del array
    taken = [memory.take(64) for _ in range(3)]
    assert place in [each.data_ptr() for each in taken]
    assert len({each.data_ptr() for each in taken}) == 3


def test_no_more_memory_is_kept_than_a_few_batches_need():
    memory = Memory()
    for nbytes in range(1, 3 * KEPT):
        memory.take(nbytes)
    assert len(memory.kept) == KEPT


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_that_are_held_are_not_written_over(folder, workers):
    loaders = loaders_of(folder, workers, batch_size=2)
    held = list(loaders.train)
    copies = [(batch.image.clone(), [level.clone() for level in batch.features]) for batch in held]
    loaders.sampler.epoch = 1
    again = list(loaders.train)
    for batch, (image, features) in zip(held, copies, strict=True):
        assert torch.equal(batch.image, image)
        assert all(map(torch.equal, batch.features, features))
    assert not torch.equal(held[0].image, again[0].image)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_of_features_have_the_memory_they_are_cached_in(folder, workers):
    for batch in loaders_of(folder, workers).train:
        for level in batch.features:
            assert level.is_contiguous(memory_format=torch.channels_last)
            assert level.dtype == torch.float16


# Order


def uniform(length: int, seed: int = 3) -> tuple:
    """The order of every tile once."""
    return partial(uniform_order, length, seed), length, length


def balanced(length: int, seed: int = 3) -> tuple:
    """The order of `length` draws from as many tiles, of which one alone shows class 1."""
    counts = torch.tensor([[4096, 0]] * (length - 1) + [[0, 9]])
    return partial(balanced_order, counts, length, seed), length, length


def indices(orders: tuple, epoch: int, rank: int = 0, world: int = 1) -> list[int]:
    """What a rank's sampler gives in an epoch."""
    sampler = EpochSampler(*orders, rank, world)
    sampler.epoch = epoch
    found = list(sampler)
    assert len(found) == len(sampler)
    return found


@pytest.mark.parametrize("orders", [uniform, balanced])
@given(st.integers(1, 60), st.integers(1, 5), st.integers(0, 9), st.integers(1, 7))
def test_the_ranks_steps_together_are_the_steps_of_one_process(orders, length, world, epoch, batch):
    """The same tiles with the same turns, step by step; what fills the last one weighs nothing."""
    orders = orders(length)
    alone = indices(orders, epoch)
    ranks = [indices(orders, epoch, rank, world) for rank in range(world)]
    assert {len(part) for part in ranks} == {-(-length // world)}
    together = [index for step in zip(*ranks, strict=True) for index in step]
    assert together[:length] == alone
    assert all(index < 0 for index in together[length:])  # these weigh nothing
    for start in range(0, len(ranks[0]), batch):
        step = sorted(index for part in ranks for index in part[start : start + batch])
        assert step == sorted(together[start * world : (start + batch) * world])


@pytest.mark.parametrize("length", [1, 7, 9, 31])
def test_two_ranks_turn_the_tiles_of_an_odd_epoch_as_one_process_does(length):
    def turns(epoch: int, rank: int, world: int) -> list[tuple[int, Turn]]:
        found = [divmod(index, length) for index in indices(uniform(length), epoch, rank, world)]
        return [(place, draw_turn(Augmentations(), 5, visit, place)) for visit, place in found]

    for epoch in range(3):
        first, second = turns(epoch, 0, 2), turns(epoch, 1, 2)
        both = [pair for step in zip(first, second, strict=True) for pair in step]
        assert both[:length] == turns(epoch, 0, 1)


def test_a_tile_that_fills_the_last_step_up_has_no_label(folder):
    data = dataset_of(folder)
    plain, filling = sample_of(data, 0), sample_of(data, -1)
    assert torch.equal(plain.image, filling.image) and plain.name == filling.name
    assert (plain.label != 255).any() and (filling.label == 255).all()


def test_every_tile_is_met_once_in_a_uniform_epoch():
    for epoch in range(3):
        assert sorted(index % 23 for index in indices(uniform(23), epoch)) == list(range(23))


@pytest.mark.parametrize("orders", [uniform, balanced])
def test_epochs_have_other_orders_and_seeds_too(orders):
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        return tuple(index % 20 for index in indices(orders(20, seed), epoch))

    assert len({order(seed, epoch) for seed in range(4) for epoch in range(5)}) == 20
    assert order(2, 3) == order(2, 3)


@pytest.mark.parametrize("orders", [uniform, balanced])
def test_no_two_visits_to_a_tile_share_their_turn_by_number(orders):
    """Neither in an epoch nor in two of them."""
    seen = [index for epoch in range(6) for index in indices(orders(20), epoch)]
    assert len(set(seen)) == len(seen)


def loaders_of(folder: Path, workers: int, run: Runtime | None = None, **keys):
    keys = {"batch_size": 5} | keys
    section = Train(processed_dir=folder, num_workers=workers, **keys)
    split = Split(train=NAMES[:9], val=NAMES[9:])
    manifest = read_manifest(folder)
    return make_loaders(split, manifest, section, Augmentations(), 11, run or Runtime())


def epoch_of(loaders, epoch: int) -> dict[str, Tensor]:
    """The labels of an epoch by name, each tile once."""
    loaders.sampler.epoch = epoch
    labels = {}
    for batch in loaders.train:
        assert batch.image.dtype == torch.uint8
        for name, label in zip(batch.name, batch.label, strict=True):
            assert name not in labels
            labels[name] = label
    return labels


def test_threads_see_each_epoch_as_a_loader_without_them_does(folder):
    alone, workers = loaders_of(folder, 0), loaders_of(folder, 2)
    epochs = []
    for epoch in range(3):
        expected, found = epoch_of(alone, epoch), epoch_of(workers, epoch)
        assert list(found) == list(expected)
        assert sorted(found) == NAMES[:9]
        assert all(torch.equal(found[name], expected[name]) for name in found)
        epochs.append(torch.stack([found[name] for name in sorted(found)]))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


def test_validation_is_every_tile_once_among_the_ranks(folder):
    names = [
        name
        for rank in range(2)
        for batch in loaders_of(folder, 0, Runtime(rank, rank, 2)).val
        for name in batch.name
    ]
    assert sorted(names) == NAMES[9:]


def test_a_rank_without_a_tile_to_validate_has_no_batch(folder):
    assert list(loaders_of(folder, 0, Runtime(7, 7, 8)).val) == []


def make_rare(folder: Path) -> None:
    """Class 1 in the manifest on one training tile, and on two that validate; class 0 on all."""
    tiles = {name: [4096] + [0] * 15 for name in NAMES}
    for name in (NAMES[3], NAMES[9], NAMES[10]):
        tiles[name] = [4000, 96] + [0] * 14
    write_manifest(replace(read_manifest(folder), tiles=tiles), folder)


def drawn_names(loaders, epochs: int) -> list[str]:
    names = []
    for epoch in range(epochs):
        loaders.sampler.epoch = epoch
        names += [name for batch in loaders.train for name in batch.name]
    return names


def test_balanced_loaders_meet_a_rare_class_as_often_as_a_common_one(folder):
    make_rare(folder)
    uniform_names = drawn_names(loaders_of(folder, 0), 8)
    assert Counter(uniform_names) == dict.fromkeys(NAMES[:9], 8)
    names = drawn_names(loaders_of(folder, 0, sampler="balanced"), 8)
    assert len(names) == 8 * 9
    assert set(names) <= set(NAMES[:9])
    assert names.count(NAMES[3]) >= 8 * 9 / 2 - 1
    assert len(set(names)) == 9


def test_ranks_share_a_balanced_epoch(folder):
    make_rare(folder)
    alone = drawn_names(loaders_of(folder, 0, sampler="balanced", batch_size=1), 1)
    ranks = [
        drawn_names(loaders_of(folder, 0, Runtime(rank, rank, 2), sampler="balanced"), 1)
        for rank in range(2)
    ]
    together = [name for step in zip(*ranks, strict=True) for name in step]
    assert together == [*alone, alone[0]]


def test_a_tile_drawn_twice_in_an_epoch_is_turned_anew_each_time(folder):
    make_rare(folder)
    loaders = loaders_of(folder, 0, sampler="balanced")
    ways = set()
    for epoch in range(4):
        loaders.sampler.epoch = epoch
        labels = [
            tuple(label[8::16, 8::16].flatten().tolist())
            for batch in loaders.train
            for name, label in zip(batch.name, batch.label, strict=True)
            if name == NAMES[3]
        ]
        assert len(labels) >= 4
        assert len(set(labels)) > 1
        ways |= set(labels)
    assert len(ways) > 4


def test_samples_have_all_the_bands_that_are_cached(folder):
    of_bands = {"image_mean": [0.5] * 4, "image_std": [0.25] * 4, "ranges": [[0.0, 255.0]] * 4}
    write_manifest(made_of(bands=[3, 2, 1, 4], **of_bands), folder)
    for name in NAMES:
        part = placed_tile()
        infrared = part["label"][None]
        write_stamped(folder, name, **part | {"image": torch.cat([part["image"], infrared])})
    for batch in loaders_of(folder, 0).train:
        assert batch.image.shape[1:] == (4, SIZE, SIZE)
        assert torch.equal(batch.image[:, 3], batch.label)


@pytest.mark.parametrize("workers", [0, 1])
def test_features_in_bytes_come_with_their_scales(folder, workers):
    write_manifest(made_of(feature_dtype="int8"), folder)
    stored = placed_tile()
    for name in NAMES:
        write_stamped(folder, name, **stored | as_cached(stored["features"], "int8"))
    loaders = loaders_of(folder, workers)
    for batch in [*loaders.train, *loaders.val]:
        levels = restored(batch.features, batch.scales)
        assert batch.features[0].dtype == torch.int8
        assert [tuple(each.shape) for each in batch.scales] == [(len(batch.name), 2, 2)] * LEVELS
        for number, level in enumerate(levels):
            cells = batch.label[:, 8::16, 8::16].float()
            assert torch.allclose(level[:, 0].float() - 100 * number, cells, atol=0.1)
            assert torch.allclose(level[:, 1].float() - 100 * number, -cells, atol=0.1)


# Damaged tiles in training


def break_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-900])


def break_gone(path: Path) -> None:
    path.unlink()


def break_empty(path: Path) -> None:
    path.write_bytes(b"")


def break_keys(path: Path) -> None:
    torch.save({"image": torch.zeros(1)}, path)


def break_kind(path: Path) -> None:
    torch.save(torch.zeros(3), path)


def break_shape(path: Path) -> None:
    torch.save(load_tile(path) | {"features": torch.zeros(LEVELS, 2, 4, 2).half()}, path)


def break_type(path: Path) -> None:
    torch.save(load_tile(path) | {"label": torch.zeros(SIZE, SIZE, dtype=torch.int64)}, path)


HARMED = [
    break_cut, break_gone, break_empty, break_keys, break_kind, break_shape, break_type
]  # fmt: skip


def clean_line(folder: Path, workers: int) -> str:
    """What the program says of an epoch that fails, and that its exit code is that of bad data."""
    with pytest.raises(CacheError) as caught:
        epoch_of(loaders_of(folder, workers), 0)
    assert exit_code_of(caught.value) == 3
    return one_line(caught.value)


@pytest.mark.parametrize("harm", HARMED)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_damaged_tile_ends_training_with_one_clean_line(folder, harm):
    path = tile_path(folder, NAMES[4])
    harm(path)
    line = clean_line(folder, workers=0)
    assert line.startswith(f"{path}: missing or damaged (")
    assert line.endswith("run prepare and verify again")
    assert "\n" not in line


def test_a_damaged_tile_in_a_worker_is_told_like_one_in_this_process(folder, monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # to end sooner
    break_cut(tile_path(folder, NAMES[4]))
    line = clean_line(folder, workers=1)
    gc.collect()
    assert line == clean_line(folder, workers=0)


# Splits


def split_of(folder: Path, log: VerbosityLogger, **lists):
    section = Train(processed_dir=folder, val_fraction=0.25)
    return load_split(section, Splits(**lists), 1, Runtime(), log)


def test_a_split_is_made_of_the_cached_tiles(folder, log):
    manifest, split = split_of(folder, log)
    assert manifest.complete
    assert sorted(split.train + split.val) == NAMES
    assert len(split.val) in (2, 4)
    said = log.stream.getvalue()
    shares = ", ".join(f"class {number}: 6.2%" for number in range(16))
    assert f"train: val has {len(split.val)} tiles, class shares {shares}" in said
    assert f"train: train has {12 - len(split.val)} tiles, class shares {shares}" in said
    assert "train: the two sides are 0 m apart, 0 tiles dropped" in said


def test_the_split_is_drawn_as_a_map_beside_the_cache(folder, log):
    _, split = split_of(folder, log)
    drawn = json.loads((folder / "splits.geojson").read_text())
    found = {each["properties"]["tile"]: each["properties"] for each in drawn["features"]}
    assert {name: about["side"] for name, about in found.items()} == split.sides()
    assert all(about["classes"] == COUNTS for about in found.values())


def test_only_the_first_rank_draws_the_map(folder, log):
    section = Train(processed_dir=folder, val_fraction=0.25)
    other = load_split(section, Splits(), 1, Runtime(1, 1, 2), log)
    assert not (folder / "splits.geojson").exists()
    assert other == load_split(section, Splits(), 1, Runtime(0, 0, 2), log)
    assert (folder / "splits.geojson").exists()


def write_regions(path: Path, **parts: tuple[int, int]) -> Path:
    """Regions from column to column of the scene, as GeoJSON in its own CRS, by their side."""
    features = []
    for side, (left, right) in parts.items():
        (west, south), (east, north) = ((412000 + col / 2, y) for col, y in
                                        ((left, 5325000), (right, 5327000)))  # fmt: skip
        ring = [(west, south), (east, south), (east, north), (west, north), (west, south)]
        geometry = {"type": "Polygon", "coordinates": [ring]}
        features.append({"type": "Feature", "properties": {"split": side}, "geometry": geometry})
    crs = {"type": "name", "properties": {"name": "EPSG:32633"}}
    collection = {"type": "FeatureCollection", "crs": crs, "features": features}
    path.write_text(json.dumps(collection))
    return path


def test_regions_decide_where_they_are_given(folder, log, tmp_path_factory):
    regions = tmp_path_factory.mktemp("gis") / "regions.geojson"
    write_regions(regions, train=(-9, 64), val=(64, 128), test=(140, 290))
    _, split = split_of(folder, log, regions=regions)
    columns = [[name for name in NAMES if name.endswith(f"{64 * col:03d}")] for col in range(4)]
    train, val, dropped, test = columns
    assert split == Split(train, val, test, dropped)
    assert "3 tiles train, 3 validate, 3 are for testing; dropped 3 that straddle" in (
        log.stream.getvalue()
    )
    drawn = json.loads((folder / "splits.geojson").read_text())
    sides = Counter(each["properties"]["side"] for each in drawn["features"])
    assert sides == {"train": 3, "val": 3, "test": 3, "dropped": 3}


def test_a_split_whose_sides_share_ground_is_refused(folder, log, tmp_path):
    """Two scenes of the same place, one on each side."""
    names = [*NAMES, *(name.replace("north", "later") for name in NAMES)]
    other = replace(
        read_manifest(folder),
        scenes={"north": IDENTITY, "later": scene(192, 256, left=412010, top=5325990)},
        tiles=dict.fromkeys(names, COUNTS),
    )
    write_manifest(other, folder)
    for name in names[12:]:
        write_stamped(folder, name, **placed_tile())
    (tmp_path / "train.txt").write_text("north")
    (tmp_path / "val.txt").write_text("later")
    lists = {"train_list": tmp_path / "train.txt", "val_list": tmp_path / "val.txt"}
    with pytest.raises(SplitError, match="share ground, such as north__.* and later__"):
        split_of(folder, log, **lists)
    _, split = split_of(folder, log)
    assert split.train
    assert split.val
    assert split.dropped


def test_lists_decide_where_they_are_given(folder, log, tmp_path_factory):
    lists = tmp_path_factory.mktemp("lists")
    (lists / "train.txt").write_text("\n".join(NAMES[:5]))
    (lists / "val.txt").write_text(NAMES[7])
    _, split = split_of(folder, log, train_list=lists / "train.txt", val_list=lists / "val.txt")
    assert split == Split(NAMES[:5], [NAMES[7]])


def test_an_unfinished_or_missing_cache_is_refused(folder, log):
    write_manifest(manifest_of(), folder)
    with pytest.raises(CacheError, match="did not finish"):
        split_of(folder, log)
    with pytest.raises(CacheError, match="run prepare first"):
        split_of(folder / "nowhere", log)


def test_later_epochs_take_tiles_from_where_they_lie_and_unpickle_none(folder, monkeypatch):
    data = dataset_of(folder)
    first = [sample_of(data, index) for index in range(len(NAMES))]
    monkeypatch.setattr(torch, "load", None)
    for index, before in enumerate(first):
        again = sample_of(data, index)
        assert torch.equal(again.image, before.image)
        assert torch.equal(again.label, before.label)
        assert all(map(torch.equal, again.features, before.features))


@pytest.mark.parametrize("harm", HARMED)
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_tile_damaged_between_two_visits_ends_training_with_one_clean_line(folder, harm):
    data, path = dataset_of(folder), tile_path(folder, NAMES[4])
    assert data[4].name == NAMES[4]
    harm(path)
    with pytest.raises(CacheError, match="missing or damaged") as caught:
        data[4]
    assert one_line(caught.value).startswith(f"{path}: missing or damaged (")


def test_a_tile_that_is_made_again_between_two_visits_is_taken_as_it_is_now(folder):
    data, tile = dataset_of(folder), placed_tile()
    assert not (data[4].content["label"] == 3).all()
    write_stamped(folder, NAMES[4], **tile | {"label": torch.full_like(tile["label"], 3)})
    assert (data[4].content["label"] == 3).all()


def test_foreign_tiles_are_left_out_and_missing_ones_end_the_run_in_one_line(folder, log):
    """Training on the rest would come to other weights, and go on to none once they are there."""
    write_stamped(folder, "south__r000000_c000000", **placed_tile())
    _, split = split_of(folder, log)
    assert sorted(split.train + split.val) == NAMES
    for name in NAMES[:2]:
        tile_path(folder, name).unlink()
    with pytest.raises(CacheError, match="2 of 12 tiles are missing.*run prepare again") as caught:
        split_of(folder, log)
    assert NAMES[0] in str(caught.value)
    assert exit_code_of(caught.value) == 3


# Verify


def run_verify(folder: Path, log: VerbosityLogger, workers: int = 1) -> str:
    there = {path.stem for path in folder.glob("*.pt")}
    deleted = verify(folder, workers, Runtime(), log)
    assert sorted(there - {path.stem for path in folder.glob("*.pt")}) == deleted
    return log.stream.getvalue()


def rewrite(change):
    def harm(path: Path) -> None:
        stored = load_tile(path)
        change(stored)
        torch.save(stored, path)

    return harm


def flip_a_bit(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[whole.index(placed_tile()["label"].numpy().tobytes()) + 77] ^= 4
    path.write_bytes(whole)


def plant_code(path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return Path.touch, (path.with_name("ran"),)

    torch.save({**placed_tile(), "image": Evil()}, path)


def take_anothers(path: Path) -> None:
    path.write_bytes(tile_path(path.parent, NAMES[11]).read_bytes())


def expand(stored) -> None:
    stored["image"] = torch.zeros(1, dtype=torch.uint8).expand(stored["image"].shape)


HARMS = {
    "not a whole file": lambda path: path.write_bytes(path.read_bytes()[:-700]),
    "checksum of": flip_a_bit,
    "image is (3, 64, 32)": rewrite(lambda s: s.update(image=s["image"][..., :32].clone())),
    "label is (64, 64) torch.int64": rewrite(lambda s: s.update(label=s["label"].long())),
    "features[1] are not finite": rewrite(lambda s: s["features"][1][0, 0, 0].fill_(torch.nan)),
    "label values outside 0..15": rewrite(lambda s: s["label"][3, 3].fill_(16)),
    "keys are not image, features, label": rewrite(lambda s: s.pop("features")),
    "cannot be loaded": plant_code,
    "of another cache or place": take_anothers,
    "image does not lie in memory": rewrite(expand),
}


@pytest.mark.parametrize("workers", [1, 3])
def test_verify_deletes_exactly_the_bad_tiles_and_says_why(folder, log, workers):
    for name in ("notes.pt", "north__r000001_c000000.pt", ".DS_Store", "zones.txt"):
        (folder / name).write_text("mine")
    (folder / "splits.geojson").write_text("ours")
    temporary_of(folder / "tile.pt").write_text("ours")
    expected = dict(zip(NAMES[1:11], HARMS, strict=True))
    for name, reason in expected.items():
        HARMS[reason](tile_path(folder, name))
    said = run_verify(folder, log, workers)
    left = {path.stem for path in folder.glob("*.pt")}
    assert left == set(NAMES) - set(expected) | {"notes", "north__r000001_c000000"}
    kept = ".DS_Store, north__r000001_c000000.pt, notes.pt, ..."
    assert f"verify: 4 files of other origin are kept: {kept}" in said
    for name, reason in expected.items():
        [line] = [line for line in said.splitlines() if f"{name}.pt" in line]
        assert line.startswith(f"[WARNING] verify: deleted {name}.pt: ")
        assert reason in line
    assert "verify: 12 tiles checked, 10 deleted" in said
    assert not (folder / "ran").exists()


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize(
    "error", [PermissionError(13, "denied"), OSError(5, "I/O error"), MemoryError()]
)
def test_verify_deletes_nothing_for_its_own_trouble(folder, log, monkeypatch, workers, error):
    def refuse(*_, **__):
        raise error

    made = read_manifest(folder)
    with monkeypatch.context() as patched:
        patched.setattr("utils.data.read_manifest", lambda _: made)
        patched.setattr(Path, "open", refuse)
        patched.setattr(Path, "read_bytes", refuse)
        patched.setattr(torch, "load", refuse)
        patched.setattr("utils.artefacts.WAITS", (0, 0))
        with pytest.raises(OSError) as caught:
            run_verify(folder, log, workers)
    assert caught.value.errno == getattr(error, "errno", errno.ENOMEM)
    assert caught.value.filename == str(tile_path(folder, NAMES[0]))
    assert len(list(folder.glob("*.pt"))) == 12


@pytest.mark.parametrize("failing", ["load_tile", "check_layout"])
def test_verify_deletes_nothing_when_memory_runs_out_on_the_way(folder, log, monkeypatch, failing):
    def refuse(*_, **__):
        raise MemoryError

    monkeypatch.setattr(cache, failing, refuse)
    with pytest.raises(MemoryError):
        run_verify(folder, log)
    assert len(list(folder.glob("*.pt"))) == 12


def test_a_worker_that_dies_condemns_no_tile(folder, log, monkeypatch):
    """As the kernel kills one that takes too much memory."""
    monkeypatch.setattr(cache, "load_tile", lambda *_, **__: __import__("os")._exit(9))
    with pytest.raises(BrokenProcessPool) as caught:
        run_verify(folder, log, workers=2)
    assert exit_code_of(caught.value) == 4
    assert len(list(folder.glob("*.pt"))) == 12


def test_nothing_left_is_an_error(folder, log):
    for name in NAMES:
        break_cut(tile_path(folder, name))
    assert "12 tiles checked, 12 deleted" in run_verify(folder, log)
    with pytest.raises(CacheError, match="holds no tile; run prepare again"):
        run_verify(folder, log)


def test_ranks_share_the_tiles_to_verify(folder, log):
    class Alone(Runtime):
        def wait(self):
            pass

        def gather(self, value):
            return [value]

    for rank in range(2):
        verify(folder, 1, Alone(rank, rank, 2), log)
    assert log.stream.getvalue().count("6 tiles checked, 0 deleted") == 2


def test_tiles_of_a_removed_scene_are_neither_verified_nor_trained_on(folder, log):
    made = manifest_of(channels=2, num_classes=16, scenes={"south": IDENTITY}, complete=True)
    write_manifest(made, folder)
    break_cut(tile_path(folder, NAMES[0]))
    write_stamped(folder, "south__r000000_c000000", **placed_tile())
    assert "1 tiles checked, 0 deleted" in run_verify(folder, log)
    assert len(list(folder.glob("*.pt"))) == 13
