"""Footprints: tiles lie where their scenes lie, in metres, whatever the scenes' CRS."""

import json

import numpy as np
import pytest
import shapely
from ground import SIZE, UTM, boxes, laid, moved, on_utm, scene
from hypothesis import given
from hypothesis import strategies as st
from rasterio.crs import CRS
from shapely.geometry import shape

from utils.footprints import (
    APART,
    corners,
    footprints,
    middle,
    near,
    overlapping,
    smallest_distance,
    write_sides,
)

EAST_OF_33 = "EPSG:32634"
[MERCATOR] = moved("EPSG:4326", "EPSG:3857", (15, 60))
SCENES = {
    "utm": scene(),
    "utm, feet": scene(crs="EPSG:2263", left=980000, top=200000, gsd=1.5),
    "web mercator at 60 N": scene(crs="EPSG:3857", left=MERCATOR[0], top=MERCATOR[1], gsd=1.0),
    "degrees": scene(crs="EPSG:4326", left=15, top=60, gsd=5e-6),
    "turned": scene(skew=0.5),
    "south of the equator": scene(crs="EPSG:32733", top=9000000),
}


ZONES = {
    "utm": UTM,
    "utm, feet": "EPSG:32618",
    "web mercator at 60 N": UTM,
    "degrees": UTM,
    "turned": UTM,
    "south of the equator": "EPSG:32733",
}


@pytest.mark.parametrize("kind", SCENES)
def test_sizes_and_distances_are_those_on_the_ground(kind):
    """As UTM has them, but for its scale of up to 1 in 2500."""
    about = SCENES[kind]
    places = laid(here=about)
    theirs = np.array([on_utm(about, name, ZONES[kind]) for name in places.names])
    assert np.allclose(shapely.area(places.outlines), shapely.area(theirs), rtol=3e-3)
    ours = shapely.distance(places.outlines[0], places.outlines)
    assert np.allclose(ours, shapely.distance(theirs[0], theirs), rtol=3e-3, atol=1e-3)


def test_a_tile_that_reaches_past_a_small_scene_ends_with_it():
    places = laid(here=scene(40, 50))
    assert places.names == ["here__r000000_c000000"]
    assert shapely.area(places.outlines[0]) == pytest.approx(20 * 25, rel=1e-3)


def test_tiles_of_one_scene_touch_and_do_not_overlap():
    for about in SCENES.values():
        outlines = laid(here=about).outlines
        for number in range(len(outlines)):
            others = np.delete(outlines, number)
            assert overlapping(outlines[number : number + 1], others).shape == (2, 0)
            assert smallest_distance(outlines[number : number + 1], others) < 1e-3


def test_the_last_tile_moved_back_overlaps_the_one_before_it():
    places = laid(here=scene(64, 100))
    assert overlapping(places.outlines[:1], places.outlines[1:]).tolist() == [[0], [0]]


@pytest.mark.parametrize(
    ("crs", "left", "top", "gsd"),
    [("EPSG:3857", 1500000, 8400000, 30), ("EPSG:4326", 15, 60, 0.0003), (UTM, 412000, 6.6e6, 30),
     ("EPSG:3857", 1500000, 8400000, 0.5)],
)  # fmt: skip
def test_scenes_that_only_touch_do_not_overlap(crs, left, top, gsd):
    """Tiles of 15 km have edges that are bent on the ground; here they meet in the middle."""
    upper = scene(1024, 1024, left, top, gsd, crs)
    lower = scene(1024, 1024, left + 300 * gsd, top - 1024 * gsd, gsd, crs)
    places = laid(512, lower=lower, upper=upper)
    below, above = places.outlines[:4], places.outlines[4:]
    assert overlapping(above, below).shape == (2, 0)
    assert smallest_distance(above, below) < 1e-3 * 512 * gsd
    nearer = scene(1024, 1024, left + 300 * gsd, top - 1022 * gsd, gsd, crs)
    places = laid(512, lower=nearer, upper=upper)
    assert overlapping(places.outlines[4:], places.outlines[:4]).shape[1] > 0


def test_the_same_ground_is_found_across_two_utm_zones():
    [there] = moved("EPSG:4326", UTM, (18, 48))
    [here] = moved("EPSG:4326", EAST_OF_33, (18, 48))
    west, east = (
        scene(left=there[0], top=there[1]),
        scene(left=here[0], top=here[1], crs=EAST_OF_33),
    )
    places = laid(east=east, west=west)
    first = overlapping(places.outlines[:1], places.outlines[16:])
    assert first.shape[1] >= 1
    assert 0 in first[1]
    away = scene(left=here[0] + 1000, top=here[1], crs=EAST_OF_33)
    places = laid(east=away, west=west)
    gap = smallest_distance(places.outlines[:16], places.outlines[16:])
    assert gap == pytest.approx(1000 - 128, abs=8)  # the zones' norths differ by 4.5 degrees


