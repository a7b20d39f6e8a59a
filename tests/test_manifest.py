"""The manifest: what is written comes back, and anything else is refused by name."""

import json
from dataclasses import asdict, fields, replace

import pytest
import torch
from project import manifest_of

from utils.manifest import (
    COPY,
    MANIFEST,
    PROGRESS,
    CacheError,
    Manifest,
    checksum_of,
    read_manifest,
    restored,
    write_manifest,
)

NAME = "north__r000000_c000000"
MADE = manifest_of(filters={"min_valid": 0.0})
IDENTITY = {
    "bytes": 1, "modified": 2, "height": 64, "width": 64, "crs": None,
    "transform": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
}  # fmt: skip


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    made = replace(MADE, scenes={"north": IDENTITY}, tiles={NAME: [1000, 0, 24]}, complete=True)
    write_manifest(made, tmp_path)
    assert read_manifest(tmp_path) == made
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST, COPY}
    assert restored(tmp_path) == ""


def lost(path):
    path.unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


@pytest.mark.parametrize("harm", [lost, cut])
def test_a_manifest_that_is_lost_or_damaged_is_written_again_from_its_copy(tmp_path, harm):
    made = replace(MADE, scenes={"north": IDENTITY}, tiles={NAME: [1000, 0, 24]}, complete=True)
    write_manifest(made, tmp_path)
    harm(tmp_path / MANIFEST)
    assert restored(tmp_path).endswith("it is written again from manifest.copy.json")
    assert read_manifest(tmp_path) == made
    harm(tmp_path / COPY)
    assert restored(tmp_path) == ""
    assert read_manifest(tmp_path) == made


@pytest.mark.parametrize("harm", [lost, cut])
def test_a_manifest_whose_copy_is_no_better_is_told_as_it_is(tmp_path, harm):
    write_manifest(MADE, tmp_path)
    cut(tmp_path / MANIFEST)
    harm(tmp_path / COPY)
    before = (tmp_path / MANIFEST).read_bytes()
    assert restored(tmp_path) == ""
    assert (tmp_path / MANIFEST).read_bytes() == before
    with pytest.raises(CacheError, match=r"manifest\.json: not a manifest"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [("{", "not a manifest"), ("[" * 10**5, "not a manifest"), ("{}", "not a manifest"),
     ("[]", "not a manifest"), ("null", "not a manifest"),
     ('{"format": 1}', "not a manifest"), ('{"format": 99}', "format 99, expected 4")],
)  # fmt: skip
def test_a_manifest_that_cannot_be_read_is_refused(tmp_path, text, said):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(CacheError, match=said):
        read_manifest(tmp_path)


def test_a_folder_without_manifest_says_to_prepare(tmp_path):
    with pytest.raises(CacheError, match="run prepare first"):
        read_manifest(tmp_path)


def test_a_folder_in_the_manifest_s_place_is_to_be_removed(tmp_path):
    (tmp_path / MANIFEST).mkdir()
    with pytest.raises(CacheError, match=r"manifest\.json: is no plain file; remove it$"):
        read_manifest(tmp_path)


def test_a_cache_of_the_older_format_says_to_delete_it(tmp_path):
    (tmp_path / MANIFEST).write_text(json.dumps(asdict(MADE) | {"format": 3}))
    with pytest.raises(CacheError, match=f"format 3, expected 4.*; delete {tmp_path}"):
        read_manifest(tmp_path)


def test_progress_and_filters_leave_the_fingerprint_as_it_is():
    other = replace(
        MADE, backbone="elsewhere", scenes={"north": IDENTITY}, tiles={NAME: [1]}, complete=True,
        auto_range=True, ground_gsd=0.5, class_names=["a"], class_colors=[[0, 0, 0]],
        filters={"min_valid": 0.5},
    )  # fmt: skip
    assert other.fingerprint == MADE.fingerprint
    assert PROGRESS - {"fingerprint"} | {"filters"} == {
        each.name
        for each in fields(Manifest)
        if each.init and getattr(other, each.name) != getattr(MADE, each.name)
    }


def test_a_manifest_that_was_edited_is_refused(tmp_path):
    write_manifest(MADE, tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    (tmp_path / MANIFEST).write_text(text.replace('"ignore_index": 255', '"ignore_index": 254'))
    with pytest.raises(CacheError, match="damaged: it is not what its checksum is of"):
        read_manifest(tmp_path)


def test_json_of_the_manifest_is_readable(tmp_path):
    write_manifest(MADE, tmp_path)
    told = json.loads((tmp_path / MANIFEST).read_text())
    assert len(told.pop("checksum")) == 64
    assert told == asdict(MADE)


def test_a_manifest_in_which_a_number_was_changed_is_refused(tmp_path):
    write_manifest(MADE, tmp_path)
    path = tmp_path / MANIFEST
    changed = path.read_text().replace(f'"tile_size": {MADE.tile_size}', '"tile_size": 512')
    path.write_text(changed)
    with pytest.raises(CacheError, match="not what its checksum is of"):
        read_manifest(tmp_path)


def test_labels_have_the_smallest_type_that_holds_them():
    assert MADE.label_dtype == torch.uint8
    assert replace(MADE, ignore_index=256).label_dtype == torch.int32
    assert replace(MADE, num_classes=300, ignore_index=65535).label_dtype == torch.int32


@pytest.mark.parametrize(("name", "odd"), [("scenes", []), ("tiles", {"a": [1.5]}), ("rgb", "012")])
def test_a_manifest_with_an_entry_of_another_type_is_refused_by_name(tmp_path, name, odd):
    write_manifest(MADE, tmp_path)
    path = tmp_path / "manifest.json"
    content = json.loads(path.read_text())
    content.pop("checksum")
    content[name] = odd
    path.write_text(json.dumps(content | {"checksum": checksum_of(content)}))
    with pytest.raises(CacheError, match=f"not a manifest .*prepare does not write: .*{name}"):
        read_manifest(tmp_path)
