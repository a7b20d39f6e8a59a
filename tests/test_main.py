"""The program: YAML in, GeoTIFF out; each kind of trouble one line and its own exit code."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import threading
from dataclasses import replace
from typing import get_args

import numpy as np
import project
import pytest
import torch
import yaml

import main
from config import Model, load_config
from models import HEADS
from models.backbone import DinoBackbone, write_random_backbone
from models.base import SegmentationHead
from models.segmenter import Segmenter
from utils import phases
from utils.distributed import Runtime
from utils.manifest import read_manifest
from utils.opening import open_raster
from utils.process import StoppedError
from utils.raster import read_whole

ONLY_TRAIN, ONLY_INFERENCE = project.only("train"), project.only("inference")
ANEW = "train.resume=never"
COMPILES_NOTHING = r"resources\.compile: auto compiles nothing on a CPU, .* not to pay"
UNTIL_TRAIN = ("train.enable=false", "inference.enable=false")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")


@pytest.fixture(autouse=True)
def _same_process_after(monkeypatch):
    """What main sets for its process (thread count, SIGTERM) is as before after each test."""
    monkeypatch.setenv("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "1"))
    for name in project.LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A project whose four phases have run with the head `linear`."""
    config = project.write_project(tmp_path_factory.mktemp("finished"), height=128, width=192)
    assert project.run(config) == 0
    return config


@pytest.fixture
def copy(finished, tmp_path):
    """A copy of the finished project for a test to break."""
    shutil.copytree(finished.parent, tmp_path / "project")
    return tmp_path / "project" / "config.yml"


def said(capsys):
    """The lines on standard error, where each must be one of the log's."""
    return capsys.readouterr().err.splitlines()


# ---- YAML in, GeoTIFF out ----


def test_the_config_names_the_registered_heads():
    assert set(get_args(Model.model_fields["head"].annotation)) == set(HEADS)


@pytest.mark.parametrize("head", HEADS)
def test_a_config_becomes_a_map_with_every_head(tmp_path, head, capsys):
    config = project.write_project(
        tmp_path, model={"head": head}, train={"epochs": 6, "adamw_lr": 0.01}
    )
    capsys.readouterr()
    assert project.run(config) == 0
    with (
        open_raster(tmp_path / "map.tif") as dataset,
        open_raster(tmp_path / "unseen.tif") as scene,
    ):
        assert (dataset.crs, dataset.transform) == (scene.crs, scene.transform)
        assert (dataset.height, dataset.width) == (scene.height, scene.width)
        assert dataset.nodata == 255
    [classes], [truth] = read_whole(tmp_path / "map.tif"), read_whole(tmp_path / "truth.tif")
    assert set(np.unique(classes)) <= set(range(project.CLASSES))
    majority = np.bincount(truth.ravel()).max() / truth.size
    assert np.mean(classes == truth) > majority + 0.1
    assert (tmp_path / "weights" / f"{head}_best.pth").is_file()
    assert (tmp_path / "weights" / "metrics.csv").is_file()
    lines = said(capsys)
    assert all(re.match(r"\[(INFO|WARNING)\] ", line) for line in lines)
    assert [path.name for path in (tmp_path / "scenes").iterdir()] == ["north.tif"]
    assert not [path for path in tmp_path.glob("*.aux.xml") if path.name != "map.tif.aux.xml"]


def test_the_log_tells_the_story_of_a_run(finished):
    lines = (finished.parent / "run.log").read_text(encoding="utf-8").splitlines()
    story = [
        r"\[INFO\] prepare: started",
        r"\[INFO\] prepare: device: cpu, as configured",
        r"\[INFO\] prepare: .*backbone, blocks \[0, 1, 2, 3\], mean \[0\.485, 0\.456, 0\.406\]",
        r"\[INFO\] prepare: bands \[1, 2, 3\], values 0\.\.255 become 0\.\.255",
        rf"\[INFO\] prepare: {COMPILES_NOTHING}",
        r"\[INFO\] prepare: scene north: 6 tiles, 0\.0% of pixels ignored",
        r"\[INFO\] prepare: class shares class 0: [\d.]+%, class 1: [\d.]+%, .*",
        r"\[INFO\] prepare: 1 scenes, 6 tiles made, 0 reused, .*",
        r"\[INFO\] prepare: finished in [\d.]+ s",
        r"\[INFO\] verify: started",
        r"\[INFO\] verify: 6 tiles checked, 0 deleted",
        r"\[INFO\] verify: finished in [\d.]+ s",
        r"\[INFO\] train: started",
        r"\[INFO\] train: train has \d tiles, class shares class 0: .*",
        r"\[INFO\] train: val has \d tiles, class shares class 0: .*",
        r"\[INFO\] train: the two sides are \d+ m apart, \d tiles dropped",
        r"\[INFO\] train: device: cpu, as configured",
        r"\[INFO\] train: linear, 0\.00 M parameters",
        r"\[INFO\] epoch 1/2: loss .* tiles/s",
        r"\[INFO\] epoch 2/2: loss .* tiles/s",
        r"\[INFO\] best validation mIoU 0\.\d{4} in epoch [12]: .*linear_best\.pth",
        r"\[INFO\] train: finished in [\d.]+ s",
        r"\[INFO\] inference: started",
        r"\[INFO\] inference: device: cpu, as configured",
        rf"\[INFO\] inference: {COMPILES_NOTHING}",
        r"\[INFO\] inference: unseen\.tif, 98×151 pixels, 6 tiles of 64, 1 view\(s\)",
        r"\[INFO\] inference: map in .*map\.tif",
        r"\[INFO\] inference: finished in [\d.]+ s",
    ]
    assert len(lines) == len(story)
    for line, pattern in zip(lines, story, strict=True):
        assert re.fullmatch(pattern, line), line