def test_scenes_without_a_crs_lie_in_pixels_and_apart():
    places = laid(a=scene(128, 128, crs=None), b=scene(128, 128, crs=None))
    assert places.crs is None
    assert shapely.area(places.outlines).tolist() == [SIZE**2] * 8
    assert smallest_distance(places.outlines[:1], places.outlines[1:4]) == 0
    assert smallest_distance(places.outlines[:4], places.outlines[4:]) > APART


def test_tiles_on_both_sides_of_the_date_line_are_neighbours():
    west = scene(crs="EPSG:4326", left=180 - 256e-5, top=-17, gsd=1e-5)
    east = scene(crs="EPSG:4326", left=-180, top=-17, gsd=1e-5)
    places = laid(east=east, west=west)
    assert smallest_distance(places.outlines[:16], places.outlines[16:]) < 0.01
    assert overlapping(places.outlines[:16], places.outlines[16:]).shape == (2, 0)


@given(st.floats(-180, 180), st.floats(0, 60))
def test_the_middle_of_two_meridians_lies_between_them(lon, spread):
    points = np.array([[lon - spread, 10.0], [lon + spread, 30.0]])
    found, lat = middle((points + [180, 0]) % [360, 360] - [180, 0])
    assert lat == pytest.approx(20)
    assert (found - lon + 180) % 360 - 180 == pytest.approx(0, abs=1e-5)


def test_names_choose_outlines_in_their_order():
    places = boxes([(0, 0), (0, 1), (1, 0)])
    chosen = places.of(places.names[::-1])
    assert shapely.equals(chosen, places.outlines[::-1]).all()


@given(st.floats(0, 200))
def test_near_means_not_farther_than_so_many_metres(metres):
    tiles = boxes([(0, col) for col in range(6)]).outlines
    expected = [n for n in range(6) if max(0, 32 * (4 - n) if n < 5 else 0) <= metres]
    assert near(tiles, tiles[5:], metres).tolist() == expected


# The map of a split


@pytest.fixture
def drawn(tmp_path):
    """Draw the tiles of some scenes, the first of them on the training side; returns the JSON."""

    def draw(**scenes) -> tuple:
        places = laid(**scenes)
        classes = {name: [number, 7] for number, name in enumerate(places.names)}
        path = tmp_path / "splits.geojson"
        write_sides(path, places, {places.names[0]: "train", places.names[1]: "val"}, classes)
        assert [each.name for each in tmp_path.iterdir()] == [path.name]
        return places, json.loads(path.read_text())

    return draw


@pytest.mark.parametrize("kind", SCENES)
def test_tiles_are_drawn_where_they_lie(drawn, kind):
    about = SCENES[kind]
    places, found = drawn(here=about)
    assert found["type"] == "FeatureCollection"
    assert "crs" not in found  # RFC 7946: always longitude and latitude
    assert len(found["features"]) == len(places.names)
    for feature, name in zip(found["features"], places.names, strict=True):
        polygon = shape(feature["geometry"])
        assert polygon.is_valid
        assert polygon.exterior.is_ccw
        rim = moved(
            CRS.from_wkt(about["crs"]).to_string(), "EPSG:4326", *corners(name, about, SIZE)
        )
        assert polygon.hausdorff_distance(shapely.Polygon(rim)) < 1e-6
        assert len(polygon.exterior.coords) == 5


def test_a_drawn_tile_has_its_side_and_its_classes(drawn):
    places, found = drawn(here=scene())
    told = [feature["properties"] for feature in found["features"]]
    assert [each["tile"] for each in told] == places.names
    assert [each["side"] for each in told] == ["train", "val"] + ["dropped"] * 14
    assert [each["classes"] for each in told] == [[number, 7] for number in range(16)]


def test_the_map_opens_with_gdal(drawn, tmp_path):
    import pyogrio

    drawn(here=scene())
    about = pyogrio.read_info(tmp_path / "splits.geojson")
    assert about["crs"] == "EPSG:4326"
    assert about["features"] == 16
    assert about["geometry_type"] == "Polygon"
    assert set(about["fields"]) == {"tile", "side", "classes"}


def test_tiles_without_a_place_are_drawn_without_geometry(drawn):
    _, found = drawn(here=scene(crs=None))
    assert {feature["geometry"] for feature in found["features"]} == {None}


def test_an_older_map_stays_when_a_new_one_is_cut_short(tmp_path, monkeypatch):
    places = laid(here=scene())
    path = tmp_path / "splits.geojson"
    path.write_text("older")
    monkeypatch.setattr(json, "dumps", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_sides(path, places, {}, dict.fromkeys(places.names, [1]))
    assert path.read_text() == "older"


def test_footprints_are_of_the_tiles_asked_for():
    from types import SimpleNamespace

    made = SimpleNamespace(scenes={"here": scene(), "gone": scene()}, tile_size=SIZE)
    names = ["here__r000064_c000000", "here__r000000_c000000"]
    assert footprints(names, made).names == names
