"""The benchmarks answer, their scenes are what they say, and limits are judged right; no timing."""

import doctest
import importlib
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import rasterio
import torch

from benchmarks import gpu, head, meter, workload
from benchmarks.__main__ import main, scripts
from benchmarks.inference import windows
from benchmarks.memory import shape
from benchmarks.rows import Row, furthest, print_table, report
from benchmarks.scenes import DEGREES, UTM, write_labels, write_scene
from utils.cache import tile_names
from utils.grids import overlap
from utils.opening import grid_of
from utils.tiling import tiles

FOLDER = Path(meter.__file__).parent
MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with a tiny backbone, in batches of two."""
    small = {"batch_size": 2}
    model = {"head": "linear"}
    return workload.write_project(tmp_path, "tiny", model=model, prepare=small, inference=small)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_hold(name):
    assert doctest.testmod(importlib.import_module(f"benchmarks.{name}")).failed == 0


@pytest.mark.parametrize("name", [*scripts(), "gpu", "__main__"])
def test_a_script_says_what_it_measures(name, capsys):
    script = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit, match="0"):
        script.main(["--help"])
    assert script.__doc__.partition("\n")[0] in capsys.readouterr().out


def test_an_unknown_script_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])
    assert "no such script: nothing" in capsys.readouterr().err


@pytest.mark.parametrize(("measured", "code"), [(1.0, 0), (3.0, 1)])
def test_all_scripts_end_in_one_table_and_each_tells_the_pace(monkeypatch, capsys, measured, code):
    paces = iter([1.0, 1.5, 2.0, 2.5])
    monkeypatch.setattr("benchmarks.__main__.pace_of_machine", lambda: next(paces))
    monkeypatch.setattr("benchmarks.__main__.apart", lambda *_: [Row("a", measured, 2.0)])
    assert main(["head", "muon"]) == code
    head_line, muon_line, *_, last = capsys.readouterr().out.splitlines()
    assert head_line.startswith("head: measured in 0.0")
    assert "1.00 ms before it, 1.50 after" in head_line
    assert "2.00 ms before it, 2.50 after" in muon_line
    assert last == f"{2 - 2 * code} of 2 within"


def test_the_growth_of_pace_is_a_ratio_of_medians(monkeypatch):
    seconds = {"small": iter([4.0, 40.0, 5.0]), "large": iter([20.0, 24.0, 22.0])}
    tiles = {"small": 1, "large": 4}

    def apart(phase, path, size):
        return meter.Spent(tiles[size], 0, 0, next(seconds[size]), 0, 0)

    monkeypatch.setattr(meter, "apart", apart)
    assert meter.growth_of_pace(3, None, Path(), ("small", "large")) == 5.5 / 5.0


def test_the_lowest_of_some_peaks_counts(monkeypatch):
    peaks = iter([9e6, 7e6, 8e6, 9e6, 10e6])
    monkeypatch.setattr(meter, "apart", lambda *_: SimpleNamespace(peak=next(peaks)))
    assert meter.least_peak(None, Path(), ()) == 7.0


def test_the_script_of_the_gpu_runs_on_a_cpu_too(monkeypatch):
    """Whatever the device, the phases are called as they are now; nothing is compiled here."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    rows = gpu.measure(2, 1, 1, device="cpu", backbone="tiny", side=512, batches=(1,), matrix=64)
    found = {row.what: row.measured for row in rows}
    assert len(found) == 12
    assert all(math.isfinite(value) and value > 0 for value in found.values())


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_timed_only_where_the_processor_multiplies_it(monkeypatch, native):
    monkeypatch.setattr("benchmarks.head.has_bf16", lambda device: native)
    monkeypatch.setattr("benchmarks.head.alternate", lambda *_: (6.0, 2.0))
    assert [row.measured for row in head.measure(tiles=1)][1:] == [3.0] * native


