"""Settings against what a cache or weights were made with: what is written down is compared."""

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from project import checkpoint_of, manifest_of, merged

from config import Config, Dataset, Model
from utils.agreement import (
    precision_as_trained,
    require_cache,
    require_equal,
    require_fit,
)
from utils.checkpoint import CheckpointError
from utils.label_values import label_rules
from utils.manifest import CacheError

CPU = torch.device("cpu")
PATH = Path("weights/linear_best.pth")
WEIGHTS = checkpoint_of({})
SPEC = SimpleNamespace(
    layers=(1, 3),
    channels=4,
    norm="final",
    image_mean=(0.3, 0.2, 0.1, 0.2),
    image_std=(0.6, 0.5, 0.4, 0.5),
    rgb=(2, 1, 0),
)
BACKBONE = SimpleNamespace(spec=SPEC, weights_hash="a" * 64)


# A cache and the run that trains on it

MADE = manifest_of(
    tile_size=64,
    filters={"min_valid": 0.5, "min_labeled": 0.0, "background_keep": 1.0},
    label_rules=asdict(label_rules(Dataset(labels={"unlisted": "ignore"}), 3)),
)
SAYING = {
    "prepare.tile_size": ({"prepare": {"tile_size": 512}}, "tile_size 64, this run has 512"),
    "dataset.rgb": ({"dataset": {"rgb": [3, 2, 1]}}, "rgb_bands [1, 2, 3], this run has [3, 2, 1]"),
    "dataset.bands": ({"dataset": {"bands": [3, 2, 1]}}, "bands [1, 2, 3], this run has [3, 2, 1]"),
    "dataset.input_range": (
        {"dataset": {"input_range": [0, 3000]}}, "ranges [[0.0, 255.0], [0.0, 255.0], [0.0, 255.0]]"
    ),
    "model.image_mean": (
        {"model": {"image_mean": [0.5, 0.4, 0.5], "image_std": [0.25] * 3}},
        "image_mean [0.5, 0.5, 0.5], this run has [0.5, 0.4, 0.5]",
    ),
    "model.image_std": (
        {"model": {"image_mean": [0.5] * 3, "image_std": [0.25, 0.25, 0.2]}},
        "image_std [0.25, 0.25, 0.25], this run has [0.25, 0.25, 0.2]",
    ),
    "dataset.classes and dataset.labels": (
        {"dataset": {"labels": {"unlisted": "error"}}},
        "label_rules {'unlisted': 'ignore'}, this run has {'unlisted': 'error'}",
    ),
    "prepare.min_valid, min_labeled, background_keep, resources.seed": (
        {"prepare": {"min_valid": 0.0}}, "filters {'min_valid': 0.5}, this run has {'min_valid': 0"
    ),
    "prepare.feature_dtype": ({"prepare": {"feature_dtype": "int8"}}, "feature_dtype fp16, this"),
    "train.augment_views": ({"train": {"augment_views": 2}}, "views 1, this run has 2 (train"),
    "dataset.nodata": ({"dataset": {"nodata": 0}}, "nodata None, this run has 0.0"),
}  # fmt: skip


def training(**sections) -> Config:
    """What a configuration of these keys alone says."""
    return Config.model_validate(merged({"model": {"num_classes": 3}}, sections))


def test_a_run_that_says_nothing_of_a_cache_goes_on_with_any():
    require_cache(training(), MADE)
    other = manifest_of(
        tile_size=256, feature_dtype="int8", ranges=[[0.0, 3000.0]] * 3, rgb=[2, 1, 0],
        filters={"min_valid": 0.9},
        label_rules={"ids": {"7": 1}}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4] * 3,
    )  # fmt: skip
    require_cache(training(), other)


@pytest.mark.parametrize("key", SAYING)
def test_a_run_that_says_otherwise_than_its_cache_is_refused_with_both_values(key):
    sections, said = SAYING[key]
    with pytest.raises(CacheError) as caught:
        require_cache(training(**sections), MADE)
    line = str(caught.value)
    assert said in line
    assert f"({key})" in line
    assert line.endswith("; set it back, or run prepare into another folder")
    assert line.count("this run has") == 1


def test_of_the_rules_of_labels_only_those_that_are_written_are_compared():
    rules = {"unlisted": "ignore", "attribute": "kind"}
    made = manifest_of(label_rules=asdict(label_rules(Dataset(labels=rules), 3)))
    require_cache(training(dataset={"labels": {"attribute": "kind"}}), made)
    named = [{"name": f"class {number}", "color": "#112233"} for number in range(3)]
    other = replace(made, label_rules=made.label_rules | {"ids": {"7": 1}})
    require_cache(training(dataset={"classes": named}), other)
    valued = [each | {"values": [number]} for number, each in enumerate(named)]
    with pytest.raises(CacheError, match=r"label_rules \{'ids': \{'7': 1\}\}, this run has"):
        require_cache(training(dataset={"classes": valued}), other)


def test_what_prepare_is_to_do_elsewhere_is_not_held_against_a_cache():
    here, there = {"processed_dir": Path("/here")}, {"processed_dir": Path("/there")}
    keys = {"tile_size": 512, "min_valid": 0.0, "feature_dtype": "int8"}
    require_cache(training(prepare=keys | there, train=here), MADE)
    with pytest.raises(CacheError, match="tile_size 64, this run has 512"):
        require_cache(training(prepare=keys | here, train=here), MADE)


