"""Splits: lists and polygons mean what they say, and no ground is on both sides."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyogrio.raw
import pytest
import shapely
from ground import UTM, alike, laid, moved, scene

from config import Splits
from utils.footprints import Footprints
from utils.logging import VerbosityLogger
from utils.splits import (
    Split,
    SplitError,
    audit,
    split_by_blocks,
    split_by_lists,
    split_by_regions,
)
from utils.vectors import VectorError


def grid(scene: str, rows: int, cols: int) -> list[str]:
    return [f"{scene}__r{64 * r:06d}_c{64 * c:06d}" for r in range(rows) for c in range(cols)]


NAMES = grid("north", 2, 3) + grid("south", 1, 2) + grid("a b__c", 1, 1)
PLACES = Footprints(NAMES, np.array([shapely.box(n, 0, n + 1, 1) for n in range(9)]), None)


@pytest.fixture
def split(tmp_path):
    """Split NAMES by the text of two lists."""

    def by(train: str | bytes, val: str | bytes) -> Split:
        for name, text in (("train.txt", train), ("val.txt", val)):
            data = text if isinstance(text, bytes) else text.encode()
            (tmp_path / name).write_bytes(data)
        return split_by_lists(PLACES, tmp_path / "train.txt", tmp_path / "val.txt")

    return by


def test_a_list_names_tiles_and_whole_scenes(split):
    found = split(f"{NAMES[2]}\n{NAMES[0]}\nsouth\n", f"{NAMES[1]}\na b__c\n")
    assert found == Split(sorted([NAMES[0], NAMES[2], *grid("south", 1, 2)]),
                          sorted([NAMES[1], *grid("a b__c", 1, 1)]))  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["# all of it\nsouth # both tiles\n\n   \n#north\n", "\r\nsouth\r\n\r\n", "\n\n  south\t\n",
     "\ufeffsouth\n", b"\xef\xbb\xbf# made on Windows\r\nsouth\r\n", "south", "south\nsouth\n"],
)  # fmt: skip
def test_comments_blank_lines_and_windows_files_are_understood(split, text):
    assert split("north", text).val == grid("south", 1, 2)


def test_an_unknown_name_is_told_with_its_line_and_the_nearest_one(split, tmp_path):
    with pytest.raises(SplitError) as caught:
        split("# train\n\nnorht\n", "south")
    assert str(caught.value) == (
        f"{tmp_path / 'train.txt'}:3: no cached tile or scene is called 'norht', "
        "did you mean 'north'?"
    )
    with pytest.raises(SplitError, match=r"val\.txt:1: .*'elsewhere'$"):
        split("north", "elsewhere")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeff\n"])
def test_an_empty_side_is_an_error(split, text):
    with pytest.raises(SplitError, match=r"val\.txt: names no tile"):
        split("north", text)
    with pytest.raises(SplitError, match=r"train\.txt: names no tile"):
        split(text, "north")


def test_a_tile_on_both_sides_is_an_error(split):
    with pytest.raises(SplitError, match="1 tile.s. are in .*on one side only") as caught:
        split("north", f"south\n{NAMES[1]}")
    assert NAMES[1] in str(caught.value)


def test_a_missing_or_foreign_list_is_named(split, tmp_path):
    with pytest.raises(SplitError, match=r"gone\.txt: no such file"):
        split_by_lists(PLACES, tmp_path / "gone.txt", tmp_path / "gone.txt")
    with pytest.raises(SplitError, match=r"val\.txt: not a UTF-8 text file"):
        split("north", b"s\xfcd\n")


# Polygons

WEST, NORTH, SIDE = 412000.0, 5326000.0, 32.0  # of the scene and its tiles, 8 x 8 of them
PLAIN = laid(a=scene(512, 512))
OTHER = "EPSG:3857"


def area(left: float, right: float, top: float = 0, bottom: float = 8) -> shapely.Polygon:
    """A rectangle of the scene, from column to column and row to row of its tiles."""
    return shapely.box(
        WEST + SIDE * left, NORTH - SIDE * bottom, WEST + SIDE * right, NORTH - SIDE * top
    )


def write(
    path: Path, polygons: Sequence, sides: Sequence | None = None, crs: str = UTM, field="split"
) -> Path:
    """A file of polygons, given in UTM, with their sides; sides of None: without the field."""
    polygons = shapely.segmentize(np.array(polygons), 20)
    if crs != UTM:
        polygons = shapely.transform(polygons, lambda xy: np.array(moved(UTM, crs, *xy)))
    columns = {} if sides is None else {field: np.array(sides, object)}
    if path.suffix == ".geojson":
        features = [
            {
                "type": "Feature",
                "properties": {name: column[number] for name, column in columns.items()},
                "geometry": json.loads(shapely.to_geojson(polygon)),
            }
            for number, polygon in enumerate(polygons)
        ]
        member = {"type": "name", "properties": {"name": crs}}
        collection = {"type": "FeatureCollection", "crs": member, "features": features}
        path.write_text(json.dumps(collection))
        return path
    pyogrio.raw.write(
        path, shapely.to_wkb(polygons), list(columns.values()), list(columns),
        geometry_type="Polygon", crs=crs,
    )  # fmt: skip
    return path


def columns_of(names: Sequence[str]) -> set[int]:
    return {int(name[-6:]) // 64 for name in names}


FORMATS = [
    pytest.param(suffix, crs, id=f"{suffix} {crs}")
    for suffix in (".geojson", ".gpkg")
    for crs in (UTM, OTHER, "EPSG:4326")
]


@pytest.mark.parametrize(("suffix", "crs"), FORMATS)
def test_a_tile_belongs_where_its_footprint_lies(tmp_path, log, suffix, crs):
    """Columns 0 and 1 train, 2 straddles, 3 validates, 4 and 5 are for testing, 6 straddles."""
    areas = [area(-1, 2.5), area(2.5, 4), area(4, 6), area(6.5, 6.9)]
    path = write(tmp_path / f"regions{suffix}", areas, ["train", "val", "test", "train"], crs)
    found = split_by_regions(PLAIN, path, log)
    sides = found.train, found.val, found.test, found.dropped
    assert [columns_of(names) for names in sides] == [{0, 1}, {3}, {4, 5}, {2, 6}]
    assert [len(names) for names in sides] == [16, 8, 16, 16]
    assert (
        f"train: regions{suffix}: 16 tiles train, 8 validate, 16 are for testing; dropped 16 that "
        "straddle regions, 8 outside of them"
    ) in log.stream.getvalue()


def test_a_region_in_several_polygons_is_one(tmp_path, log):
    """Two that meet in the middle of a column, in another CRS, and one over both."""
    areas = [area(0, 1.5), area(1.5, 4, 0, 3), area(1.5, 4, 3, 8), area(0.2, 3, 2, 5), area(5, 8)]
    sides = ["train"] * 4 + ["val"]
    found = split_by_regions(PLAIN, write(tmp_path / "r.gpkg", areas, sides, OTHER), log)
    assert (len(found.train), len(found.val)) == (32, 24)
    assert columns_of(found.dropped) == set()


def test_a_hole_in_a_region_is_outside(tmp_path, log):
    hole = shapely.difference(area(0, 4), area(1, 3, 2, 4))
    found = split_by_regions(
        PLAIN, write(tmp_path / "r.geojson", [hole, area(4, 8)], ["train", "val"]), log
    )
    assert len(found.train) == 32 - 4
    assert found.dropped == []


def test_a_tile_in_two_regions_is_on_neither_side(tmp_path, log):
    areas = [area(0, 5), area(4, 8), area(2, 3)]
    path = write(tmp_path / "r.geojson", areas, ["train", "val", "test"])
    found = split_by_regions(PLAIN, path, log)
    assert columns_of(found.train) == {0, 1, 3}
    assert columns_of(found.val) == {5, 6, 7}
    assert columns_of(found.dropped) == {2, 4}
    assert found.test == []


def test_test_tiles_are_on_neither_side(tmp_path, log):
    areas = [area(0, 2), area(2, 5), area(5, 8)]
    path = write(tmp_path / "r.geojson", areas, ["train", "test", "val"])
    found = split_by_regions(PLAIN, path, log)
    assert not set(found.test) & set(found.train + found.val + found.dropped)
    assert len(found.test) == 24
    audit(found, PLAIN, alike(PLAIN), ["a", "b", "c"], log)


def test_a_multipolygon_is_all_of_its_parts(tmp_path, log):
    both = shapely.MultiPolygon([area(0, 2), area(6, 8)])
    path = write(tmp_path / "r.geojson", [both, area(3, 5)], ["train", "val"])
    assert columns_of(split_by_regions(PLAIN, path, log).train) == {0, 1, 6, 7}


def line_of(error: type[Exception], call, *arguments) -> str:
    """What an error says, which is one line and ends the program as bad data does."""
    with pytest.raises(error) as caught:
        call(*arguments)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg"])
@pytest.mark.parametrize("odd", ["training", "Train", "", "validation"])
def test_an_odd_split_value_is_told_in_a_line(tmp_path, log, suffix, odd):
    path = write(tmp_path / f"r{suffix}", [area(0, 2), area(3, 5)], ["train", odd])
    line = line_of(SplitError, split_by_regions, PLAIN, path, log)
    assert line == f"{path}: split is '{odd}' somewhere, expected train, val or test"


def test_a_region_without_a_value_is_told_in_a_line(tmp_path, log):
    path = write(tmp_path / "r.geojson", [area(0, 2), area(3, 5)], ["train", None])
    assert "split is 'None' somewhere" in line_of(SplitError, split_by_regions, PLAIN, path, log)


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg"])
def test_a_missing_field_is_told_in_a_line(tmp_path, log, suffix):
    path = write(tmp_path / f"r{suffix}", [area(0, 2), area(3, 5)], ["train", "val"], field="splt")
    line = line_of(VectorError, split_by_regions, PLAIN, path, log)
    assert line.startswith(f"{path}: has no attribute 'split', did you mean 'splt'?")
    path = write(tmp_path / f"none{suffix}", [area(0, 2), area(3, 5)])
    assert "no attribute 'split'" in line_of(VectorError, split_by_regions, PLAIN, path, log)


@pytest.mark.parametrize("lacking", ["train", "val"])
def test_a_side_without_a_tile_is_told_in_a_line(tmp_path, log, lacking):
    other = {"train": "val", "val": "train"}[lacking]
    for areas in ([area(0, 3), area(4.2, 5.7)], [area(0, 3), area(20, 30)]):
        path = write(tmp_path / "r.geojson", areas, [other, lacking])
        line = line_of(SplitError, split_by_regions, PLAIN, path, log)
        assert line.startswith(f"{path}: no tile lies inside the {lacking} region")
    path = write(tmp_path / "r.geojson", [area(0, 3)], [other])
    assert lacking in line_of(SplitError, split_by_regions, PLAIN, path, log)


@pytest.mark.parametrize("name", ["gone.geojson", "gone.gpkg", "regions.txt", "notes.tif"])
def test_a_file_that_is_no_vector_file_is_named(tmp_path, log, name):
    line = line_of(VectorError, split_by_regions, PLAIN, tmp_path / name, log)
    assert line.startswith(f"{tmp_path / name}: no ")


def test_polygons_need_scenes_with_a_place(tmp_path, log):
    nowhere = laid(a=scene(512, 512, crs=None))
    path = write(tmp_path / "r.geojson", [area(0, 2), area(3, 5)], ["train", "val"])
    for call in (split_by_regions, split_by_lists):
        last = log if call is split_by_regions else path
        line = line_of(SplitError, call, nowhere, path, last)
        assert line == f"{path}: polygons need scenes with a CRS; list tiles or scenes instead"


@pytest.mark.parametrize(("suffix", "crs"), FORMATS)
def test_lists_may_be_polygons(tmp_path, suffix, crs):
    train = write(tmp_path / f"train{suffix}", [area(0, 2), area(2, 3.5)], crs=crs)
    val = write(tmp_path / f"val{suffix}", [area(4.5, 8)], crs=crs)
    found = split_by_lists(PLAIN, train, val)
    assert [columns_of(found.train), columns_of(found.val)] == [{0, 1, 2}, {5, 6, 7}]
    assert columns_of(found.dropped) == {3, 4}
    assert (len(found.train), len(found.val), len(found.dropped)) == (24, 24, 16)


def test_a_list_of_names_goes_with_one_of_polygons(tmp_path):
    train = write(tmp_path / "train.gpkg", [area(0, 3.5)], crs=OTHER)
    (tmp_path / "val.txt").write_text("a__r000000_c000448\na__r000000_c000192\n")
    found = split_by_lists(PLAIN, train, tmp_path / "val.txt")
    assert columns_of(found.val) == {3, 7}
    assert columns_of(found.train) == {0, 1, 2}
    assert len(found.dropped) == 7  # the eighth that straddles is named by the other list


def test_polygon_lists_that_overlap_or_hold_nothing_are_refused(tmp_path):
    train = write(tmp_path / "train.geojson", [area(0, 5)])
    val = write(tmp_path / "val.geojson", [area(3, 8)])
    line = line_of(SplitError, split_by_lists, PLAIN, train, val)
    assert line.startswith(f"{val}: 16 tile(s) are in {train} too, a__r000000_c000192 the first")
    away = write(tmp_path / "away.geojson", [area(30, 40)])
    assert line_of(SplitError, split_by_lists, PLAIN, train, away).startswith(f"{away}: names no")


# Audit

CLASSES = ["field", "wood", "water"]
TWO = laid(north=scene(256, 256), later=scene(256, 256, left=412020, top=5325990))


def audited(split: Split, places: Footprints, log: VerbosityLogger, counts=None) -> str:
    audit(split, places, alike(places) if counts is None else counts, CLASSES, log)
    return log.stream.getvalue()


@pytest.mark.parametrize("seed", range(5))
def test_a_random_split_of_overlapping_scenes_is_refused_and_a_block_split_passes(seed, log):
    mixed = np.random.default_rng(seed).permutation(TWO.names).tolist()
    drawn = Split(sorted(mixed[8:]), sorted(mixed[:8]))
    line = line_of(SplitError, audited, drawn, TWO, log)
    assert line.startswith("dataset.splits: ")
    assert "pairs of a training and a validation tile share ground, such as " in line
    pairs = line.partition("such as ")[2].partition(";")[0].split(", ")
    assert 1 <= len(pairs) <= 3
    for pair in pairs:
        train, val = pair.split(" and ")
        assert train in drawn.train
        assert val in drawn.val
        one, other = TWO.of([train]), TWO.of([val])
        assert shapely.area(shapely.intersection(one, other))[0] > 0
    blocks = split_by_blocks(TWO, alike(TWO), 0.25, Splits(), seed)
    assert "the two sides are 0 m apart" in audited(blocks, TWO, log)


def test_one_scene_on_each_side_is_refused_where_they_overlap(log):
    sides = [[name for name in TWO.names if name.startswith(who)] for who in ("north", "later")]
    assert "share ground" in line_of(SplitError, audited, Split(*sides), TWO, log)


def test_the_audit_sees_across_zones(log):
    [here], [there] = (moved("EPSG:4326", crs, (18, 48)) for crs in (UTM, "EPSG:32634"))
    places = laid(a=scene(128, 128, *here), b=scene(128, 128, *there, crs="EPSG:32634"))
    split = Split(places.names[:4], places.names[4:])
    assert "share ground" in line_of(SplitError, audited, split, places, log)


def test_neighbours_that_only_touch_pass(log):
    checks = [name for name in PLAIN.names if (int(name[-14:-8]) + int(name[-6:])) // 64 % 2]
    rest = sorted(set(PLAIN.names) - set(checks))
    assert "the two sides are 0 m apart, 0 tiles dropped" in audited(
        Split(rest, checks), PLAIN, log
    )


def test_the_moved_back_tile_and_its_neighbour_belong_on_one_side(log):
    places = laid(a=scene(64, 100))
    line = line_of(SplitError, audited, Split(places.names[:1], places.names[1:]), places, log)
    assert "1 pairs" in line or "1 pair" in line


@pytest.mark.parametrize("gap", [0, 1, 3, 5])
def test_the_distance_between_the_sides_is_told(gap, log):
    train = [name for name in PLAIN.names if columns_of([name]) <= {0, 1}]
    val = [name for name in PLAIN.names if columns_of([name]) <= {2 + gap}]
    dropped = sorted(set(PLAIN.names) - set(train) - set(val))
    said = audited(Split(train, val, dropped=dropped), PLAIN, log)
    assert f"train: the two sides are {32 * gap} m apart, {len(dropped)} tiles dropped" in said


def test_where_there_is_no_place_the_distance_is_in_pixels_or_unknown(log):
    places = laid(a=scene(64, 256, crs=None), b=scene(64, 256, crs=None))
    assert "sides are 64 pixels apart" in audited(
        Split(places.names[:1], places.names[2:3]), places, log
    )
    assert "sides are in different scenes" in audited(
        Split(places.names[:4], places.names[4:]), places, log
    )


def test_the_class_shares_of_each_side_are_told(log):
    counts = np.array([[75, 25, 0]] * 32 + [[0, 60, 140]] * 31 + [[0, 0, 0]])
    said = audited(Split(PLAIN.names[:32], PLAIN.names[32:]), PLAIN, log, counts)
    assert "train has 32 tiles, class shares field: 75.0%, wood: 25.0%, water: 0.0%" in said
    assert "val has 32 tiles, class shares field: 0.0%, wood: 30.0%, water: 70.0%" in said
    empty = np.zeros((64, 3), int)
    assert "field: 0.0%" in audited(Split(PLAIN.names[:32], PLAIN.names[32:]), PLAIN, log, empty)


def test_the_sides_of_a_split_are_told_by_tile():
    split = Split(["a"], ["b", "c"], ["d"], ["e"])
    assert split.sides() == {"a": "train", "b": "val", "c": "val", "d": "test", "e": "dropped"}
