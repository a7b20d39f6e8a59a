"""The kind of cache that auto picks: from what was measured, and by one rank for all."""

import re
import shutil
from types import SimpleNamespace

import project
import pytest
import torch
from project import manifest_of

from config import Train
from utils import pace
from utils.distributed import Runtime
from utils.manifest import read_manifest
from utils.pace import FilePace, Forecast, Pace, forecasts, measure, quicker, settle_cache

CPU = torch.device("cpu")
UNTIL_TRAIN = ("train.enable=false", "inference.enable=false", "dataset.cache=auto")


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch):
    monkeypatch.setattr(pace, "FORWARD", 0.2)
    monkeypatch.setattr(pace, "FILE", 0.02)


@pytest.mark.parametrize(
    ("forward", "load", "epochs", "workers", "wanted"),
    [
        (0.200, 0.002, 30, 0, "features"),  # a CPU
        (0.004, 0.002, 30, 0, "features"),
        (0.004, 0.100, 30, 4, "tiles"),  # a GPU, and features on a slow disk
        (0.200, 0.002, 1, 0, "tiles"),  # one epoch: what is written is read once
        (0.004, 0.006, 30, 0, "tiles"),
        (0.004, 0.006, 30, 4, "features"),  # loaded beside the training
    ],
)
def test_the_quicker_kind_is_picked(forward, load, epochs, workers, wanted):
    found = forecasts(
        Pace(forward, FilePace(0.01, load, 9_000_000), FilePace(0.001, 0.001, 1_000_000)),
        tiles=1000,
        epochs=epochs,
        workers=workers,
    )
    assert quicker(found, free=10**12) == wanted
    assert (found["features"].size, found["tiles"].size) == (9 * 10**9, 10**9)
    assert quicker(found, free=8 * 10**9) == "tiles"


def test_a_forecast_counts_every_forward_write_and_load():
    """As a run would: prepare once, then the epochs."""
    forward, written, loaded = 3.0, (0.5, 0.25), (0.125, 0.0625)
    files = [FilePace(*each, 1) for each in zip(written, loaded, strict=True)]
    spent = {"features": 0.0, "tiles": 0.0}
    for _ in range(7):
        spent["features"] += forward + written[0]
        spent["tiles"] += written[1]
        for _ in range(5):
            spent["features"] += loaded[0]
            spent["tiles"] += loaded[1] + forward
    found = forecasts(Pace(forward, *files), tiles=7, epochs=5)
    assert {kind: each.seconds for kind, each in found.items()} == pytest.approx(spent)


def slow_backbone(seconds: float, channels: int = 8):
    """What takes this long and gives two maps."""

    def forward(pixels):
        pace.time.sleep(seconds)
        cells = pixels.shape[-1] // 16
        return [torch.zeros(len(pixels), channels, cells, cells).half()] * 2

    return forward


def settled(folder, log, backbone=None, run=None, kind="auto", epochs=30):
    made = manifest_of(8, cache=kind)
    backbone = backbone or slow_backbone(0.05)
    section = Train(epochs=epochs, num_workers=0)
    return settle_cache(made, folder, backbone, CPU, 2, 100, section, run or Runtime(), log)


def test_what_is_measured_is_near_the_truth_and_leaves_nothing(tmp_path):
    forward = slow_backbone(0.05)
    found = measure(manifest_of(8), tmp_path, forward, CPU, 4, tiles=100)
    assert 0.025 <= found.forward < 0.04  # two at a time
    assert 0 < found.tiles.write < 0.1
    assert 0 < found.features.load < 0.1
    assert found.features.size - found.tiles.size >= 2 * 8 * 4 * 4 * 2
    assert list(tmp_path.iterdir()) == []


def test_the_call_that_compiles_is_not_timed(tmp_path):
    plain, calls = slow_backbone(0.02), []

    def forward(pixels):
        calls.append(len(pixels))
        pace.time.sleep(0.5 if len(calls) == 1 else 0)
        return plain(pixels)

    found = measure(manifest_of(8), tmp_path, forward, CPU, 1, tiles=100)
    assert 0.02 <= found.forward < 0.1


def test_an_odd_call_does_not_count(monkeypatch):
    spans = iter([0.1, 0.1, 2.0, 0.1, 0.1])
    now = [0.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += next(spans)

    assert pace.seconds_of(work, budget=2.4) == pytest.approx(0.1)
    assert list(spans) == []
    spans = iter([5.0])
    assert pace.seconds_of(work, budget=0.8) == pytest.approx(5.0)


def test_a_cache_that_memory_cannot_hold_is_read_from_the_disk(tmp_path, monkeypatch):
    dropped = []
    monkeypatch.setattr(pace, "forget", dropped.append)
    forward = slow_backbone(0.0)
    measure(manifest_of(8), tmp_path, forward, CPU, 4, tiles=100)
    assert dropped == []
    measure(manifest_of(8), tmp_path, forward, CPU, 4, tiles=10**12)
    assert {path.name for path in dropped} == {"features.pt", "tiles.pt"}


def test_pages_that_are_forgotten_are_read_again_the_same(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 999)
    pace.forget(path)
    assert path.read_bytes() == bytes(range(256)) * 999


def test_numbers_and_choice_are_told(tmp_path, log):
    assert settled(tmp_path / "cache", log).cache == "features"
    first, second, third = log.stream.getvalue().splitlines()
    numbers = re.compile(r"\d+\.\d+")
    assert numbers.sub("N", first) == (
        "[INFO] prepare: measured for a tile: N ms in the backbone, N and N ms to write and load "
        "it with features, N and N ms without"
    )
    assert numbers.sub("N", second) == (
        "[INFO] prepare: 30 epochs of 100 tiles: N tiles/s and N GB with features, N tiles/s and "
        "N GB without; N GB are free"
    )
    assert third == "[INFO] prepare: dataset.cache is features"


def test_features_that_do_not_fit_on_the_disk_are_not_cached(tmp_path, log, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
    assert settled(tmp_path, log).cache == "tiles"


def test_other_ranks_take_the_first_ones_word_and_measure_nothing(tmp_path, log, monkeypatch):
    class Second(Runtime):
        def agree(self, value):
            return "tiles"

    def never(*_):
        raise AssertionError("measured")

    monkeypatch.setattr(pace, "measure", never)
    assert settled(tmp_path, log, run=Second(1, 1, 2)).cache == "tiles"
    for kind in ("features", "tiles"):  # of a cache that was begun
        assert settled(tmp_path, log, kind=kind).cache == kind
    assert log.stream.getvalue() == ""


@pytest.mark.parametrize("kind", ["features", "tiles"])
def test_auto_makes_the_cache_that_it_found_quicker_and_keeps_it(
    tmp_path, capsys, monkeypatch, kind
):
    other = {"features": "tiles", "tiles": "features"}[kind]
    config = project.write_project(tmp_path, train={"epochs": 2})
    for name in (kind, other):
        monkeypatch.setattr(
            pace, "forecasts", lambda *_, name=name: {
                each: Forecast(1.0 + (each != name), 1) for each in ("features", "tiles")
            }
        )  # fmt: skip
        assert project.run(config, *UNTIL_TRAIN) == 0
        assert read_manifest(tmp_path / "cache").cache == kind
    said = capsys.readouterr().err
    assert said.count("measured for a tile") == 1
    assert "0 tiles made" in said
    assert project.run(config, "dataset.cache=auto", "prepare.enable=false") == 0
    assert (tmp_path / "map.tif").is_file()
