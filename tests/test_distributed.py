"""Two processes do the work of one: the same cache, the same metrics, one log, one map."""

import csv
import json
import os
import re
import signal
import subprocess
from types import SimpleNamespace

import numpy as np
import project
import pytest
import test_engine
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from config import Resources
from utils.checkpoint import load_checkpoint
from utils.devices import (
    DeviceError,
    device_reason,
)
from utils.distributed import LaunchError, PeerError, Runtime, distributed, told
from utils.process import STOP, StoppedError
from utils.raster import read_whole

CPU = torch.device("cpu")
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
TORCHRUN = [
    project.PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
    project.ROOT / "main.py",
]  # fmt: skip
GLOO = ("--set", "resources.distributed=true", "--set", "resources.dist_backend=gloo")
TRAIN = {"val_fraction": 0.2, "epochs": 3, "muon_lr": 2e-4, "batch_size": 4}


def torchrun(config, *settings, flags=GLOO):
    more = [part for each in settings for part in ("--set", each)]
    return project.start([*TORCHRUN, config, *flags, *more], config.parent)


def ours(text):
    """The lines of a run that torchrun did not write."""
    return [line for line in text.splitlines() if re.match(r"(\[[A-Z]+\]|error:) ", line)]


def without_times(lines):
    """Lines without what is different each time: seconds, tiles per second, folders."""
    told = (re.sub(r"[\d.]+ (s|tiles/s)\b", "", line) for line in lines)
    return [re.sub(r"/\S*/", "", line) for line in told]


