"""The cache: files that are whole, plain and exactly what the manifest promises."""

import errno
import io
import os
import pickle
import zipfile
from copy import copy
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from project import manifest_of

from utils.cache import (
    TileError,
    check_layout,
    check_tile,
    claim,
    drop_changed,
    load_tile,
    map_tile,
    places_in,
    stored_maps,
    tile_names,
    tile_path,
    write_tile,
)
from utils.manifest import (
    OVERHEAD,
    PROGRESS,
    CacheError,
    Manifest,
    read_manifest,
)
from utils.quantize import HALF, as_cached

SIZE = 32
NAME = "north__r000000_c000000"
RULES = {"num_classes": 3, "ids": {str(n): n for n in range(90)}, "unlisted": "error"}
MADE = manifest_of(
    channels=4,
    tile_size=SIZE,
    bands=[1, 2, 3],
    rgb=[0, 1, 2],
    label_rules=RULES,
    filters={"min_valid": 0.0, "min_labeled": 0.0, "background_keep": 1.0},
)
IDENTITY = {
    "bytes": 1, "modified": 2, "height": 64, "width": 64, "crs": None,
    "transform": [1.0, 0.0, 0.0, 0.0, 1.0, 0.0],
}  # fmt: skip


def content(seed: int = 0, made: Manifest = MADE) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "stamp": made.stamp_of(NAME),
        "image": torch.randint(0, 256, (3, SIZE, SIZE), generator=generator, dtype=torch.uint8),
        "features": [torch.randn(4, 2, 2, generator=generator).half() for _ in range(2)],
        "label": torch.randint(0, 3, (SIZE, SIZE), generator=generator, dtype=torch.uint8),
    }


@pytest.fixture
def tile(tmp_path) -> Path:
    """The file of a good tile."""
    write_tile(tmp_path, NAME, **content())
    return tile_path(tmp_path, NAME)


def test_a_tile_comes_back_as_it_was_written(tile):
    check_tile(tile, MADE)
    written, found = content(), load_tile(tile)
    assert torch.equal(found["image"], written["image"])
    assert torch.equal(found["label"], written["label"])
    for level, original in zip(found["features"], written["features"], strict=True):
        assert torch.equal(level, original)


@pytest.mark.parametrize("bands", [[1], [4, 3], [1, 2, 3, 4], list(range(1, 14))])
def test_a_tile_has_as_many_bands_as_the_manifest_says(tmp_path, bands):
    made = replace(MADE, bands=bands)
    image = torch.arange(len(bands), dtype=torch.uint8).view(-1, 1, 1).expand(-1, SIZE, SIZE)
    write_tile(tmp_path, NAME, **{**content(made=made), "image": image})
    check_tile(tile_path(tmp_path, NAME), made)
    assert torch.equal(load_tile(tile_path(tmp_path, NAME))["image"], image)
    with pytest.raises(TileError, match=r"image is \(\d+, 32, 32\) torch.uint8, expected"):
        check_tile(tile_path(tmp_path, NAME), replace(MADE, bands=[*bands, 20]))


def test_views_of_large_tensors_are_stored_as_small_copies(tmp_path):
    scene, batch = torch.zeros(3, 512, 512, dtype=torch.uint8), torch.zeros(64, 8, 6, 6).half()
    labels = torch.zeros(512, 512, dtype=torch.uint8)
    halves = batch[:, :4, :2, :2].contiguous()
    levels, stamp = [halves[5], batch[7, ::2, 1:3, 2:4]], MADE.stamp_of(NAME)
    image, label = scene[:, 64:96, 32:64], labels[:SIZE, 5 : SIZE + 5]
    write_tile(tmp_path, NAME, image, label, levels, stamp=stamp)
    path = tile_path(tmp_path, NAME)
    check_tile(path, MADE)
    stored = load_tile(path)
    assert stored.pop("stamp") == stamp
    for part in stored.values():
        assert type(part) is torch.Tensor
        assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int8, torch.float32])
