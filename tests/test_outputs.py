"""Where maps go, and which of them are finished; test_inference has the maps themselves."""

import os
from pathlib import Path

import numpy as np
import project
import pytest

from config import Inference
from utils.outputs import check_outputs, is_current, outputs_of, written
from utils.products import InferenceError
from utils.scenes import SceneFile

TAGS = {"AREA_OR_POINT": "Area"}


def test_a_file_in_the_journal_s_place_is_one_line(tmp_path):
    (tmp_path / ".map.tif.resume").write_text("odd")
    section = Inference(input_tif=tmp_path / "scene.tif", output_tif=tmp_path / "map.tif")
    with pytest.raises(InferenceError, match=r"\.map\.tif\.resume: is no folder.*; remove it$"):
        check_outputs(section, [SceneFile("scene", section.input_tif)], False)


def test_every_product_of_a_scene_is_an_output():
    """With several scenes each product has a folder of its own."""
    names = ("output_tif", "probabilities", "confidence")
    section = Inference(**{name: Path("out", name) for name in names}, polygons=Path("out/lines"))
    found = outputs_of(section, "north", several=True)
    assert found == [*(Path("out", name, "north.tif") for name in names),
                     Path("out/lines/north.gpkg")]  # fmt: skip
    assert set(written(section)) == {path.parent for path in found}
    alone = Inference(output_tif=Path("map.tif"))
    assert outputs_of(alone, "north", several=False) == written(alone) == [Path("map.tif")]


@pytest.fixture
def output(tmp_path) -> Path:
    """A raster that was written a while after its scene."""
    path = project.write_scene(
        tmp_path / "map.tif", np.ones((1, 64, 64), np.uint8), project.grid(64, 64)
    )
    os.utime(path, ns=(2000, 2000))
    return path


def test_an_output_is_current_until_its_scene_changes_or_it_was_made_otherwise(output):
    assert is_current(output, output, TAGS, modified=1000)
    assert is_current(output, output, {}, modified=2000)
    assert not is_current(output, output, TAGS, modified=2001)
    assert not is_current(output, output, TAGS | {"DINOV3SEG_HEAD": "linear"}, modified=1000)


def test_polygons_are_current_while_they_are_no_older_than_their_map(output):
    lines = output.with_suffix(".gpkg")
    lines.write_bytes(b"")
    for time, current in ((1999, False), (2000, True), (2001, True)):
        os.utime(lines, ns=(time, time))
        assert is_current(lines, output, TAGS, modified=10**9) == current
