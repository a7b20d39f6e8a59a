"""Training goes on where it was ended, whenever that was, to the same weights and history."""

import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import project
import pytest
import torch

from models import HEADS
from utils.checkpoint import load_checkpoint
from utils.process import STOP
from utils.resume import Progress, Resume, before, content_of, last_path, load
from utils.step import Step

ONLY_TRAIN = project.only("train")
SHAPE = {"batch_size": 2, "epochs": 2, "checkpoint_minutes": 1000.0}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A project with a cache of 12 tiles: 9 or so to train on."""
    folder = tmp_path_factory.mktemp("resume")
    path = project.write_project(folder, 190, 250, train=SHAPE)
    assert project.run(path, "train.enable=false", "inference.enable=false") == 0
    return path


@pytest.fixture
def config(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of it without weights, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(prepared.parent, tmp_path / "copy") / "config.yml"


def results(folder: Path) -> dict[str, object]:
    """What a run leaves that may not depend on where it was ended, down to the last bit."""
    found: dict[str, object] = {"metrics.csv": (folder / "metrics.csv").read_bytes()}
    for path in folder.glob("*_best.pth"):
        checkpoint = load_checkpoint(path)
        found |= {key: value.numpy().tobytes() for key, value in checkpoint.state.items()}
        found["told"] = repr(replace(checkpoint, state={}, config=""))
    return found


def end_after(monkeypatch, steps: int) -> None:
    """Have a signal come in during a run's step of this number."""
    count, step = iter(range(1, 10**6)), Step.__call__

    def watched(self, *arguments):
        if next(count) == steps:
            STOP.asked = True
        return step(self, *arguments)

    monkeypatch.setattr(Step, "__call__", watched)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("keys", [("train.ema_decay=0.9",), ("train.grad_accum_steps=2",)])
def test_a_run_ended_at_any_step_makes_the_weights_of_an_unbroken_one_bit_for_bit(
    config, monkeypatch, head, keys
):
    keys = (*ONLY_TRAIN, f"model.head={head}", *keys)
    assert project.run(config, *keys, "train.weights_dir=copy/whole") == 0
    wanted = results(config.parent / "whole")
    steps = int(load(last_path(config.parent / "whole", head))["parts"]["schedule"]["last_epoch"])
    assert steps >= 4
    quick = head in ("linear", "unet")  # `make faults` goes on from every step of all
    for number in range(1, steps + 1) if quick else (1, steps // 2, steps):
        folder = f"train.weights_dir=copy/ended{number}"
        with monkeypatch.context() as patched:
            end_after(patched, number)
            assert project.run(config, *keys, folder) == 75
        assert project.run(config, *keys, folder) == 0
        assert results(config.parent / f"ended{number}") == wanted


def test_a_run_ended_at_every_step_in_turn_comes_to_the_same_end(config, monkeypatch):
    assert project.run(config, *ONLY_TRAIN, "train.weights_dir=copy/whole") == 0
    codes = []
    while not codes or codes[-1] == 75:
        with monkeypatch.context() as patched:
            end_after(patched, 1)
            codes.append(project.run(config, *ONLY_TRAIN, "train.weights_dir=copy/ended"))
    assert codes[-1] == 0
    assert len(codes) > 4
    assert results(config.parent / "ended") == results(config.parent / "whole")


def test_a_run_ended_while_it_validates_validates_anew(config, monkeypatch):
    keys = (*ONLY_TRAIN, "train.batch_size=1")
    assert project.run(config, *keys, "train.weights_dir=copy/whole") == 0
    seen, forward = [], Step.forward

    def watched(self, model, batch, score=None):
        if score is not None:
            STOP.asked = True
            seen.append(batch.name)
        return forward(self, model, batch, score)

    with monkeypatch.context() as patched:
        patched.setattr(Step, "forward", watched)
        assert project.run(config, *keys, "train.weights_dir=copy/ended") == 75
    assert len(seen) == 1
    kept = load(last_path(config.parent / "ended", "linear"))
    assert (kept["epoch"], kept["history"]) == (1, [])
    assert kept["windows"] == kept["parts"]["schedule"]["last_epoch"] > 4
    assert project.run(config, *keys, "train.weights_dir=copy/ended") == 0
    assert results(config.parent / "ended") == results(config.parent / "whole")


def test_a_finished_training_is_left_alone(config, capsys):
    assert project.run(config, *ONLY_TRAIN) == 0
    kept = times(config.parent / "weights")
    capsys.readouterr()
    assert project.run(config, *ONLY_TRAIN) == 0
    assert "train: already complete, 2 epochs" in capsys.readouterr().err
    assert times(config.parent / "weights") == kept


def test_a_metrics_file_that_is_gone_or_damaged_is_written_again(config):
    assert project.run(config, *ONLY_TRAIN) == 0
    metrics = config.parent / "weights" / "metrics.csv"
    whole = metrics.read_bytes()
    for damage in (metrics.unlink, lambda: metrics.write_bytes(whole[::-1])):
        damage()
        assert project.run(config, *ONLY_TRAIN) == 0
        assert metrics.read_bytes() == whole


def times(folder: Path) -> dict[str, int]:
    """When weights, states and metrics.csv were written."""
    files = [*folder.glob("*.pth"), folder / "metrics.csv"]
    return {path.name: path.stat().st_mtime_ns for path in files}


def test_never_starts_anew(config):
    assert project.run(config, *ONLY_TRAIN) == 0
    first = results(config.parent / "weights")
    assert project.run(config, *ONLY_TRAIN, "resources.seed=5", "train.resume=never") == 0
    assert results(config.parent / "weights") != first


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("train.batch_size=3", "train.batch_size was 2 and is 3"),
        ("train.adamw_lr=0.01", "train.adamw_lr was 0.001 and is 0.01"),
        ("resources.seed=5", "resources.seed was 1337 and is 5"),
        ("dataset.augmentations.hflip=false", "dataset.augmentations was"),
        ("train.val_fraction=0.5", "tiles to train on was"),
        ("train.epochs=3", "train.epochs was 2 and is 3"),
    ],
)
def test_other_settings_are_refused_with_both_values(config, capsys, change, said):
    assert project.run(config, *ONLY_TRAIN) == 0
    capsys.readouterr()
    assert project.run(config, *ONLY_TRAIN, change) == 3
    error = [line for line in capsys.readouterr().err.splitlines() if said in line]
    assert len(error) == 1
    assert error[0].endswith("set them back, or train.resume: never to start anew")


