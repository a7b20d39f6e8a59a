"""What manifests and checkpoints say of themselves is believed only where it can be."""

import math
from dataclasses import replace

import project
import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.claims import contradicting, odd_scene
from utils.manifest import CacheError, read_manifest, write_manifest

SOUND = project.manifest_of()
SCENE = {
    "height": 100, "width": 130, "crs": None, "transform": [0.5, 0.0, 400.0, 0.0, -0.5, 500.0],
    "bytes": 9, "modified": 1, "labels": {"0 labels.tif": {"bytes": 5, "modified": 1}},
}  # fmt: skip


def test_what_prepare_says_is_believed():
    assert contradicting(SOUND) == []
    assert not odd_scene(SCENE)


@pytest.mark.parametrize(
    ("field", "odd"),
    [
        ("bands", []), ("bands", [0, 1, 2]),
        ("ranges", [[0.0, 255.0]]), ("ranges", [[1.0, 1.0]] * 3),
        ("ranges", [[0.0, math.nan]] * 3), ("ranges", [[0.0, 1.0, 2.0]] * 3), ("rgb", [0, 1]),
        ("rgb", [0, 1, 3]), ("rgb", [-1, 1, 2]),
        ("image_mean", [0.5]), ("image_mean", [math.inf] * 3),
        ("image_std", [0.25, 0.0, 0.25]), ("image_std", [math.nan] * 3), ("gsd", 0.0),
        ("gsd", -1.0), ("ground_gsd", 0.0), ("ground_gsd", math.nan), ("layers", []),
        ("layers", [-1, 2]), ("layers", [2, 2]),
        ("channels", 0), ("channels", 2**31), ("tile_size", 0),
        ("tile_size", -64), ("tile_size", 65), ("patch_size", 0), ("ignore_index", 1),
        ("ignore_index", 2**31), ("num_classes", 0), ("class_names", ["field"]),
        ("class_colors", [[0, 0, 0]]), ("class_colors", [[0, 0, 256]] * project.CLASSES),
        ("class_colors", [[0, 0]] * project.CLASSES), ("feature_dtype", "fp8"),
        ("precision", "fp16"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_by_its_field(field, odd):
    assert any(field in name for name in contradicting(replace(SOUND, **{field: odd})))


@pytest.mark.parametrize(
    "change",
    [
        {"height": 0}, {"width": "130"}, {"height": True}, {"width": 2**40}, {"crs": 4326},
        {"transform": [1.0] * 5}, {"transform": [0.0] * 6}, {"transform": [math.nan] * 6},
        {"labels": []}, {"labels": {"a": 5}}, {"bytes": "9"}, {"odd": 1},
    ],
)  # fmt: skip
def test_an_odd_account_of_a_scene_is_told(change):
    assert odd_scene(SCENE | change)


@pytest.mark.parametrize(
    "change",
    [
        {"cache": "tile"}, {"views": []}, {"views": [[True, False, 0]]}, {"views": [[0, 0, 0]]},
        {"scenes": {"north": {"height": 5}}}, {"tiles": {"north__r000000_c000000": [1]}},
        {"tiles": {"north__r000000_c000000": [-1] * project.CLASSES}}, {"rgb": [0]},
    ],
)  # fmt: skip
def test_a_manifest_that_means_nothing_is_refused_though_its_checksum_is_right(tmp_path, change):
    write_manifest(replace(SOUND, **change), tmp_path)
    with pytest.raises(CacheError, match=f"not a manifest .*{next(iter(change))}"):
        read_manifest(tmp_path)


@given(st.integers(1, 200), st.integers(1, 16), st.integers(1, 300))
def test_every_size_that_is_whole_patches_is_one(tiles, patch, classes):
    made = project.manifest_of(
        tile_size=tiles * patch, patch_size=patch, num_classes=classes, ignore_index=classes
    )
    assert contradicting(made) == []