@pytest.mark.parametrize("phase", ["all", "verify", "train"])
@pytest.mark.parametrize("harm", ["lost", "cut", "empty"])
def test_a_manifest_that_is_lost_or_damaged_costs_no_tile(copy, capsys, phase, harm):
    cache = copy.parent / "cache"
    path, before = cache / "manifest.json", read_manifest(cache)
    tiles = {path: path.stat().st_mtime_ns for path in cache.glob("*.pt")}
    if harm == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9] if harm == "cut" else b"")
    others = [each for each in ("prepare", "verify", "train", "inference") if each != phase]
    off = [f"{each}.enable=false" for each in others if phase != "all"]
    assert project.run(copy, *off) == 0
    text = capsys.readouterr().err
    assert len(re.findall(r"\[WARNING\] .*written again from manifest\.copy\.json", text)) == 1
    assert phase != "all" or "0 tiles made, 6 reused" in text
    assert tiles == {path: path.stat().st_mtime_ns for path in cache.glob("*.pt")}
    assert replace(read_manifest(cache), backbone=before.backbone) == before


def test_the_resolved_configuration_goes_on_with_what_the_written_one_made(copy, capsys):
    """All that it has by default is written down in it, and held against cache and weights."""
    assert main.main([str(copy), "--print-config"]) == 0
    resolved = copy.with_name("resolved.yml")
    resolved.write_text(capsys.readouterr().out)
    assert project.run(resolved) == 0
    assert "train: already complete" in capsys.readouterr().err
    assert project.run(resolved, "prepare.enable=false", "train.resume=never") == 0


def test_a_second_run_uses_the_tiles_of_the_first(copy, capsys):
    tiles = {path: path.stat().st_mtime_ns for path in (copy.parent / "cache").glob("*.pt")}
    assert project.run(copy) == 0
    assert "0 tiles made, 6 reused" in capsys.readouterr().err
    assert tiles == {p: p.stat().st_mtime_ns for p in (copy.parent / "cache").glob("*.pt")}