def test_harmless_settings_may_change(config, monkeypatch):
    with monkeypatch.context() as patched:
        end_after(patched, 2)
        assert project.run(config, *ONLY_TRAIN) == 75
    assert project.run(config, *ONLY_TRAIN, "train.patience=3", "train.num_workers=1") == 0


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "code"])
def test_a_damaged_state_gives_way_to_the_one_before_it(config, monkeypatch, capsys, how):
    assert project.run(config, *ONLY_TRAIN, "train.weights_dir=copy/whole") == 0
    with monkeypatch.context() as patched:
        end_after(patched, 6)
        assert project.run(config, *ONLY_TRAIN) == 75
    path = last_path(config.parent / "weights", "linear")
    assert before(path).exists()
    stored = bytearray(path.read_bytes())
    if how == "cut":
        path.write_bytes(stored[: len(stored) // 2])
    elif how == "flipped":
        stored[len(stored) // 2] ^= 1
        path.write_bytes(stored)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        torch.save({"format": 2, "identity": print}, path)
    capsys.readouterr()
    assert project.run(config, *ONLY_TRAIN) == 0
    assert "the state before it is tried" in capsys.readouterr().err
    assert results(config.parent / "weights") == results(config.parent / "whole")


def progress_in(epoch: int) -> Progress:
    """A training that has come to an epoch."""
    return Progress(epoch, history=[{"epoch": number} for number in range(1, epoch)])


def test_a_damaged_state_never_takes_the_place_of_the_one_before_it(tmp_path, log):
    resume = Resume(tmp_path / "unet_last.pth", {"seed": 1})
    for epoch in (1, 2):
        resume.keep(progress_in(epoch))
    (tmp_path / "unet_last.pth").write_bytes(b"half of a state")
    again = Resume(tmp_path / "unet_last.pth", {"seed": 1})
    assert again.find(log).epoch == 1
    again.keep(progress_in(3))
    assert load(before(again.path))["epoch"] == 1
    again.keep(progress_in(4))
    assert [load(path)["epoch"] for path in (before(again.path), again.path)] == [3, 4]


KILLED = """
import os, sys
import main
from utils import artefacts, engine
count = [0]
def dying(before):
    def call(*arguments, **keys):
        count[0] += 1
        if count[0] == int(sys.argv[1]):
            os.kill(os.getpid(), 9)
        return before(*arguments, **keys)
    return call
artefacts.sync = dying(artefacts.sync)
engine.Step.update = dying(engine.Step.update)
main.main(sys.argv[2:])
"""


@pytest.mark.parametrize("moment", [1, 2, 4, 7, 9, 12, 15])
def test_a_run_killed_at_a_step_or_while_it_writes_comes_to_the_same_end(config, moment):
    settings = [part for each in ONLY_TRAIN for part in ("--set", each)]
    command = [sys.executable, "-c", KILLED, str(moment), str(config), *settings]
    command += ["--set", "train.checkpoint_minutes=1e-9"]
    result = subprocess.run(
        command, cwd=config.parent, env=project.surroundings(), check=False, capture_output=True
    )
    assert result.returncode == -9
    assert project.run(config, *ONLY_TRAIN) == 0
    assert project.run(config, *ONLY_TRAIN, "train.weights_dir=copy/whole") == 0
    assert results(config.parent / "weights") == results(config.parent / "whole")
    assert not list((config.parent / "weights").glob(".*.tmp"))


def test_what_was_trained_on_other_labels_or_pixels_is_not_gone_on_with():
    """A copied project, whose files have other times, goes on."""
    scene = {"bytes": 9, "modified": 1, "labels": {"0 l.tif": {"bytes": 5, "modified": 1}}}
    made = project.manifest_of(scenes={"north": scene}, tiles={"north__r000000_c000000": [1, 2]})
    copied = scene | {"modified": 2, "labels": {"0 l.tif": {"bytes": 5, "modified": 3}}}
    assert content_of(replace(made, scenes={"north": copied})) == content_of(made)
    others = [
        replace(made, scenes={"north": scene | {"bytes": 8}}),
        replace(made, scenes={"north": scene | {"labels": {"0 l.tif": {"bytes": 6}}}}),
        replace(made, tiles={"north__r000000_c000000": [2, 1]}),
        replace(made, ranges=[[0.0, 99.0]] * 3),
    ]
    assert len({content_of(each) for each in [made, *others]}) == 5


@pytest.mark.parametrize("name", [each.name for each in fields(Progress)])
def test_a_state_with_an_entry_of_another_type_is_one_line_and_gives_way(config, capsys, name):
    assert project.run(config, *ONLY_TRAIN) == 0
    path = last_path(config.parent / "weights", "linear")
    before(path).unlink()
    content = torch.load(path)
    for odd in (None, "odd", [["odd"]], {"odd": {}}):
        if odd is None and name == "best":
            continue
        torch.save(content | {name: odd}, path)
        capsys.readouterr()
        code, said = project.run(config, *ONLY_TRAIN), capsys.readouterr().err
        assert code in (0, 3), said  # begun anew, or refused where only the head can tell
        lines = [line for line in said.splitlines() if line.startswith(("[WARNING]", "error: "))]
        assert len(lines) == 1, said
        assert path.name in lines[0]


@pytest.mark.parametrize("epochs_done", [1, 2])
def test_training_goes_on_where_its_folder_was_moved_to(config, monkeypatch, capsys, epochs_done):
    with monkeypatch.context() as patched:
        if epochs_done == 1:
            end_after(patched, 5)
        assert project.run(config, *ONLY_TRAIN) == (75 if epochs_done == 1 else 0)
    moved = config.parent.rename(config.parent.with_name("moved")) / "config.yml"
    capsys.readouterr()
    assert project.run(moved, *ONLY_TRAIN) == 0
    said = capsys.readouterr().err
    assert "written again" not in said
    assert "going on in epoch" in said or "already complete" in said
    shutil.rmtree(moved.parent / "cache" / "none", ignore_errors=True)
    assert project.run(moved, *ONLY_TRAIN, "train.weights_dir=moved/whole") == 0
    assert results(moved.parent / "whole") == results(moved.parent / "weights")


@pytest.mark.parametrize("epochs_done", [1, 2])
@pytest.mark.parametrize("damage", ["cut", "gone", "foreign"])
def test_best_weights_that_are_not_the_run_s_are_written_again(
    config, monkeypatch, capsys, damage, epochs_done
):
    """From the state of training: what was learnt is not lost with a file."""
    settings = (*ONLY_TRAIN, "train.batch_size=2")  # five steps an epoch
    assert project.run(config, *settings, "train.weights_dir=copy/whole") == 0
    with monkeypatch.context() as patched:
        if epochs_done == 1:
            end_after(patched, 7)
        assert project.run(config, *settings) == (75 if epochs_done == 1 else 0)
    path = config.parent / "weights" / "linear_best.pth"
    steps = []
    if damage == "gone":
        path.unlink()
    elif damage == "foreign":
        other = torch.load(path)
        torch.save(other | {"state": {k: 0 * v for k, v in other["state"].items()}}, path)
    else:
        path.write_bytes(path.read_bytes()[:5000])
    capsys.readouterr()
    update = Step.update
    monkeypatch.setattr(Step, "update", lambda *args: steps.append(1) or update(*args))
    assert project.run(config, *settings) == 0
    assert "linear_best.pth: " in (said := capsys.readouterr().err)
    assert "written again from the state of training" in said
    assert (epochs_done == 2) == (not steps)
    assert results(config.parent / "weights") == results(config.parent / "whole")


def test_where_both_states_are_damaged_nothing_is_written_over(config, monkeypatch, capsys):
    assert project.run(config, *ONLY_TRAIN) == 0
    last = last_path(config.parent / "weights", "linear")
    for path in (last, before(last)):
        path.write_bytes(path.read_bytes()[:500])
    kept = times(config.parent / "weights")
    capsys.readouterr()
    assert project.run(config, *ONLY_TRAIN) == 3
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.endswith("no other state is left: train.resume: never starts anew")
    assert times(config.parent / "weights") == kept
    assert project.run(config, *ONLY_TRAIN, "train.resume=never") == 0