def history(folder):
    with (folder / "weights" / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same project twice: run by two processes (and their output), and by this one."""
    root = tmp_path_factory.mktemp("ranks")
    settings = {"model": {"head": "unet"}, "prepare": {"batch_size": 1}, "train": TRAIN}
    two = project.write_project(root / "two", **settings)
    one = project.write_project(root / "one", **settings)
    said = torchrun(two, "train.batch_size=2")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert project.run(one) == 0
    torch.set_num_threads(threads)
    return root, said


# ---- two processes ----


def test_two_processes_end_well_with_one_log_and_one_map(folders):
    root, said = folders
    assert said.returncode == 0, said.stderr
    lines = [line for line in said.stderr.splitlines() if line.strip()]
    assert lines == ours(said.stderr)
    assert said.stdout == ""
    assert len(set(lines)) == len(lines)
    assert (root / "two" / "run.log").read_text().splitlines() == lines
    for phase in ("prepare", "verify", "train", "inference"):
        assert lines.count(f"[INFO] {phase}: started") == 1
    assert sorted(path.name for path in (root / "two").iterdir()) == sorted(
        path.name for path in (root / "one").iterdir()
    )


def test_two_processes_say_what_one_says(folders):
    root, said = folders
    one = (root / "one" / "run.log").read_text().splitlines()
    told = [line for line in without_times(one) if "epoch" not in line]
    assert told == [line for line in without_times(ours(said.stderr)) if "epoch" not in line]


def test_two_processes_reach_the_metrics_of_one_on_the_same_global_batch(folders):
    root, _ = folders
    one, two = history(root / "one"), history(root / "two")
    assert len(one) == len(two) == 3
    assert one[0].keys() == two[0].keys()
    for ours, theirs in zip(one, two, strict=True):
        for key in ours.keys() - {"tiles_per_second"}:
            # a score counts pixels: one that rounding turns over moves it by more than a loss
            near = 1e-3 if key.startswith(("iou", "m")) else 1e-4
            assert float(ours[key]) == pytest.approx(float(theirs[key]), abs=near), key
    assert float(one[0]["train_loss"]) - float(one[-1]["train_loss"]) > 0.01


def test_two_processes_cache_what_one_caches(folders):
    root, _ = folders
    one, two = (sorted((root / each / "cache").glob("*.pt")) for each in ("one", "two"))
    assert [path.name for path in one] == [path.name for path in two]
    assert len(one) == 20
    for ours, theirs in zip(one, two, strict=True):
        ours, theirs = torch.load(ours), torch.load(theirs)
        assert torch.equal(ours["image"], theirs["image"])
        assert torch.equal(ours["label"], theirs["label"])
        assert all(map(torch.equal, ours["features"], theirs["features"]))


def test_two_processes_give_the_map_of_one(folders):
    root, _ = folders
    one, two = (read_whole(root / each / "map.tif") for each in ("one", "two"))
    assert one.shape == two.shape
    assert np.mean(one != two) < 1e-3


def test_ranks_stop_in_the_same_epoch_with_an_odd_number_of_tiles(folders):
    root, _ = folders
    said = torchrun(
        root / "two" / "config.yml", "prepare.enable=false", "inference.enable=false",
        "dataset.splits.buffer=20", "train.batch_size=2", "train.grad_accum_steps=3",
        "train.num_workers=1", "train.patience=2", "train.epochs=50", "train.adamw_lr=1e-9",
        "train.muon_lr=1e-9", "train.weights_dir=odd", "model.head=maskformer",
        "train.ema_decay=0.5", "verify.workers=2",
    )  # fmt: skip
    assert said.returncode == 0, said.stderr
    assert "train has 5 tiles" in said.stderr
    assert said.stderr.count("no better mIoU for 2 epochs: stopped early") == 1
    assert said.stderr.count("verify: 20 tiles checked, 0 deleted") == 1
    assert (root / "two" / "odd" / "maskformer_best.pth").is_file()
    with (root / "two" / "odd" / "metrics.csv").open(encoding="utf-8") as file:
        assert len(list(csv.DictReader(file))) == 3


GRADIENTS = """
import os
import torch
from torch import nn
from config import Resources
from test_engine import UNEVEN, batches_of, head_of, make_samples, section_of
from test_engine import CPU, NORMALIZE, Step, manifest_of
from utils.distributed import distributed

samples = make_samples(8, size=32, ignored=lambda number: UNEVEN[number])

def measured(run):
    head = head_of(seed=run.rank)  # ranks that start differently take the first one's weights
    section = section_of(grad_accum_steps=2, clip_grad=0.0)
    step = Step(head, NORMALIZE, section, manifest_of(), 9, run, CPU)
    step.update = lambda window: None
    head.train()
    sums = step(batches_of(run.share(samples), 2))
    norm = nn.BatchNorm1d(3)
    nn.init.constant_(norm.running_mean, run.rank + 1)
    run.align(norm)
    run.wait()
    return {
        "gradients": {name: p.grad for name, p in head.named_parameters()},
        "sums": run.sum(sums),
        "counts": run.sum(torch.tensor([run.rank, 1])),
        "agreed": run.agree(run.rank / 2),
        "mean": norm.running_mean,
    }

with distributed(Resources(distributed=True, dist_backend="gloo")) as run:
    results = measured(run)  # the DDP module is gone before the group is left
torch.save(results, f"rank{run.rank}.pt")
os._exit(0)  # as main.py's ranks do: threads of torch's may abort the interpreter's own end
"""


def test_ranks_agree_and_their_gradient_is_that_of_the_global_batch(tmp_path):
    (tmp_path / "gradients.py").write_text(GRADIENTS)
    paths = f"{project.ROOT}:{project.ROOT / 'tests'}"
    said = project.start([*TORCHRUN[:-1], "gradients.py"], tmp_path, PYTHONPATH=paths)
    assert said.returncode == 0, said.stderr
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in (0, 1))
    for results in (first, second):
        assert results["counts"].tolist() == [1, 2]
        assert results["agreed"] == 0
        assert results["mean"].tolist() == [1, 1, 1]
        assert torch.equal(results["sums"], first["sums"])

    head = test_engine.head_of(seed=0)
    step = test_engine.step_of(head, clip_grad=0.0)
    step.update = lambda window: None
    head.train()
    shares = test_engine.UNEVEN
    samples = project.make_samples(8, size=32, ignored=lambda number: shares[number])
    sums = step(test_engine.batches_of(samples, 8))
    assert torch.allclose(first["sums"], sums, rtol=1e-5)
    for name, parameter in head.named_parameters():
        scale = parameter.grad.abs().max()
        for results in (first, second):
            difference = (results["gradients"][name] - parameter.grad).abs().max()
            assert difference <= 1e-4 * scale + 1e-7, name


APART = """
import json, os, signal, sys, threading, time
from pathlib import Path
import torch
from config import Resources
from utils.distributed import distributed
from utils.process import StoppedError, stoppable

def end():
    os.kill(os.getpid(), signal.SIGTERM)

def work(count, seconds, signalled=None):
    for number in range(count):
        if number == signalled:
            end()
        time.sleep(seconds)
        yield number

exchange, exchanges = torch.distributed.all_reduce, []
torch.distributed.all_reduce = lambda *each: exchanges.append(each) or exchange(*each)
resources = Resources(distributed=True, dist_backend="gloo", timeout_minutes=0.05)
results = {}
with stoppable(), distributed(resources) as run:
    first = run.rank == 0
    results["ends"] = [time.monotonic() for _ in run.apart(work(9 if first else 3, 0.5))]
    results["exchanges"] = len(exchanges)
    results["none"] = list(run.apart(range(3 if first else 0)))
    results["stopped"], results["done"] = False, 0
    signalled = 2 if sys.argv[1] == "at work" and not first else None
    if sys.argv[1] == "waiting" and not first:
        threading.Timer(0.5, end).start()
    try:
        for _ in run.apart(work(600 if first else 3, 0.05, signalled)):
            results["done"] += 1
    except StoppedError:
        results["stopped"] = True
    run.sum(torch.zeros(1))  # both are still there
    Path(f"rank{run.rank}.json").write_text(json.dumps(results))
os._exit(0)  # as main.py's ranks do
"""


@pytest.mark.parametrize("signalled", ["at work", "waiting"])
def test_ranks_go_through_their_shares_apart_and_end_together(tmp_path, signalled):
    """Also where one's share takes longer than an exchange may, here three seconds."""
    (tmp_path / "apart.py").write_text(APART)
    command = [*TORCHRUN[:-1], "apart.py", signalled]
    said = project.start(command, tmp_path, PYTHONPATH=str(project.ROOT))
    assert said.returncode == 0, said.stderr
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert (len(first["ends"]), len(second["ends"])) == (9, 3)
    assert second["ends"][-1] < first["ends"][4]
    assert first["exchanges"] == second["exchanges"] == 1
    assert (first["none"], second["none"]) == ([0, 1, 2], [])
    assert first["stopped"] and second["stopped"]
    assert first["done"] < 200  # of 600 in half a minute


# ---- what goes wrong ----


def test_a_fault_of_one_rank_is_one_line_and_no_traceback_of_ours(folders):
    root, _ = folders
    said = torchrun(root / "two" / "config.yml", "model.num_classes=2", "paths.processed_dir=new")
    assert said.returncode != 0
    errors = [line for line in ours(said.stderr) if line.startswith(("error: ", "[ERROR]"))]
    assert len(errors) == 1
    assert "are no class" in errors[0]
    assert 'main.py", line' not in said.stderr


def test_a_rank_that_loses_its_peer_says_so_and_the_peer_says_why(folders):
    root, _ = folders
    path = sorted((root / "two" / "cache").glob("*.pt"))[3]
    kept = path.read_bytes()
    try:
        path.write_bytes(kept[:2000])
        said = torchrun(
            root / "two" / "config.yml", "prepare.enable=false", "verify.enable=false",
            "inference.enable=false", "train.weights_dir=lost", "train.batch_size=1",
        )  # fmt: skip
    finally:
        path.write_bytes(kept)
    assert said.returncode != 0
    reasons = [line for line in ours(said.stderr) if "missing or damaged" in line]
    assert len(reasons) == 1
    assert path.name in reasons[0]
    assert 'main.py", line' not in said.stderr
    left = [path.name for path in (root / "two" / "lost").glob("[!.]*")]
    assert left == ["status.json"]


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_ranks_that_a_signal_ends_keep_their_state_and_go_on_to_the_same_weights(folders, number):
    root, _ = folders
    two = root / "two" / "config.yml"
    settings = (
        "prepare.enable=false", "verify.enable=false", "inference.enable=false",
        "train.batch_size=1", "train.epochs=6", "train.patience=6", "train.ema_decay=0.9",
    )  # fmt: skip
    ended = f"train.weights_dir=ended{int(number)}"
    more = [part for each in (*settings, ended) for part in ("--set", each)]
    job = subprocess.Popen(
        [str(part) for part in (*TORCHRUN, two, *GLOO, *more)], cwd=two.parent, text=True,
        env=project.surroundings(), stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    lines = []
    for line in job.stderr:
        lines.append(line)
        if "epoch 2/6:" in line:
            job.send_signal(number)
    assert job.wait() != 0
    assert any("stopped by a signal" in line for line in lines)
    assert not any("epoch 6/6:" in line for line in lines)
    status = json.loads((two.parent / f"ended{int(number)}" / "status.json").read_text())
    assert status["exit_code"] == 75
    assert torchrun(two, *settings, ended).returncode == 0
    assert torchrun(two, *settings, f"train.weights_dir=whole{int(number)}").returncode == 0
    found = []
    for folder in (f"ended{int(number)}", f"whole{int(number)}"):
        weights = load_checkpoint(two.parent / folder / "unet_best.pth").state
        text = (two.parent / folder / "metrics.csv").read_text()
        found.append((text, {name: each.numpy().tobytes() for name, each in weights.items()}))
    assert found[0] == found[1]


def test_torchrun_without_distributed_is_refused_in_one_line(folders):
    root, _ = folders
    said = torchrun(root / "one" / "config.yml", flags=())
    assert said.returncode != 0
    assert ours(said.stderr) == [
        "error: resources.distributed is false, but torchrun started 2 processes; set it to true "
        "or start with python"
    ]


def test_distributed_without_torchrun_is_refused_with_the_way_to_start_it(folders, capsys):
    root, _ = folders
    assert project.run(root / "one" / "config.yml", "resources.distributed=true") == 4
    [line] = capsys.readouterr().err.splitlines()
    assert "torchrun --standalone --nproc_per_node=GPUS main.py config.yml" in line


# ---- one process ----


@given(st.integers(0, 40), st.integers(1, 7))
def test_the_shares_of_all_ranks_are_the_items_each_once(count, world_size):
    shares = [Runtime(rank, 0, world_size).share(range(count)) for rank in range(world_size)]
    assert sorted(item for share in shares for item in share) == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_gradients_are_exchanged_with_the_last_micro_batch_only():
    module = SimpleNamespace(no_sync=lambda: "held back")
    run = Runtime(world_size=2)
    assert run.unsynced(module, last=False) == "held back"
    with run.unsynced(module, last=True) as exchanged:
        assert exchanged is None


def test_one_process_agrees_with_itself():
    run, module = Runtime(), nn.Linear(2, 1)
    values = torch.tensor([1.5, 2.5])
    assert run.sum(values) is values
    assert run.agree(0.25) == 0.25
    assert run.wrap(module, CPU) is module
    run.align(module)
    run.wait()
    with run.unsynced(module, last=False):
        pass
    assert run.is_main
    assert not Runtime(rank=1, world_size=2).is_main


@without_cuda
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:3"])
def test_a_device_that_is_not_there_is_refused_with_the_reason(name):
    with pytest.raises(DeviceError, match=f"{name} asked for, but .*CUDA.*; set it to cpu or auto"):
        Runtime().device(name)


@without_cuda
def test_auto_falls_back_to_the_cpu_and_says_why():
    device = Runtime().device("auto")
    assert device == CPU == Runtime().device("cpu")
    assert re.fullmatch(r"device: cpu, picked by auto since .*CUDA.*", device_reason("auto", CPU))


def test_a_gpu_past_the_last_is_refused_and_each_rank_has_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Runtime(1, 1, 2).device("auto") == torch.device("cuda", 1)
    assert Runtime(1, 1, 2).device("cuda") == torch.device("cuda", 1)
    assert Runtime(1, 1, 2).device("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(DeviceError, match=r"cuda:2 asked for, but this machine has 2 GPU\(s\)"):
        Runtime(2, 2, 3).device("auto")


def launched_as(monkeypatch, world_size):
    """What torchrun tells the first of its processes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    numbers = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    for name, value in (place | numbers).items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def _not_launched(monkeypatch):
    for name in project.LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_not_launched")
def test_a_lone_process_is_world_size_one(monkeypatch):
    with distributed(Resources()) as run:
        assert run == Runtime()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with distributed(Resources()) as run:
        assert run == Runtime()


@pytest.mark.usefixtures("_not_launched")
def test_starting_the_wrong_way_is_refused(monkeypatch):
    with pytest.raises(LaunchError, match="torchrun did not start this process"):
        distributed(Resources(distributed=True)).__enter__()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(LaunchError, match="torchrun started 4 processes"):
        distributed(Resources()).__enter__()


@without_cuda
def test_nccl_without_a_gpu_is_refused_before_the_group_forms(monkeypatch):
    launched_as(monkeypatch, world_size=2)
    with pytest.raises(DeviceError, match="cuda asked for"):
        distributed(Resources(distributed=True)).__enter__()


@without_cuda
def test_a_group_that_cannot_form_is_4_and_says_why(monkeypatch):
    launched_as(monkeypatch, world_size=1)

    def failing(*_, **__):
        raise torch.distributed.DistNetworkError("The client socket has failed to connect\nmore")

    monkeypatch.setattr(torch.distributed, "rendezvous", failing)
    said = r"\(The client socket has failed to connect\); run it again"
    with pytest.raises(PeerError, match=said) as caught:
        distributed(Resources(distributed=True, dist_backend="gloo")).__enter__()
    assert caught.value.exit_code == 4


def test_bugs_of_ours_are_not_taken_for_a_lost_peer(monkeypatch):
    """A group of one, which needs no second process: RuntimeErrors pass through as they are."""
    launched_as(monkeypatch, world_size=1)
    settings = Resources(distributed=True, dist_backend="gloo")
    with pytest.raises(RuntimeError, match="a bug"), distributed(settings) as run:
        assert run == Runtime()
        raise RuntimeError("a bug")
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(("parent", "kind"), [(os.getppid(), PeerError), (-1, StoppedError)])
def test_a_rank_whose_torchrun_is_gone_is_stopped_not_without_a_peer(monkeypatch, parent, kind):
    """What it lost is torchrun's store, which may be told before the parent is missed."""
    monkeypatch.setattr(STOP, "parent", parent)
    lost_store = dist.DistNetworkError("failed to recv, got 0 bytes")
    assert type(told(lost_store, None, 30)) is kind
    assert type(told(PeerError("no sign of life"), None, 30)) is kind