def test_a_tile_of_a_batch_is_written_without_a_copy_as_a_copy_would_be(tmp_path, dtype):
    batch = torch.arange(3 * 2 * 4 * 4 * 8).to(dtype).view(3, 2, 4, 4, 8).permute(0, 1, 4, 2, 3)
    maps = stored_maps(batch[1])
    assert maps.data_ptr() == batch[1].data_ptr()
    assert (maps.stride(), maps.dtype) == (batch[1].stride(), dtype)
    image, label = content()["image"], content()["label"]
    write_tile(tmp_path, NAME, image, label, batch[1], stamp="of a cache")
    copies, copied = io.BytesIO(), batch[1].clone(memory_format=torch.preserve_format)
    parts = {"stamp": "of a cache", "image": image, "label": label, "features": copied}
    torch.save(parts, copies)
    assert tile_path(tmp_path, NAME).read_bytes() == copies.getvalue()


def test_a_file_is_hardly_larger_than_its_tensors(tmp_path):
    image = torch.zeros(3, 256, 256, dtype=torch.uint8)
    write_tile(tmp_path, NAME, image, image[0], [torch.zeros(1, 64, 16, 16).half()[0]] * 2)
    held = 4 * 256 * 256 + 2 * 64 * 256 * 2
    assert held <= tile_path(tmp_path, NAME).stat().st_size <= 1.05 * held


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_is_cut_short_leaves_no_tile(tmp_path, monkeypatch, error):
    def save(_, file):
        file.write(b"half")
        raise error

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(type(error)):
        write_tile(tmp_path, NAME, **content())
    assert list(tmp_path.iterdir()) == []


def test_an_older_tile_stays_until_the_new_one_is_whole(tile, monkeypatch):
    before = tile.read_bytes()

    def save(_, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(OSError, match="disk full"):
        write_tile(tile.parent, NAME, **content(1))
    assert tile.read_bytes() == before


# Damage


def test_whatever_byte_is_damaged_the_tile_is_condemned_or_unharmed(tile):
    """A flipped bit is found, or lies where nothing is stored; no other error escapes."""
    whole, found = tile.read_bytes(), load_tile(tile)
    condemned = 0
    for place in range(0, len(whole), 7):
        tile.write_bytes(whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :])
        try:
            check_tile(tile, MADE)
        except TileError as error:
            assert NAME in str(error)
            assert "\n" not in str(error)
            condemned += 1
        else:
            after = load_tile(tile)
            assert torch.equal(after["image"], found["image"])
            assert torch.equal(after["label"], found["label"])
            assert all(map(torch.equal, after["features"], found["features"]))
    assert condemned > len(whole) / 7 / 2


def test_wherever_a_tile_is_cut_it_is_condemned(tile):
    whole = tile.read_bytes()
    for kept in range(0, len(whole), 97):
        tile.write_bytes(whole[:kept])
        for look in (load_tile, lambda path: load_tile(path, mmap=True)):
            with pytest.raises(TileError, match=NAME):
                look(tile)
        with pytest.raises(TileError, match=NAME):
            check_tile(tile, MADE)


def test_a_mapped_tile_that_lacks_a_part_is_condemned_or_can_be_read(tile):
    """No page is touched that is not there."""
    whole, condemned = tile.read_bytes(), 0
    for start in range(0, len(whole), 131):
        tile.write_bytes(whole[:start] + whole[start + 700 :])
        try:
            stored = load_tile(tile, mmap=True)
            check_layout(tile.name, stored, MADE)
        except TileError:
            condemned += 1
        else:
            assert all(level.float().sum() is not None for level in stored["features"])
    assert condemned > len(whole) / 131 / 2


def test_loading_a_tile_with_a_damaged_directory_of_objects_is_a_tile_error(tile):
    """Its checksums are right: the file is crafted, or of foreign origin."""
    with zipfile.ZipFile(tile) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    objects = next(name for name in parts if name.endswith("data.pkl"))
    whole = parts[objects]
    for place in range(len(whole)):
        parts[objects] = whole[:place] + bytes([whole[place] ^ 0x12]) + whole[place + 1 :]
        with zipfile.ZipFile(tile, "w") as archive:
            for name, part in parts.items():
                archive.writestr(name, part)
        try:
            check_layout(NAME, load_tile(tile), MADE)
        except TileError as error:
            assert "\n" not in str(error)  # noqa: PT017


