"""Checkpoints: what was saved comes back; anything else is refused, unexecuted and by name."""

import pickle
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from config import Config, Dataset, Model
from utils.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    load_weights,
    plain_state,
    precision_as_trained,
    require_equal,
    require_fit,
    save_checkpoint,
)

CPU = torch.device("cpu")
SPEC = SimpleNamespace(
    layers=(1, 3),
    channels=4,
    norm="final",
    image_mean=(0.3, 0.2, 0.1, 0.2),
    image_std=(0.6, 0.5, 0.4, 0.5),
    rgb=(2, 1, 0),
)
BACKBONE = SimpleNamespace(spec=SPEC, weights_hash="a" * 64)


def head(channels: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 3, 1), nn.BatchNorm2d(3))


def made() -> Checkpoint:
    return Checkpoint(
        head="linear",
        num_classes=3,
        channels=4,
        levels=2,
        backbone="./backbone",
        backbone_hash="a" * 64,
        layers=[1, 3],
        norm="final",
        image_mean=[0.3, 0.2, 0.1, 0.2],
        image_std=[0.6, 0.5, 0.4, 0.5],
        patch_size=16,
        tile_size=64,
        precision="fp32",
        feature_dtype="fp16",
        bands=[1, 2, 3, 4],
        rgb=[2, 1, 0],
        ranges=[[0.0, 3000.0]] * 4,
        nodata=None,
        gsd=0.5,
        ground_gsd=0.5,
        class_names=["field", "wood", "water"],
        class_colors=[[200, 180, 90], [20, 90, 30], [30, 60, 200]],
        ignore_index=255,
        epoch=7,
        metrics={"miou": 0.5, "iou": [0.25, None, 0.75]},
        config="train: {}\n",
        state=plain_state(head()),
    )


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


def run_of(head: str = "linear", num_classes: int = 3, **dataset) -> Config:
    return Config(model=Model(head=head, num_classes=num_classes), dataset=Dataset(**dataset))


@pytest.mark.parametrize(
    "keys",
    [{}, {"bands": (1, 2, 3, 4)}, {"gsd": 0.5}, {"input_range": (0, 3000)},
     {"input_range": ((0, 3000),) * 4}, {"input_range": "dtype"}],
)  # fmt: skip
def test_a_checkpoint_fits_the_run_it_was_made_for(path, keys):
    """What the configuration leaves open is as the checkpoint has it."""
    require_fit(path, load_checkpoint(path), run_of(**keys), BACKBONE)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"bands": (1, 2, 3)}, r"bands is \[1, 2, 3, 4\], this run has \[1, 2, 3\]$"),
        ({"bands": (4, 3, 2, 1)}, r"bands is .* this run has \[4, 3, 2, 1\]$"),
        ({"gsd": 2.0}, r"gsd is 0\.5, this run has 2\.0$"),
        ({"nodata": 0.0}, r"nodata is None, this run has 0\.0$"),
        ({"input_range": (0, 255)}, r"ranges is \[\[0\.0, 3000\.0\].* has \[\[0\.0, 255\.0\]"),
    ],
)
def test_a_scene_that_is_to_be_read_in_another_way_is_refused(path, log, keys, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        require_fit(path, load_checkpoint(path), run_of(**keys), BACKBONE)
    assert "\n" not in str(caught.value)


def test_a_backbone_that_sees_other_bands_is_refused(path, log):
    spec = SimpleNamespace(**{**vars(SPEC), "rgb": (0, 1, 2)})
    other = SimpleNamespace(spec=spec, weights_hash=BACKBONE.weights_hash)
    with pytest.raises(CheckpointError, match=r"rgb is \[2, 1, 0\], this run has \[0, 1, 2\]$"):
        require_fit(path, load_checkpoint(path), run_of(), other)


def test_the_bands_that_the_backbone_sees_are_told_by_number():
    assert made().rgb_bands == [3, 2, 1]
    assert replace(made(), bands=[5, 7], rgb=[1, 1, 1]).rgb_bands == [7]


def test_every_difference_from_the_run_is_named(path, log):
    section = run_of(head="unet", num_classes=4)
    other = SimpleNamespace(spec=SPEC, weights_hash="b" * 64)
    with pytest.raises(CheckpointError) as caught:
        require_fit(path, load_checkpoint(path), section, other)
    line = str(caught.value)
    assert line.startswith(f"{path}: head is 'linear', this run has 'unet'; num_classes is 3, ")
    assert "backbone_hash" in line
    assert "layers" not in line
    assert "\n" not in line


@pytest.mark.parametrize("trained", ["fp32", "bf16"])
def test_maps_are_made_in_the_precision_of_the_training(path, log, monkeypatch, trained):
    monkeypatch.setattr("utils.checkpoint.has_bf16", lambda device: True)
    checkpoint = replace(made(), precision=trained)
    for wanted in ("auto", trained):
        assert precision_as_trained(path, checkpoint, wanted, CPU, log) == trained
    assert log.stream.getvalue() == ""


def test_another_precision_than_the_training_s_is_a_warning(path, log):
    assert precision_as_trained(path, replace(made(), precision="bf16"), "fp32", CPU, log) == "fp32"
    assert "[WARNING]" in log.stream.getvalue()
    assert "trained in bf16, resources.precision is fp32" in log.stream.getvalue()


def test_a_processor_that_emulates_bf16_is_a_warning(path, log, monkeypatch):
    monkeypatch.setattr("utils.checkpoint.has_bf16", lambda device: False)
    checkpoint = replace(made(), precision="bf16")
    assert precision_as_trained(path, checkpoint, "auto", CPU, log) == "bf16"
    assert "emulates" in log.stream.getvalue()


def test_equal_settings_pass():
    require_equal(Path("x"), {"layers": [1], "mean": [0.1]}, {"layers": [1], "mean": [0.1]})


def test_a_checkpoint_that_claims_another_width_is_refused_before_a_head_is_built(path):
    save_checkpoint(replace(made(), channels=2**15, levels=9), path)
    with pytest.raises(CheckpointError, match=r"levels is 9, .*; channels is 32768, this"):
        require_fit(path, load_checkpoint(path), run_of(), BACKBONE)


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
