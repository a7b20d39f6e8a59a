"""Checkpoints: what was saved comes back; anything else is refused, unexecuted and by name."""

import pickle
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from project import checkpoint_of
from torch import nn

from utils.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_weights,
    plain_state,
    save_checkpoint,
)


def head(channels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 3, 1), nn.BatchNorm2d(3))


def made() -> Checkpoint:
    return checkpoint_of(plain_state(head()))


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "weights" / "best.pth"
    save_checkpoint(made(), path)
    return path


def test_a_checkpoint_comes_back_as_it_was_saved(path):
    found, expected = load_checkpoint(path), made()
    for field in fields(Checkpoint):
        if field.name != "state":
            assert getattr(found, field.name) == getattr(expected, field.name)
    assert list(found.state) == list(expected.state)
    assert all(torch.equal(found.state[name], expected.state[name]) for name in found.state)
    assert [file.name for file in path.parent.iterdir()] == ["best.pth"]


def test_weights_fill_a_head_of_the_same_kind(path):
    filled = head()
    for parameter in filled.parameters():
        nn.init.zeros_(parameter)
    load_weights(filled, load_checkpoint(path), path)
    for name, tensor in plain_state(filled).items():
        assert torch.equal(tensor, made().state[name])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("0.bias"), "Missing key"),
        (lambda state: state.update(extra=torch.zeros(1)), "Unexpected key"),
        (lambda state: state.update({"0.weight": torch.zeros(3, 5, 1, 1)}), "size mismatch"),
        (lambda state: state.update({"_orig_mod.0.bias": state.pop("0.bias")}), "Missing key"),
    ],
)
def test_weights_that_do_not_fit_in_full_are_refused_in_one_line(path, change, said):
    state = made().state
    change(state)
    with pytest.raises(CheckpointError, match=said) as caught:
        load_weights(head(), replace(made(), state=state), path)
    assert str(caught.value).startswith(f"{path}: weights do not fit head linear")
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 3


def test_a_saved_state_is_safe_from_later_steps():
    module = head()
    state = plain_state(module)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.add_(1)
    assert all(torch.equal(state[name], made().state[name]) for name in state)


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_code_in_a_checkpoint_is_refused_and_never_run(path, tmp_path, save):
    save({"format": 3, "head": Evil(tmp_path / "ran")}, path)
    with pytest.raises(CheckpointError, match="damaged, or not a checkpoint") as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_wherever_a_checkpoint_is_cut_it_is_refused_by_name(path):
    whole = path.read_bytes()
    for kept in range(0, len(whole), 61):
        path.write_bytes(whole[:kept])
        with pytest.raises(CheckpointError, match=r"best\.pth: damaged") as caught:
            load_checkpoint(path)
        assert "\n" not in str(caught.value)


def test_whatever_byte_is_damaged_no_other_error_escapes(path):
    whole = path.read_bytes()
    for place in range(0, len(whole), 11):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            assert "best.pth" in str(error)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([1, 2], "not a DINOv3Seg checkpoint"),
        ({"state_dict": {}}, "not a DINOv3Seg checkpoint"),
        ({"format": 99}, "not a DINOv3Seg checkpoint of format 3"),
        ({"format": 2, "head": "linear"}, "not a DINOv3Seg checkpoint of format 3"),
        ({"format": 3, "head": "linear", "odd": 1}, "missing or unknown entries:.*odd"),
    ],
)
def test_a_file_of_another_kind_is_refused(path, content, said):
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=said):
        load_checkpoint(path)


def test_a_missing_checkpoint_says_what_to_do(tmp_path):
    for place in (tmp_path / "gone.pth", tmp_path):
        with pytest.raises(CheckpointError, match="train first, or set inference.checkpoint"):
            load_checkpoint(place)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_save_that_is_cut_short_leaves_the_older_checkpoint(path, monkeypatch, error):
    before = path.read_bytes()

    def save(_, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(type(error)):
        save_checkpoint(replace(made(), epoch=8), path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


ODD = [None, True, -1, 2.5, "odd", [], ["odd"], [[]], {}, {"odd": 1}]


@pytest.mark.parametrize("name", [each.name for each in fields(Checkpoint)])
def test_an_entry_of_another_type_is_refused_by_name(path, name):
    save_checkpoint(made(), path)
    content, refused = torch.load(path, weights_only=True), 0
    for odd in ODD:
        torch.save(content | {name: odd}, path)
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            assert name in str(error)
            refused += 1
    assert refused >= 5


@pytest.mark.parametrize(
    ("name", "odd"),
    [
        ("bands", []), ("ranges", [[0.0, 1.0]]), ("ranges", [[0.0]] * 4), ("rgb", [4]), ("rgb", []),
        ("image_mean", [0.5]), ("image_std", [0.5] * 5), ("class_names", ["a"]),
        ("class_colors", [[0, 0]] * 3), ("feature_dtype", "fp8"), ("precision", "fp64"),
    ],
)  # fmt: skip
def test_entries_that_contradict_each_other_are_refused_by_name(path, name, odd):
    save_checkpoint(replace(made(), **{name: odd}), path)
    with pytest.raises(CheckpointError, match=f"entries that no training writes: .*{name}"):
        load_checkpoint(path)