def test_without_a_gpu_its_script_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert gpu.main([]) == 4
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("measured", "limit", "at_least", "ok"),
    [(1.0, 1.0, False, True), (1.1, 1.0, False, False), (2.0, 2.0, True, True),
     (1.9, 2.0, True, False), (0, 0, False, True), (1, 0, False, False),
     (math.nan, 1.0, False, False), (math.nan, 1.0, True, False)],
)  # fmt: skip
def test_a_row_is_judged_by_its_limit(measured, limit, at_least, ok):
    row = Row("figure", measured, limit, at_least=at_least)
    assert row.ok is ok
    assert math.isnan(measured) or (furthest([row]) <= 1) is ok


def test_a_table_marks_what_is_outside(capsys):
    print_table([Row("a", 1, 2), Row("b", 3, 2)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-1] for line in lines] == ["within", "yes", "NO"]


def test_the_ratio_is_of_the_first_row_without_a_unit(capsys):
    report([Row("memory", 30, 25, "MB"), Row("pace", 1.01, 1.05), Row("more", 2, 3)])
    assert capsys.readouterr().out.splitlines()[-1] == "ratio: 1.010"


@pytest.mark.parametrize("size", [(512, 512), (700, 1300)])
def test_a_scene_has_the_size_and_texture_asked_for(tmp_path, size):
    with rasterio.open(write_scene(tmp_path / "scene.tif", *size)) as scene:
        assert (scene.height, scene.width, scene.count, scene.dtypes[0]) == (*size, 3, "uint8")
        assert scene.block_shapes[0] == (512, 512)
        pixels = scene.read()
    assert pixels.min() >= 1
    assert (pixels.std((1, 2)) > 10).all()


@pytest.mark.parametrize("crs", [UTM, DEGREES])
def test_labels_cover_their_scene_in_any_crs(tmp_path, crs):
    scene_path = write_scene(tmp_path / "scene.tif", 700, 1300)
    label_path = write_labels(tmp_path / "labels.tif", 700, 1300, crs, classes=3)
    with rasterio.open(scene_path) as scene, rasterio.open(label_path) as labels:
        assert labels.crs.to_string() == crs
        assert set(labels.read(1).ravel()) == {0, 1, 2}
        assert overlap(grid_of(scene), grid_of(labels))


@pytest.mark.parametrize("size", [(300, 512), (512, 513), (897, 1400), (4096, 10240)])
@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_the_law_of_windows_is_that_of_the_tiles(size, share):
    assert windows(*size, share) == len(tiles(*size, 512, share))


def test_prepare_without_a_network_makes_a_whole_cache(project, tmp_path):
    config = workload.load(project, workload.write_rasters(tmp_path, 512, 1300, DEGREES))
    spent = workload.run_prepare(config)
    manifest = workload.read_manifest(config.prepare.processed_dir)
    assert manifest.complete
    assert spent.tiles == len(tile_names(config.prepare.processed_dir, manifest)) == 3
    assert len(workload.cache_files(config)[0]) == 3


def test_inference_without_a_network_maps_the_whole_scene(project, tmp_path):
    config = workload.load(project, workload.write_rasters(tmp_path, 512, 1300))
    spent = workload.run_inference(config)
    assert spent.tiles == windows(512, 1300, 0.25)
    with rasterio.open(config.inference.output_tif) as output:
        assert output.shape == (512, 1300)
        assert set(output.read(1).ravel()) == {0, 1}


def test_a_call_of_the_model_counts_as_inside_only():
    watched = meter.Watched(lambda pixels: sum(range(10**6)))
    watched([0])
    spent = watched.spent()
    assert 0 < spent.inside <= spent.span
    assert spent.over_forward >= 1
    assert spent.peak > 1e6


@pytest.mark.parametrize("text", ["30000", "axb", "0x100", "1x2x3"])
def test_a_shape_is_two_sides(text):
    with pytest.raises(Exception, match="expected WIDTHxHEIGHT"):
        shape(text)