CHANGES = {
    "keys": lambda c: c.pop("label"),
    "more keys": lambda c: c.update(mask=c["label"]),
    "image is": lambda c: c.update(image=c["image"][:, :16]),
    "image is (3, 32, 32) torch.float32": lambda c: c.update(image=c["image"].float()),
    "label is": lambda c: c.update(label=c["label"].int()),
    "label values": lambda c: c["label"].fill_(3),
    "features is (1, 4, 2, 2)": lambda c: c.update(features=c["features"][:1]),
    "features is (2, 4, 2, 1)": lambda c: c.update(features=c["features"][..., :1]),
    "features is (2, 4, 2, 2) torch.float32": lambda c: c.update(features=c["features"].float()),
    "features[0] are not finite": lambda c: c["features"][0][3, 1, 1].fill_(torch.nan),
    "features[1] are not finite": lambda c: c["features"][1][0, 0, 0].fill_(-torch.inf),
    "image is <class 'list'>": lambda c: c.update(image=[1]),
}


@pytest.mark.parametrize("said", CHANGES)
def test_a_tile_that_is_not_what_the_manifest_promises_is_condemned(tile, said):
    stored = load_tile(tile)
    CHANGES[said](stored)
    torch.save(stored, tile)
    with pytest.raises(TileError) as caught:
        check_tile(tile, MADE)
    assert said.removeprefix("more ") in str(caught.value)


IN_BYTES = replace(MADE, feature_dtype="int8")


@pytest.fixture
def tile_of_bytes(tmp_path) -> Path:
    """The file of a good tile whose features are int8."""
    made = content(made=IN_BYTES)
    write_tile(tmp_path, NAME, **made | as_cached(made["features"], "int8"))
    return tile_path(tmp_path, NAME)


CHANGES_OF_BYTES = {
    "keys are not image, features, label, scales": lambda c: c.pop("scales"),
    "scales is (1, 2, 4)": lambda c: c.update(scales=c["scales"][:1]),
    "features is (1, 4, 2, 2)": lambda c: c.update(features=c["features"][:1]),
    "scales is (2, 2, 3)": lambda c: c.update(scales=c["scales"][..., :3]),
    "scales is (2, 2, 4) torch.float16": lambda c: c.update(scales=c["scales"].half()),
    "scales is <class 'list'>": lambda c: c.update(scales=[*c["scales"]]),
    "features is (2, 4, 2, 2) torch.float16": lambda c: c.update(features=c["features"].half()),
    "scales[1] are not finite": lambda c: c["scales"][1][0, 3].fill_(torch.inf),
    "scales[0] are not finite": lambda c: c["scales"][0][1, 0].fill_(torch.nan),
}


@pytest.mark.parametrize("said", CHANGES_OF_BYTES)
def test_a_tile_of_bytes_that_is_not_what_the_manifest_promises_is_condemned(tile_of_bytes, said):
    check_tile(tile_of_bytes, IN_BYTES)
    stored = load_tile(tile_of_bytes)
    CHANGES_OF_BYTES[said](stored)
    torch.save(stored, tile_of_bytes)
    with pytest.raises(TileError) as caught:
        check_tile(tile_of_bytes, IN_BYTES)
    assert said in str(caught.value)


@pytest.mark.parametrize("odd", [torch.inf, torch.nan])
def test_a_tile_made_of_what_is_no_number_is_condemned_as_bytes_too(tmp_path, odd):
    made = content(made=IN_BYTES)
    made["features"][1][2, 0, 1] = odd
    write_tile(tmp_path, NAME, **made | as_cached(made["features"], "int8"))
    with pytest.raises(TileError, match=r"scales\[1\] are not finite"):
        check_tile(tile_path(tmp_path, NAME), IN_BYTES)


def test_a_tile_of_another_feature_dtype_is_condemned(tile, tile_of_bytes, tmp_path):
    for made in (MADE, replace(MADE, feature_dtype="bf16")):
        with pytest.raises(TileError, match="keys are not image, features, label$"):
            check_tile(tile_of_bytes, made)
    write_tile(tmp_path, NAME, **content())
    check_tile(tile, MADE)
    with pytest.raises(TileError, match=r"features is .* torch.float16, expected .*bfloat16"):
        check_tile(tile, replace(MADE, feature_dtype="bf16"))
    with pytest.raises(TileError, match="keys are not image, features, label, scales"):
        check_tile(tile, IN_BYTES)


def test_ignored_pixels_are_no_label_values(tile):
    stored = load_tile(tile)
    stored["label"].fill_(MADE.ignore_index)
    torch.save(stored, tile)
    check_tile(tile, MADE)


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