def test_a_run_that_says_what_its_cache_is_passes():
    require_cache(
        training(
            prepare={"tile_size": 64, "min_valid": 0.5, "background_keep": 1.0},
            model={"image_mean": [0.5] * 3, "image_std": [0.25] * 3},
            dataset={
                "bands": [1, 2, 3], "rgb": [1, 2, 3], "input_range": [[0, 255]],
                "labels": {"unlisted": "ignore"},
            },
        ),
        MADE,
    )  # fmt: skip


@pytest.mark.parametrize("places", [[0, 0, 0], [2, 1, 0]])
def test_the_mean_of_three_channels_is_that_of_the_bands_they_are_seen_in(places):
    """One band that is seen thrice has the mean of the three, a band that is not seen its own."""
    alike = places == [0, 0, 0]
    seen = [0.2, 0.2, 0.2, 0.2] if alike else [0.3, 0.2, 0.1, 0.2]
    made = manifest_of(
        bands=[1, 2, 3, 4], rgb=places, ranges=[[0.0, 1.0]] * 4, image_mean=seen,
        image_std=[0.5] * 4,
    )  # fmt: skip
    require_cache(training(model={"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5] * 3}), made)
    with pytest.raises(CacheError, match="image_mean"):
        require_cache(training(model={"image_mean": [0.2, 0.2, 0.5], "image_std": [0.5] * 3}), made)


# Weights and the run that maps with them


def run_of(head: str = "linear", num_classes: int = 3, **dataset) -> Config:
    return Config(model=Model(head=head, num_classes=num_classes), dataset=Dataset(**dataset))


@pytest.mark.parametrize(
    "keys",
    [{}, {"bands": (1, 2, 3, 4)}, {"gsd": 0.5}, {"input_range": (0, 3000)},
     {"input_range": ((0, 3000),)}, {"input_range": ((0, 3000),) * 4}, {"input_range": "dtype"}],
)  # fmt: skip
def test_a_checkpoint_fits_the_run_it_was_made_for(keys):
    """What the configuration leaves open is as the checkpoint has it."""
    require_fit(PATH, WEIGHTS, run_of(**keys), BACKBONE)


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
def test_a_scene_that_is_to_be_read_in_another_way_is_refused(keys, said):
    with pytest.raises(CheckpointError, match=said) as caught:
        require_fit(PATH, WEIGHTS, run_of(**keys), BACKBONE)
    assert "\n" not in str(caught.value)


def test_a_backbone_that_sees_other_bands_is_refused():
    spec = SimpleNamespace(**{**vars(SPEC), "rgb": (0, 1, 2)})
    other = SimpleNamespace(spec=spec, weights_hash=BACKBONE.weights_hash)
    with pytest.raises(CheckpointError, match=r"rgb is \[2, 1, 0\], this run has \[0, 1, 2\]$"):
        require_fit(PATH, WEIGHTS, run_of(), other)


def test_the_bands_that_the_backbone_sees_are_told_by_number():
    assert WEIGHTS.rgb_bands == [3, 2, 1]
    assert replace(WEIGHTS, bands=[5, 7], rgb=[1, 1, 1]).rgb_bands == [7]


def test_every_difference_from_the_run_is_named():
    section = run_of(head="unet", num_classes=4)
    other = SimpleNamespace(spec=SPEC, weights_hash="b" * 64)
    with pytest.raises(CheckpointError) as caught:
        require_fit(PATH, WEIGHTS, section, other)
    line = str(caught.value)
    assert line.startswith(f"{PATH}: head is 'linear', this run has 'unet'; num_classes is 3, ")
    assert "backbone_hash" in line
    assert "layers" not in line
    assert "\n" not in line


@pytest.mark.parametrize("trained", ["fp32", "bf16"])
def test_maps_are_made_in_the_precision_of_the_training(log, monkeypatch, trained):
    monkeypatch.setattr("utils.agreement.has_bf16", lambda device: True)
    checkpoint = replace(WEIGHTS, precision=trained)
    for wanted in ("auto", trained):
        assert precision_as_trained(PATH, checkpoint, wanted, CPU, log) == trained
    assert log.stream.getvalue() == ""


def test_another_precision_than_the_training_s_is_a_warning(log):
    trained = replace(WEIGHTS, precision="bf16")
    assert precision_as_trained(PATH, trained, "fp32", CPU, log) == "fp32"
    assert "[WARNING]" in log.stream.getvalue()
    assert "trained in bf16, resources.precision is fp32" in log.stream.getvalue()


def test_a_processor_that_emulates_bf16_is_a_warning(log, monkeypatch):
    monkeypatch.setattr("utils.agreement.has_bf16", lambda device: False)
    checkpoint = replace(WEIGHTS, precision="bf16")
    assert precision_as_trained(PATH, checkpoint, "auto", CPU, log) == "bf16"
    assert "emulates" in log.stream.getvalue()


def test_equal_settings_pass():
    require_equal(PATH, {"layers": [1], "mean": [0.1]}, {"layers": [1], "mean": [0.1]})


def test_weights_that_claim_another_width_are_refused_before_a_head_is_built():
    wide = replace(WEIGHTS, channels=2**15, levels=9)
    with pytest.raises(CheckpointError, match=r"levels is 9, .*; channels is 32768, this"):
        require_fit(PATH, wide, run_of(), BACKBONE)