@pytest.mark.parametrize(("made", "other"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_a_cache_keeps_its_precision_where_auto_is_asked_for(tmp_path, capsys, made, other):
    config = project.write_project(tmp_path, height=64, width=128)
    for wanted in (made, "auto"):
        assert project.run(config, *UNTIL_TRAIN, f"resources.precision={wanted}") == 0
    assert json.loads((tmp_path / "cache" / "manifest.json").read_text())["precision"] == made
    assert "0 tiles made" in capsys.readouterr().err
    assert project.run(config, *UNTIL_TRAIN, f"resources.precision={other}") == 3
    assert "(resources.precision)" in capsys.readouterr().err
    train_only = ("prepare.enable=false", "inference.enable=false", "verify.enable=false")
    assert project.run(config, *train_only, f"resources.precision={other}") == 3
    assert f"precision {made}, this run has {other}" in capsys.readouterr().err


def test_what_compiling_brings_on_a_cpu_is_told(copy, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda head: compiled.append(head) or head)
    for setting, times in (("false", 0), ("auto", 0), ("true", 1)):
        assert project.run(copy, *ONLY_TRAIN, f"train.compile={setting}") == 0
        said = capsys.readouterr().err
        assert said.count("on a CPU that was measured not to pay") == times
        assert said.count("train.compile: auto compiles nothing on a CPU") == (setting == "auto")
        assert len(compiled) == times


def test_each_phase_runs_alone(copy, capsys):
    (copy.parent / "map.tif").unlink()
    for phase in ("prepare", "verify", "train", "inference"):
        others = {"prepare", "verify", "train", "inference"} - {phase}
        assert project.run(copy, *(f"{other}.enable=false" for other in others)) == 0
        started = [line for line in said(capsys) if line.endswith(": started")]
        assert started == [f"[INFO] {phase}: started"]
    assert (copy.parent / "map.tif").is_file()


def broken_tile(copy):
    """A cached tile of which a byte was flipped, and what it held before."""
    path = sorted((copy.parent / "cache").glob("*.pt"))[2]
    whole = path.read_bytes()
    content = bytearray(whole)
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    return path, whole


def test_a_broken_tile_is_found_and_made_again_in_one_run(copy, capsys):
    """Training goes on where it was: it never saw a cache with a hole."""
    path, whole = broken_tile(copy)
    assert project.run(copy) == 0
    err = capsys.readouterr().err
    assert f"[WARNING] verify: deleted {path.name}" in err
    assert "verify: 6 tiles checked, 1 deleted" in err
    assert "1 tiles made, 5 reused" in err
    assert "verify: 1 tiles checked, 0 deleted" in err
    assert "already complete" in err
    assert path.read_bytes() == whole


def test_without_prepare_a_hole_in_the_cache_ends_the_run(copy, capsys):
    path, whole = broken_tile(copy)
    assert project.run(copy, "prepare.enable=false") == 3
    assert "1 tiles lack, those that were bad are deleted; run prepare" in one_error(capsys)
    assert not path.exists()
    assert project.run(copy, "prepare.enable=false") == 3
    assert "1 tiles lack" in one_error(capsys)
    assert project.run(copy, *ONLY_TRAIN) == 3
    assert f"1 of 6 tiles are missing, {path.stem} first; run prepare" in one_error(capsys)
    assert project.run(copy) == 0
    assert "already complete" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_tiles_that_are_made_bad_again_and_again_end_the_run(copy, capsys, monkeypatch):
    broken_tile(copy)
    monkeypatch.setattr("utils.prepare.write_tile", lambda folder, name, *_, **__: (
        folder / f"{name}.pt").write_bytes(b"not whole"))  # fmt: skip
    assert project.run(copy) == 3
    assert "1 tiles are bad though they were just made" in one_error(capsys)


def test_only_the_first_rank_maps(copy, monkeypatch):
    @contextlib.contextmanager
    def second_of_two(resources):
        yield Runtime(rank=1, local_rank=1, world_size=2)

    monkeypatch.setattr("utils.distributed.distributed", second_of_two)
    monkeypatch.setattr(Runtime, "wait", lambda run: None)  # there is no other rank
    (copy.parent / "map.tif").unlink()
    assert project.run(copy, *ONLY_INFERENCE) == 0
    assert not (copy.parent / "map.tif").exists()


NETWORKS = """
import gc, sys, weakref
import main

built, enter = [], main.enter

def watched(phase, *arguments):
    from models.backbone import DinoBackbone
    assert gc.isenabled() and gc.get_freeze_count() > 100_000
    if phase.__name__ == "prepare":
        init, note = DinoBackbone.__init__, lambda network: built.append(weakref.ref(network))
        DinoBackbone.__init__ = lambda self, *each: note(self) or init(self, *each)
    gc.collect()
    print(phase.__name__, len(built), sum(each() is not None for each in built))
    enter(phase, *arguments)

main.enter = watched
main.start()
"""


def test_a_phase_leaves_no_network_though_garbage_of_imports_is_kept(copy):
    """A run of the program's own: only there imports are first ones."""
    keys = [f"{phase}.enable=true" for phase in project.PHASES]
    settings = [part for each in (*keys, ANEW) for part in ("--set", each)]
    said = project.start([project.PYTHON, "-c", NETWORKS, copy, *settings], copy.parent)
    assert said.returncode == 0, said.stderr
    wanted = ["prepare 0 0", "verify 1 0", "train 1 0", "inference 1 0"]
    assert said.stdout.splitlines() == wanted


def test_the_group_of_ranks_is_left_before_a_scene_is_mapped(copy, monkeypatch):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    numbers = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in (place | numbers).items():
        monkeypatch.setenv(name, value)
    joined = {}
    for phase in ("train", "inference"):
        monkeypatch.setattr(phases, phase, recorder_of(phase, joined))
    gloo = ("resources.distributed=true", "resources.dist_backend=gloo")
    assert project.run(copy, *gloo, "prepare.enable=false", "verify.enable=false") == 0
    assert joined == {"train": True, "inference": False}


def recorder_of(phase, joined):
    """A phase that only notes whether this process is in a group."""

    def noted(*_):
        joined[phase] = torch.distributed.is_initialized()

    noted.__name__ = phase
    return noted


@pytest.mark.parametrize("wanted", ["highest", "medium"])
def test_products_of_float32_have_the_configured_precision(copy, monkeypatch, wanted):
    found, told = [], torch.get_float32_matmul_precision
    before = told()
    monkeypatch.setattr(main, "enter", lambda *_: found.append(told()))
    assert project.run(copy, f"resources.matmul_precision={wanted}") == 0
    torch.set_float32_matmul_precision(before)
    assert set(found) == {wanted}


# ---- the command line ----


def test_set_overrides_the_file(copy, capsys):
    assert project.run(copy, *ONLY_TRAIN, ANEW, "train.epochs=1", "logging.timestamps=true") == 0
    lines = [line for line in said(capsys) if "epoch 1/1" in line]
    assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[INFO\] epoch 1/1", lines[0])


def test_the_printed_config_loads_to_an_equal_one(copy, tmp_path, capsys):
    assert main.main([str(copy), "--print-config", "--set", "train.epochs=7"]) == 0
    printed = tmp_path / "elsewhere" / "printed.yml"
    printed.parent.mkdir()
    printed.write_text(capsys.readouterr().out, encoding="utf-8")
    config = load_config(printed)
    assert config == load_config(copy, ["train.epochs=7"])
    assert config.train.epochs == 7


def test_the_config_is_found_in_the_folder_above(copy, monkeypatch, capsys):
    below = copy.parent / "scenes"
    monkeypatch.chdir(below)
    assert main.main(["--set", "train.epochs=1", "--print-config"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["train"]["epochs"] == 1


LAZY = """
import contextlib, io, os, sys
import main
config, bad = sys.argv[1:]
out = io.StringIO()
with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
    try:
        main.main(["--help"])
    except SystemExit as stop:
        assert stop.code == 0
    assert main.main([bad]) == 2
    assert main.main([config, "--print-config"]) == 0
assert "torchrun" in out.getvalue()
heavy = {"torch", "rasterio", "transformers", "numpy"} & set(sys.modules)
assert not heavy, heavy
seen = []
def enter(phase, *_):
    import torch
    seen.append((phase.__name__, os.environ["OMP_NUM_THREADS"], torch.get_num_threads()))
main.enter = enter
assert main.main([config, "--set", "resources.omp_threads=1"]) == 0
print(seen)
"""


def test_torch_is_imported_late_and_with_the_configured_threads(tmp_path):
    text = "prepare: {raw_images_dir: a, label_path: b, processed_dir: c}\n"
    text += "verify: {enable: false}\ntrain: {enable: false}\nmodel: {backbone: ./backbone}\n"
    write_random_backbone(tmp_path / "backbone", seed=0, **project.BACKBONE)
    (tmp_path / "config.yml").write_text(text)
    (tmp_path / "bad.yml").write_text("trian: {}\n")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    command = [project.PYTHON, "-c", LAZY, "config.yml", "bad.yml"]
    result = project.start(command, tmp_path, OMP_NUM_THREADS="2")
    assert result.returncode == 0, result.stderr
    assert "('prepare', '1', 1)" in result.stdout


def test_help_comes_at_once(tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = project.start([project.PYTHON, project.ROOT / "main.py", "--help"], tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert result.returncode == 0
    for word in ("--set", "--print-config", "torchrun", "Exit codes", "inference"):
        assert word in result.stdout


# ---- exit codes ----


def test_three_misspelt_keys_and_a_wrong_type_are_four_lines(tmp_path, capsys):
    path = tmp_path / "bad.yml"
    path.write_text(
        "model:\n  num_clases: 5\n  haed: unet\ntrain:\n  epochs: many\n  batchsize: 4\n"
    )
    assert main.main([str(path)]) == 2
    lines = said(capsys)
    assert len(lines) == 4
    assert [re.search(r"bad\.yml:(\d+):\d+: ", line).group(1) for line in lines] == [
        "2", "3", "5", "6"
    ]  # fmt: skip
    assert "model.num_clases: unknown key, did you mean 'num_classes'?" in lines[0]


def one_error(capsys):
    """The reason of a failed run."""
    errors = [line for line in said(capsys) if line.startswith(("error: ", "[ERROR] "))]
    assert len(errors) == 1, errors
    return errors[0].removeprefix("error: ")


def test_a_missing_label_file_is_3(copy, capsys):
    (copy.parent / "labels.tif").unlink()
    assert project.run(copy) == 3
    assert one_error(capsys).startswith(f"{copy.parent / 'labels.tif'}: no such file")


def test_a_missing_scene_to_map_is_3(copy, capsys):
    assert project.run(copy, *ONLY_INFERENCE, "inference.input_tif=none.tif") == 3
    assert "none.tif: no such file" in one_error(capsys)


def test_a_cache_made_with_other_settings_is_3(copy, capsys):
    assert project.run(copy, "model.layers=[1, 3]") == 3
    text = one_error(capsys)
    assert "layers [0, 1, 2, 3]" in text
    assert "[1, 3]" in text


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("model.num_classes=5", "num_classes 3, this run has 5 (model.num_classes)"),
        ("dataset.ignore_index=200", "ignore_index 255, this run has 200 (dataset.ignore_index)"),
        ("model.layers=[1, 3]", "layers [0, 1, 2, 3], this run has [1, 3] (model.layers)"),
        ("model.dino_channels=64", "channels 32, this run has 64 (model.dino_channels)"),
    ],
)
def test_training_refuses_a_cache_of_other_settings_before_the_first_epoch(
    copy, capsys, setting, wanted
):
    weights = copy.parent / "weights" / "linear_best.pth"
    before = weights.read_bytes()
    assert project.run(copy, *ONLY_TRAIN, setting) == 3
    assert wanted in one_error(capsys)
    assert weights.read_bytes() == before


@without_cuda
@pytest.mark.parametrize("phase", ["prepare", "train", "inference"])
def test_a_device_that_is_not_there_is_4(copy, capsys, phase):
    others = [p for p in ("prepare", "verify", "train", "inference") if p != phase]
    settings = [f"{other}.enable=false" for other in others]
    assert project.run(copy, *settings, f"{phase}.device=cuda") == 4
    assert "device: cuda asked for, but" in one_error(capsys)


def test_a_backbone_that_is_not_there_is_3(copy, capsys):
    assert project.run(copy, "model.backbone=./nowhere") == 3
    assert "nowhere: no such folder (model.backbone)" in one_error(capsys)


def test_a_folder_that_cannot_be_made_is_4(copy, capsys):
    (copy.parent / "file").write_text("")
    assert project.run(copy, *ONLY_TRAIN, f"train.weights_dir={copy.parent / 'file'}") == 4
    assert "file" in one_error(capsys)
    assert project.run(copy, f"logging.file={copy.parent / 'file' / 'run.log'}") == 4
    assert one_error(capsys).endswith(" (logging.file)")


def test_features_that_are_no_numbers_are_5_and_leave_no_weights(copy, capsys):
    for path in (copy.parent / "cache").glob("*.pt"):
        tile = torch.load(path)
        tile["features"][1][:] = float("nan")
        torch.save(tile, path)
    weights = copy.parent / "fresh"
    assert project.run(copy, *ONLY_TRAIN, f"train.weights_dir={weights}") == 5
    assert re.match(r"loss is nan at step 1 .*tiles north__r\d{6}_c\d{6}, ", one_error(capsys))
    assert [path.name for path in weights.glob("[!.]*")] == ["status.json"]


def test_verify_finds_those_features_first_and_with_nothing_left_is_3(copy, capsys):
    for path in (copy.parent / "cache").glob("*.pt"):
        tile = torch.load(path)
        tile["features"][1][0, 0, 0] = float("inf")
        torch.save(tile, path)
    assert project.run(copy, "prepare.enable=false") == 3
    assert "6 tiles lack, those that were bad are deleted; run prepare" in one_error(capsys)


def test_a_damaged_tile_in_a_loading_thread_is_one_line_and_3(copy, capsys):
    for path in (copy.parent / "cache").glob("*.pt"):
        path.write_bytes(path.read_bytes()[:500])
    assert project.run(copy, *ONLY_TRAIN, ANEW, "train.num_workers=1") == 3
    text = one_error(capsys)
    assert re.search(r"north__\w+\.pt: missing or damaged", text)
    assert "Traceback" not in text


def test_a_killed_worker_process_is_4(copy, capsys, monkeypatch):
    def killed(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr("utils.data.check_tile", killed)
    keys = ("prepare.enable=false", "train.enable=false", "inference.enable=false")
    assert project.run(copy, *keys, "verify.workers=2") == 4
    assert "a worker process was killed, mostly for want of memory" in one_error(capsys)


@pytest.fixture(scope="module")
def by_twos(tmp_path_factory):
    """A finished project where every phase has more than one batch."""
    by_two = {phase: {"batch_size": 2} for phase in ("prepare", "train", "inference")}
    config = project.write_project(tmp_path_factory.mktemp("twos"), 128, 192, **by_two)
    assert project.run(config) == 0
    return config


PRODUCTS = {
    "prepare": ("cache", "weights", "map.tif"),
    "train": ("weights", "map.tif"),
    "inference": ("map.tif",),
}
SHORT_OF_MEMORY = {
    "prepare": (DinoBackbone, "lower prepare.batch_size, then prepare.readers"),
    "train": (SegmentationHead, "lower train.batch_size"),
    "inference": (Segmenter, "lower inference.batch_size, then inference.max_memory"),
}


@pytest.mark.parametrize("phase", SHORT_OF_MEMORY)
@pytest.mark.parametrize(
    ("error", "what"),
    [
        (torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB"), "of GPU memory"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), "of GPU memory"),
        (MemoryError(), "of memory"),
    ],
)
def test_too_little_memory_in_a_phase_is_4_names_its_keys_and_skips_no_tile(
    by_twos, tmp_path, capsys, monkeypatch, phase, error, what
):
    config = shutil.copytree(by_twos.parent, tmp_path / "short") / "config.yml"
    for path in (config.parent / each for each in PRODUCTS[phase]):
        (shutil.rmtree if path.is_dir() else os.remove)(path)
    network, remedy = SHORT_OF_MEMORY[phase]
    forward, calls = network.forward, iter(range(100))

    def short(self, *arguments):
        if next(calls) == 1:
            raise error
        return forward(self, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(network, "forward", short)
        capsys.readouterr()
        assert project.run(config) == 4
        assert one_error(capsys).startswith(f"{phase}: out {what}; {remedy}")
    assert next(calls) == 2
    assert not (config.parent / "map.tif").exists()
    assert project.run(config) == 0
    ours, wanted = (read_whole(each.parent / "map.tif") for each in (config, by_twos))
    assert np.array_equal(ours, wanted)


def test_an_allocation_that_torch_cannot_make_is_4(copy, capsys, monkeypatch):
    def train(*_):
        torch.empty(2**62 // 4)

    monkeypatch.setattr(phases, "train", train)
    assert project.run(copy, *ONLY_TRAIN) == 4
    assert "out of memory" in one_error(capsys)


def test_a_bug_of_ours_is_1_its_line_says_where_and_the_log_file_how(copy, capsys, monkeypatch):
    def train(*_):
        {}["no such key"]

    monkeypatch.setattr(phases, "train", train)
    assert project.run(copy, *ONLY_TRAIN) == 1
    line = one_error(capsys)
    assert line.startswith("a bug of ours: KeyError: 'no such key' (test_main.py:")
    kept = (copy.parent / "run.log").read_text().splitlines()
    assert "[DEBUG] Traceback (most recent call last):" in kept
    assert kept[-1] == "[DEBUG] KeyError: 'no such key'"


def test_a_traceback_is_shown_at_level_debug_only(copy, capsys):
    assert project.run(copy, "paths.label_path=nowhere.tif") == 3
    assert "Traceback" not in capsys.readouterr().err
    assert project.run(copy, "paths.label_path=nowhere.tif", "logging.level=debug") == 3
    assert "[DEBUG] Traceback (most recent call last):" in capsys.readouterr().err


def status_of(config):
    """What status.json of a project says of its last run."""
    return json.loads((config.parent / "weights" / "status.json").read_text())


def test_status_says_what_the_exit_code_and_the_log_say(copy, capsys, monkeypatch):
    during = []

    def verify(*_):
        during.append(status_of(copy))

    monkeypatch.setattr("utils.phases.verify", verify)
    assert project.run(copy, "train.enable=false", "inference.enable=false") == 0
    assert (during[0]["state"], during[0]["exit_code"]) == ("running", None)
    assert (status_of(copy)["state"], status_of(copy)["exit_code"]) == ("done", 0)
    assert during[0]["process"] == os.getpid()
    capsys.readouterr()
    assert project.run(copy, *ONLY_INFERENCE, "inference.input_tif=nowhere.tif") == 3
    found = status_of(copy)
    assert (found["state"], found["exit_code"]) == ("failed: input data or artefact", 3)
    assert found["message"] in one_error(capsys)


def test_a_run_refused_for_another_one_leaves_its_status_alone(copy, capsys, monkeypatch):
    seen = []

    def train(*_):
        seen.append(project.run(copy, *ONLY_TRAIN))
        seen.append(status_of(copy)["state"])

    monkeypatch.setattr("utils.phases.train", train)
    assert project.run(copy, *ONLY_TRAIN) == 0
    assert seen == [4, "running"]
    assert status_of(copy)["state"] == "done"


def test_a_pipe_is_no_config_and_no_log(copy, capsys):
    pipe = copy.parent / "pipe"
    os.mkfifo(pipe)
    assert main.main([str(pipe)]) == 2
    assert one_error(capsys) == f"{pipe}: cannot read the config: not a plain file"
    assert project.run(copy, f"logging.file={pipe}") == 4
    assert one_error(capsys).endswith(" (logging.file)")
    assert status_of(copy)["exit_code"] == 4


@pytest.mark.parametrize(
    ("number", "workers"), [(signal.SIGTERM, 0), (signal.SIGINT, 1)], ids=["SIGTERM", "SIGINT"]
)
def test_a_signal_in_the_middle_of_training_is_75_and_no_traceback(copy, number, workers):
    settings = (*ONLY_TRAIN, "train.epochs=100000", "train.patience=100000")
    settings = (*settings, f"train.num_workers={workers}", "train.weights_dir=stopped")
    command = [project.PYTHON, project.ROOT / "main.py", copy]
    command += [part for each in settings for part in ("--set", each)]
    process = subprocess.Popen(
        [str(part) for part in command], cwd=copy.parent, env=project.surroundings(), text=True,
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    timer = threading.Timer(120, process.kill)
    timer.start()
    lines = []
    for line in process.stderr:
        lines.append(line.rstrip("\n"))
        if "epoch 3/100000:" in line:
            os.killpg(process.pid, number)  # as a terminal or a scheduler does
    timer.cancel()
    assert process.wait() == 75
    assert not [line for line in lines if 'main.py", line' in line or "KeyboardInterrupt" in line]
    lines = [line for line in lines if line.startswith(("[", "error: "))]
    assert lines[-1] == (
        "error: stopped by a signal; what is finished is kept, run it again to go on"
    )
    assert re.fullmatch(r"\[INFO\] train: stopped after [\d.]+ s", lines[-2])
    assert not [line for line in lines[:-1] if line.startswith(("error", "[ERROR]"))]
    kept = sorted(path.name for path in (copy.parent / "stopped").glob("[!.]*"))
    names = ["linear_best.pth", "linear_last.pth", "linear_last_before.pth", "metrics.csv"]
    assert json.loads((copy.parent / "stopped" / "status.json").read_text())["exit_code"] == 75
    assert kept == [*names, "status.json"]


# ---- a checkpoint that was made for something else ----


def test_inference_refuses_a_checkpoint_of_other_settings_field_by_field(copy, capsys):
    checkpoint = f"inference.checkpoint={copy.parent / 'weights' / 'linear_best.pth'}"
    before = (copy.parent / "map.tif").read_bytes()
    settings = (*ONLY_INFERENCE, checkpoint, "model.head=unet", "model.num_classes=4")
    assert project.run(copy, *settings) == 3
    text = one_error(capsys)
    assert "head is 'linear', this run has 'unet'" in text
    assert "num_classes is 3, this run has 4" in text
    assert "layers" not in text
    assert (copy.parent / "map.tif").read_bytes() == before


def test_inference_refuses_a_checkpoint_of_another_backbone(copy, capsys):
    write_random_backbone(copy.parent / "other", seed=1, **project.BACKBONE)
    settings = (*ONLY_INFERENCE, f"model.backbone={copy.parent / 'other'}")
    assert project.run(copy, *settings) == 3
    assert re.search(r"backbone_hash is '?\w+.*, this run has '?\w+", one_error(capsys))


def test_a_moved_project_maps_the_same(finished, copy):
    """The backbone's folder has another name there, but the same weights."""
    (copy.parent / "map.tif").unlink()
    assert project.run(copy, *ONLY_INFERENCE) == 0
    ours, theirs = read_whole(copy.parent / "map.tif"), read_whole(finished.parent / "map.tif")
    assert np.array_equal(ours, theirs)


def test_a_missing_checkpoint_is_3_and_says_what_to_do(copy, capsys):
    assert project.run(copy, *ONLY_INFERENCE, "model.head=unet") == 3
    assert "unet_best.pth: no such checkpoint; train first, or set" in one_error(capsys)


# ---- what is said, and where ----


def test_the_log_file_holds_what_the_terminal_shows(copy, capsys):
    log = copy.parent / "logs" / "deep" / "run.log"
    assert project.run(copy, f"logging.file={log}") == 0
    assert log.read_text(encoding="utf-8").splitlines() == said(capsys)


def test_at_level_error_a_good_run_says_nothing(copy, capsys):
    assert project.run(copy, "logging.level=error") == 0
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_an_error_with_line_breaks_in_it_is_one_line(copy, capsys):
    (copy.parent / "scenes" / "north.tif").rename(copy.parent / "scenes" / "no\nrth.tif")
    (copy.parent / "scenes" / "no\nrth.tif").write_bytes(b"II*\0 no TIFF")
    assert project.run(copy) == 3
    assert len(one_error(capsys)) > 20


def test_a_run_with_every_way_to_favour_rare_classes_becomes_a_map(tmp_path):
    dataset = {
        "classes": [{"name": name, "values": [n]} for n, name in enumerate(("a", "b", "c"))],
        "labels": {"erode_borders": 1},
        "splits": {"block": 60, "buffer": 1},
    }
    loss = {"class_weights": "auto", "label_smoothing": 0.1, "focal_gamma": 2.0}
    train = {"sampler": "balanced", "loss": loss}
    config = project.write_project(
        tmp_path, dataset=dataset, train=train, inference={"blend": "gaussian"}
    )
    assert project.run(config) == 0
    assert (tmp_path / "map.tif").is_file()
    sides = json.loads((tmp_path / "cache" / "splits.geojson").read_text())["features"]
    assert {each["properties"]["side"] for each in sides} >= {"train", "val"}


def test_bits_that_flipped_in_a_tile_are_not_trained_on(copy, capsys):
    """Without verify too: the bytes of a tile meet their checksums before they are first used."""
    for path in (copy.parent / "cache").glob("*.pt"):
        stored = bytearray(path.read_bytes())
        stored[len(stored) // 2] ^= 0x10
        path.write_bytes(stored)
    assert project.run(copy, *ONLY_TRAIN, ANEW) == 3
    assert "missing or damaged" in one_error(capsys)


def folder_of_maps(copy, **changes):
    """Settings that map two scenes into folders."""
    (copy.parent / "many").mkdir()
    for name in ("a.tif", "b.tif"):
        shutil.copy(copy.parent / "unseen.tif", copy.parent / "many" / name)
    places = {"input_tif": "many", "output_tif": "maps", "polygons": "outlines"} | changes
    return [*ONLY_INFERENCE, *(f"inference.{key}={copy.parent / value}"
                               for key, value in places.items())]  # fmt: skip


def test_a_map_of_a_scene_that_changed_since_is_made_again(copy, capsys):
    settings = folder_of_maps(copy)
    assert project.run(copy, *settings) == 0
    maps = copy.parent / "maps"
    old, other = (maps / "a.tif").read_bytes(), (maps / "b.tif").stat().st_mtime_ns
    shutil.copy(copy.parent / "scenes" / "north.tif", copy.parent / "many" / "a.tif")
    capsys.readouterr()
    assert project.run(copy, *settings) == 0
    assert "b.tif is there already, kept" in capsys.readouterr().err
    assert (maps / "a.tif").read_bytes() != old
    assert (maps / "b.tif").stat().st_mtime_ns == other


def test_a_map_that_is_damaged_is_made_again(copy, capsys):
    settings = folder_of_maps(copy)
    assert project.run(copy, *settings) == 0
    path = copy.parent / "maps" / "a.tif"
    whole = path.read_bytes()
    half = len(whole) // 2
    for damage in (whole[:half], whole[:half] + bytes(len(whole) - half)):
        path.write_bytes(damage)
        capsys.readouterr()
        assert project.run(copy, *settings) == 0
        assert "b.tif is there already, kept" in capsys.readouterr().err
        assert path.read_bytes() == whole


def test_every_output_is_of_the_weights_that_map_now(copy, capsys):
    """Products that an earlier run made and a later one left out are of other weights."""
    settings = folder_of_maps(copy)
    sure = f"inference.confidence={copy.parent / 'sure'}"
    assert project.run(copy, *settings, sure) == 0
    changed = "inference.blend=linear"  # like other weights: another tag
    assert project.run(copy, *settings, changed, "inference.polygons=null") == 0
    outputs = [copy.parent / "sure" / "a.tif", copy.parent / "outlines" / "a.gpkg"]
    before = [path.stat().st_mtime_ns for path in outputs]
    for extra in (sure, f"inference.polygons={copy.parent / 'outlines'}"):
        assert project.run(copy, *settings, changed, "inference.polygons=null", extra) == 0
    assert all(path.stat().st_mtime_ns > old for path, old in zip(outputs, before, strict=True))


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("labels.tif", "would be written over a label file"),
        ("scenes/north.tif", "would be written over a training scene"),
        ("weights/linear_best.pth", "is a file but no map"),
        ("config.yml", "is a file but no map"),
    ],
)
def test_no_map_replaces_what_it_is_made_from(copy, capsys, output, said):
    path = copy.parent / output
    kept = path.read_bytes()
    assert project.run(copy, *ONLY_INFERENCE, f"inference.output_tif={path}") == 3
    assert said in one_error(capsys)
    assert path.read_bytes() == kept


def test_a_run_ended_between_a_map_and_its_polygons_makes_both(copy, monkeypatch):
    settings = folder_of_maps(copy)
    assert project.run(copy, *settings) == 0
    polygons = copy.parent / "outlines" / "a.gpkg"
    old = polygons.stat().st_mtime_ns

    def ended(*_):
        raise StoppedError

    with monkeypatch.context() as patched:
        patched.setattr("utils.inference.write_polygons", ended)
        assert project.run(copy, *settings, "inference.overlap=0.5") == 75
    assert (copy.parent / "maps" / ".a.tif.resume").is_dir()
    assert project.run(copy, *settings, "inference.overlap=0.5") == 0
    assert polygons.stat().st_mtime_ns > old
    assert not (copy.parent / "maps" / ".a.tif.resume").exists()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_a_pipe_is_neither_mapped_nor_replaced(copy, capsys):
    pipe = copy.parent / "pipe.tif"
    os.mkfifo(pipe)
    assert project.run(copy, *ONLY_INFERENCE, f"inference.input_tif={pipe}") == 3
    assert "pipe.tif: holds no raster (inference.input_tif)" in one_error(capsys)
    assert project.run(copy, *ONLY_INFERENCE, f"inference.output_tif={pipe}") == 4
    assert "a device or pipe, which no file replaces" in one_error(capsys)
    assert pipe.is_fifo()


def test_an_interrupt_before_the_run_began_is_one_line(copy, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "main", interrupted)
    with pytest.raises(SystemExit, match="75"):
        main.start()
    assert one_error(capsys) == "stopped before the run began; run it again"