@pytest.mark.parametrize("save", [torch.save, lambda o, p: p.write_bytes(pickle.dumps(o))])
def test_code_in_a_tile_is_never_run(tile, tmp_path, save):
    save({**content(), "image": Evil(tmp_path / "ran")}, tile)
    for look in (load_tile, lambda path: check_tile(path, MADE)):
        with pytest.raises(TileError):
            look(tile)
    assert not (tmp_path / "ran").exists()


def test_a_failing_read_is_not_the_tiles_fault(tile, monkeypatch):
    for error in (PermissionError(13, "denied"), OSError(5, "I/O error"), MemoryError()):

        def refuse(*_, error=error, **__):
            raise error

        with monkeypatch.context() as patched:
            patched.setattr(Path, "open", refuse)
            patched.setattr(io, "open", refuse)
            patched.setattr("builtins.open", refuse)
            patched.setattr("utils.artefacts.WAITS", (0, 0))
            for look in (load_tile, lambda path: check_tile(path, MADE)):
                with pytest.raises(OSError) as caught:
                    look(tile)
                assert caught.value.errno == getattr(error, "errno", errno.ENOMEM)
                assert caught.value.filename == str(tile)


def test_torch_out_of_memory_is_a_memory_error(tile, monkeypatch):
    def load(*_, **__):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(MemoryError):
        check_tile(tile, MADE)


# The manifest


DIFFERENCES = {
    "backbone_hash": ("f" * 64, "model.backbone"),
    "layers": ([1, 2], "model.layers"),
    "image_mean": ([0.1, 0.2, 0.3], "model.image_mean"),
    "precision": ("bf16", "resources.precision"),
    "feature_dtype": ("int8", "prepare.feature_dtype"),
    "tile_size": (64, "prepare.tile_size"),
    "num_classes": (4, "model.num_classes"),
    "ignore_index": (254, "dataset.ignore_index"),
    "image_std": ([0.1, 0.2, 0.3], "model.image_std"),
    "channels": (8, "model.dino_channels"),
    "patch_size": (8, "patch_size"),
    "cache": ("tiles", "dataset.cache"),
    "views": ([[False, False, 0], [True, False, 0]], "train.augment_views"),
    "format": (99, "format"),
    "bands": ([1, 2, 3, 4], "dataset.bands"),
    "rgb": ([2, 1, 0], "dataset.rgb"),
    "ranges": ([[0.0, 255.0], [0.0, 255.0], [9.0, 99.0]], "dataset.input_range"),
    "nodata": (0.0, "dataset.nodata"),
    "gsd": (0.25, "dataset.gsd"),
    "label_rules": (RULES | {"unlisted": "ignore"}, "dataset.classes and dataset.labels"),
    "filters": (
        {"min_valid": 0.5, "min_labeled": 0.0, "background_keep": 1.0},
        "prepare.min_valid, min_labeled, background_keep, resources.seed",
    ),
    "norm": ("none", "norm"),
}


@pytest.mark.parametrize("field", DIFFERENCES)
def test_a_cache_made_with_other_settings_is_refused_in_one_line(tmp_path, field):
    claim(MADE, tmp_path)
    value, key = DIFFERENCES[field]
    with pytest.raises(CacheError) as caught:
        claim(replace(MADE, **{field: value}), tmp_path)
    line = str(caught.value)
    assert f"made with {field} " in line
    assert f"({key})" in line
    assert "delete the folder" in line
    assert "\n" not in line
    assert len(line) < len(str(tmp_path)) + 350
    assert read_manifest(tmp_path) == MADE


def test_of_many_label_rules_the_one_that_differs_is_named(tmp_path):
    claim(MADE, tmp_path)
    ids = RULES["ids"] | {"41": 7}
    with pytest.raises(CacheError, match="made with label_rules .*'unlisted': 'error'") as caught:
        claim(replace(MADE, label_rules=RULES | {"unlisted": "ignore"}), tmp_path)
    assert "'ids'" not in str(caught.value)
    with pytest.raises(CacheError, match=r"made with label_rules \{'ids': "):
        claim(replace(MADE, label_rules=RULES | {"ids": ids}), tmp_path)


def test_classes_that_are_renamed_or_coloured_anew_go_on_with_the_cache(tmp_path):
    claim(MADE, tmp_path)
    names, colors = ["wood", "meadow", "lake"], [[0, 9, 0], [9, 9, 0], [0, 0, 9]]
    found = claim(replace(MADE, class_names=names, class_colors=colors), tmp_path)
    assert (found.class_names, found.class_colors) == (names, colors)
    drop_changed(found, {"north": IDENTITY}, tmp_path)
    assert read_manifest(tmp_path).class_names == names


def test_every_field_but_progress_is_in_the_test_above():
    assert {each.name for each in fields(Manifest)} - PROGRESS == set(DIFFERENCES)


def test_of_several_differences_each_field_is_named(tmp_path):
    """Another backbone differs in channels as well; what the reader changed comes first."""
    claim(MADE, tmp_path)
    other = replace(MADE, backbone_hash="f" * 64, channels=8, layers=[1, 2], tile_size=64)
    with pytest.raises(CacheError) as caught:
        claim(other, tmp_path)
    said = str(caught.value).partition("made with ")[2].split("; ")
    assert said[:4] == [
        "backbone_hash 000000000000..., this run has ffffffffffff... (model.backbone)",
        "layers [0, 1], this run has [1, 2] (model.layers)",
        "channels 4, this run has 8 (model.dino_channels)",
        "tile_size 32, this run has 64 (prepare.tile_size)",
    ]
    assert len(said) == 5


# Stamps


@pytest.mark.parametrize("name", sorted(set(DIFFERENCES) - {"filters"}))
def test_a_tile_of_a_cache_that_differs_in_any_field_is_not_used(tmp_path, name):
    """Its shapes may well be the same."""
    value, _ = DIFFERENCES[name]
    other = replace(MADE, **{name: value})
    assert other.fingerprint != MADE.fingerprint
    write_tile(tmp_path, NAME, **content(made=other))
    with pytest.raises(TileError, match="of another cache or place") as caught:
        check_tile(tile_path(tmp_path, NAME), MADE)
    assert repr(other.stamp_of(NAME)) in str(caught.value)
    assert repr(MADE.stamp_of(NAME)) in str(caught.value)


def test_a_tile_at_another_place_or_of_an_older_scene_is_not_used(tile):
    scenes = {"north": IDENTITY}
    now = replace(MADE, scenes=scenes)
    write_tile(tile.parent, NAME, **content(made=now))
    check_tile(tile, now)
    elsewhere = tile.rename(tile.with_name("north__r000000_c000032.pt"))
    with pytest.raises(TileError, match="of another cache or place"):
        check_tile(elsewhere, now)
    write_tile(tile.parent, NAME, **content(made=now))
    for change in ({"modified": 3}, {"labels": {"0 l.tif": {"bytes": 9, "modified": 1}}}):
        later = replace(MADE, scenes={"north": IDENTITY | change})
        with pytest.raises(TileError, match="of another cache or place"):
            check_tile(tile, later)


def test_a_files_size_is_known_before_it_is_made(tmp_path):
    for made in (MADE, IN_BYTES, replace(MADE, cache="tiles")):
        parts = content(made=made)
        if made.cache == "tiles":
            del parts["features"]
        elif made is IN_BYTES:
            parts |= as_cached(parts["features"], "int8")
        write_tile(tmp_path, NAME, **parts)
        check_tile(tile_path(tmp_path, NAME), made)
        size = tile_path(tmp_path, NAME).stat().st_size
        assert made.tile_bytes - OVERHEAD < size <= made.tile_bytes


# Where a tile's parts lie


KINDS = {
    "fp16": {}, "bf16": {"feature_dtype": "bf16"}, "int8": {"feature_dtype": "int8"},
    "tiles": {"cache": "tiles"}, "many classes": {"label_rules": RULES | {"num_classes": 300}},
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_mapped_tile_is_what_loading_it_gives(tmp_path, kind):
    made = replace(MADE, **KINDS[kind])
    stored = content(made=made)
    features = torch.stack(stored.pop("features"))
    if made.cache == "features":
        stored |= as_cached(features.to(HALF[made.feature_dtype]), made.feature_dtype)
    stored["label"] = stored["label"].to(made.label_dtype)
    write_tile(tmp_path, NAME, **stored)
    path = tile_path(tmp_path, NAME)
    mapped, loaded = map_tile(path, made, places_in(path, made)), load_tile(path)
    assert list(mapped) == list(made.parts)
    for part, found in mapped.items():
        assert found.dtype == loaded[part].dtype
        assert found.stride() == loaded[part].stride()
        assert torch.equal(found, loaded[part])


def test_what_is_done_to_a_mapped_tile_does_not_reach_its_file(tile):
    whole = tile.read_bytes()
    mapped = map_tile(tile, MADE, places_in(tile, MADE))
    mapped["label"].fill_(7)
    assert tile.read_bytes() == whole


def test_a_file_that_took_the_place_of_another_is_not_mapped_by_its_places(tile):
    places = places_in(tile, MADE)
    write_tile(tile.parent, NAME, **content(seed=1))
    assert map_tile(tile, MADE, places) is None
    again = map_tile(tile, MADE, places_in(tile, MADE))
    assert torch.equal(again["image"], content(seed=1)["image"])


def test_a_file_that_changed_in_place_is_not_mapped_by_its_places(tile):
    places = places_in(tile, MADE)
    with tile.open("r+b") as file:
        file.write(b"PK")
    later = tile.stat().st_mtime_ns + 1
    os.utime(tile, ns=(later, later))
    assert map_tile(tile, MADE, places) is None


@pytest.mark.parametrize("part", ["image", "features", "label"])
def test_a_part_of_a_larger_storage_has_no_place(tile, part):
    stored = load_tile(tile)
    like = stored[part]
    larger = torch.zeros(2 * like.numel(), dtype=like.dtype)
    stored[part] = larger.as_strided(like.shape, like.stride(), like.numel())
    torch.save(stored, tile)
    with pytest.raises(TileError, match=f"{part} does not lie in memory"):
        places_in(tile, MADE)


def test_a_part_that_claims_bytes_past_the_end_of_the_file_has_no_place(tile, monkeypatch):
    whole = torch.load

    def load(*arguments, **options):
        found = whole(*arguments, **options)
        found["label"].untyped_storage()._checkpoint_offset = tile.stat().st_size - SIZE
        return found

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(TileError, match="label does not lie in memory"):
        places_in(tile, MADE)


# What a crafted file may claim


def crafted(tile: Path, compress: int, change=lambda name, data: data) -> None:
    """Write the file again with other members."""
    with zipfile.ZipFile(tile) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tile, "w", compress) as archive:
        for name, part in parts.items():
            archive.writestr(name, change(name, part))


LOOKS = {
    "verify": lambda path: check_tile(path, MADE),
    "train": lambda path: places_in(path, MADE),
    "prepare": lambda path: check_layout(path.name, load_tile(path, mmap=True), MADE),
}


@pytest.mark.parametrize("look", LOOKS)
def test_a_file_that_would_swell_is_refused_before_it_is_unpacked(tile, look, monkeypatch):
    crafted(tile, zipfile.ZIP_DEFLATED)
    monkeypatch.setattr(torch, "load", None)  # nothing is unpacked
    with pytest.raises(TileError, match="compressed"):
        LOOKS[look](tile)


@pytest.mark.parametrize("look", LOOKS)
def test_members_that_share_their_bytes_are_refused(tile, look, monkeypatch):
    """As in a bomb of overlapping members: each is stored, together they are more than the file."""
    stored = tile.read_bytes()
    with zipfile.ZipFile(tile) as archive:
        largest = max(archive.infolist(), key=lambda each: each.file_size)
        with zipfile.ZipFile(tile, "a") as swollen:
            for number in range(9):
                again = copy(largest)
                again.filename = f"{largest.filename[:-1]}{number + 3}"
                swollen.filelist.append(again)
            swollen._didModify = True
    assert len(tile.read_bytes()) < 2 * len(stored)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(TileError, match="claim more bytes"):
        LOOKS[look](tile)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("part", ["image", "features", "label"])
def test_a_tensor_that_is_wider_than_its_memory_is_refused(tile, look, part):
    stored = load_tile(tile)
    stored[part] = torch.zeros(1, dtype=stored[part].dtype).expand(stored[part].shape)
    torch.save(stored, tile)
    with pytest.raises(TileError, match=f"{part} does not lie in memory"):
        LOOKS[look](tile)


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("part", ["image", "features", "label"])
def test_a_tensor_without_values_is_refused(tile, look, part):
    stored = load_tile(tile)
    torch.save(stored | {part: stored[part].to("meta")}, tile)
    with pytest.raises(TileError, match=f"{part} has no values"):
        LOOKS[look](tile)


def test_a_file_far_larger_than_a_tile_is_not_read(tile):
    with tile.open("ab") as file:
        file.truncate(3 * MADE.tile_bytes + (1 << 20))
    with pytest.raises(TileError, match="larger than 1 MiB"):
        check_tile(tile, MADE)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="POSIX pipes")
def test_what_is_no_plain_file_is_not_waited_for(tile):
    tile.unlink()
    os.mkfifo(tile)
    with pytest.raises(TileError, match="not a plain file"):
        check_tile(tile, MADE)
    assert tile_names(tile.parent, replace(MADE, scenes={"north": IDENTITY})) == []


def test_the_same_weights_under_another_name_go_on_with_the_cache(tmp_path):
    made = claim(replace(MADE, scenes={"north": IDENTITY}), tmp_path)
    assert claim(replace(MADE, backbone="/elsewhere"), tmp_path) == made


def test_a_folder_with_tiles_of_unknown_origin_is_refused(tile):
    with pytest.raises(CacheError, match="no manifest.json"):
        claim(MADE, tile.parent)
    assert tile.exists()


# Scenes that change


def cached(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.pt").write_bytes(b"")


AT = ["north__r000000_c000000", "north__r000000_c000032"]


def test_only_the_tiles_of_a_changed_scene_are_dropped(tmp_path):
    cached(tmp_path, *AT, "south__r000000_c000000", "notes", "north__notes")
    other = {**IDENTITY, "modified": 3}
    found = replace(MADE, scenes={"north": IDENTITY, "south": IDENTITY}, complete=True)
    changed = drop_changed(found, {"north": other, "south": IDENTITY}, tmp_path)
    assert changed == ["north"]
    assert sorted(path.stem for path in tmp_path.glob("*.pt")) == [
        "north__notes", "notes", "south__r000000_c000000",
    ]  # fmt: skip
    assert read_manifest(tmp_path).scenes["north"] == other
    assert not read_manifest(tmp_path).complete


def test_a_scene_that_was_taken_away_changed_and_came_back_is_made_again(tmp_path):
    cached(tmp_path, "north__r000000_c000000", "south__r000000_c000000")
    found = replace(MADE, scenes={"north": IDENTITY, "south": IDENTITY})
    assert drop_changed(found, {"south": IDENTITY}, tmp_path) == []
    found = read_manifest(tmp_path)
    assert tile_names(tmp_path, found) == ["south__r000000_c000000"]
    both = {"north": {**IDENTITY, "modified": 3}, "south": IDENTITY}
    assert drop_changed(found, both, tmp_path) == ["north"]
    assert tile_names(tmp_path, read_manifest(tmp_path)) == ["south__r000000_c000000"]


def test_a_scene_that_came_back_as_it_was_keeps_its_tiles(tmp_path):
    found = replace(MADE, scenes={"north": IDENTITY})
    stamp = found.stamp_of(NAME)
    write_tile(tmp_path, NAME, **content() | {"stamp": stamp})
    assert drop_changed(found, {}, tmp_path) == []
    changed = {"north": {**IDENTITY, "modified": 3}}
    before = tile_path(tmp_path, NAME).stat().st_ctime_ns
    assert drop_changed(read_manifest(tmp_path), {"north": IDENTITY}, tmp_path) == []
    assert tile_path(tmp_path, NAME).stat().st_ctime_ns == before
    assert drop_changed(read_manifest(tmp_path), changed, tmp_path) == ["north"]
    assert not tile_path(tmp_path, NAME).exists()


def test_a_pipe_in_a_tile_s_place_is_not_waited_for(tmp_path):
    os.mkfifo(tile_path(tmp_path, NAME))
    assert drop_changed(MADE, {"north": IDENTITY}, tmp_path) == ["north"]


def test_a_new_scene_is_not_called_changed(tmp_path):
    assert drop_changed(MADE, {"north": IDENTITY}, tmp_path) == []


def test_files_of_other_origin_are_no_tiles(tmp_path):
    cached(tmp_path, AT[0], "a__b__r000000_c000000", "notes", "gone__r000000_c000000", f".{AT[1]}")
    cached(tmp_path, "north__r000001_c000000", "north__r000064_c000000", "north__notes")
    (tmp_path / f"{AT[1]}.txt").write_text("")
    made = replace(MADE, scenes={"north": IDENTITY, "a__b": IDENTITY})
    assert tile_names(tmp_path, made) == ["a__b__r000000_c000000", "north__r000000_c000000"]
