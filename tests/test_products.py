"""What a scene's map consists of: what is held while it is made fits what the config allows."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from config import Inference
from utils.blending import Part
from utils.grids import north_up
from utils.inference import plan_of
from utils.maps import BLOCK, class_map, default_legend
from utils.metrics import best_class
from utils.products import MB, WAITING, Sheet, blend_of, classes_of, layout_of, products_of
from utils.tiling import Tile

META = torch.device("meta")  # tensors of any size that take no memory


def section_of(megabytes=1024, **keys):
    paths = {"output_tif": Path("map.tif"), "confidence": Path("sure.tif")}
    return Inference(max_memory=megabytes, **paths, **keys)


def grid_of(height, width):
    return north_up("EPSG:32633", 0, 0, 0.5, height, width)


def laid_out(section, grid, classes, batch):
    products = products_of(section, "scene", several=False, legend=default_legend(classes))
    return layout_of(section, grid, products, classes, batch), products


def held(section, grid, products, classes, batch, layout):
    """Bytes that blend, sheets and batches really take, in the strip that takes most."""
    most = 0
    for strip in layout.strips:
        blend = blend_of(section, grid, classes, META)(strip)
        sums = sum(each.nbytes for each in (blend._sums, blend._spare, blend._carry))
        rows = 0
        for product in products:
            sheet = Sheet(product, SimpleNamespace(begin=lambda *_: None), section.tile_size)
            sheet.begin(strip)
            rows += sheet._rows[..., : min(section.tile_size, grid.height), :].nbytes
        most = max(most, sums + rows)
    return most + (layout.waiting + 1) * batch * 4 * classes * section.tile_size**2


shapes = st.tuples(st.integers(1, 3000), st.integers(1, 9000))
sizes, overlaps = st.sampled_from([256, 512, 1024]), st.sampled_from([0.0, 0.25, 0.7])


@settings(max_examples=60, deadline=None)
@given(shapes, st.integers(2, 1000), sizes, overlaps, st.integers(1, 8), st.integers(64, 20_000))
@example((4000, 30_000), 1000, 512, 0.25, 2, 1024)
@example((4000, 30_000), 1000, 512, 0.25, 2, 10_000)
@example((4000, 300), 100, 1024, 0.25, 1, 2000)
def test_what_is_held_fits_max_memory_or_is_the_least_that_can_be(
    shape, classes, size, overlap, batch, megabytes
):
    section = section_of(megabytes, tile_size=size, overlap=overlap)
    grid = grid_of(*shape)
    layout, products = laid_out(section, grid, classes, batch)
    assert held(section, grid, products, classes, batch, layout) <= layout.nbytes
    assert [strip.start for strip in layout.strips] == [0, *(s.stop for s in layout.strips[:-1])]
    assert layout.strips[-1].stop == grid.width
    if layout.nbytes > megabytes * MB:
        assert layout.waiting == 1
        widest = max(stop - start for start, stop in layout.strips)
        assert widest <= max(BLOCK, 2 * size + BLOCK)
    else:
        assert 1 <= layout.waiting <= WAITING


def test_few_classes_are_mapped_in_one_piece_with_batches_that_wait():
    layout, _ = laid_out(section_of(), grid_of(30_000, 30_000), classes=6, batch=8)
    assert (len(layout.strips), layout.waiting) == (1, WAITING)


def test_batches_wait_less_before_there_are_more_strips():
    classes, grid = 50, grid_of(512 + 9 * 384, 10_000)
    assert laid_out(section_of(1100), grid, classes, batch=4)[0].waiting == WAITING
    layout, _ = laid_out(section_of(900), grid, classes, batch=4)
    assert (len(layout.strips), layout.waiting) == (1, 1)
    layout, _ = laid_out(section_of(750), grid, classes, batch=4)
    assert len(layout.strips) > layout.waiting == 1


class Recorder:
    """A log that keeps its warnings."""

    def __init__(self):
        self.warnings = []
        self.warning = self.warnings.append

    def info(self, line):
        pass


def planned(section, classes, batch):
    """The warnings of a scene's plan."""
    grid, log = grid_of(700, 1500), Recorder()
    layout, _ = laid_out(section, grid, classes, batch)
    plan_of(section, SimpleNamespace(grid=grid, path=Path("scene.tif")), layout, log)
    return layout, log.warnings


def test_what_fits_no_max_memory_is_said_in_one_line_with_the_number_that_does():
    layout, [line] = planned(section_of(1024), classes=1000, batch=2)
    needed = math.ceil(layout.nbytes / MB)
    assert needed > 1024
    assert line == (
        f"inference: holds {needed} MB of probabilities, though inference.max_memory is 1024; "
        "lower inference.batch_size or inference.tile_size, or raise inference.max_memory to "
        f"{needed}"
    )
    assert planned(section_of(needed), classes=1000, batch=2)[1] == []
    assert planned(section_of(1024), classes=20, batch=2)[1] == []


# ---- class maps ----


@pytest.mark.parametrize("classes", [2, 254, 255, 256, 300])
@pytest.mark.parametrize("best", [best_class, lambda shares: shares.argmax(0)])
def test_class_ids_come_down_in_the_type_of_the_map(monkeypatch, classes, best):
    """As best_class gives them on a CPU and, in 64 bits, on a GPU."""
    content, down = class_map(default_legend(classes)), []
    monkeypatch.setattr("utils.products.best_class", best)
    monkeypatch.setattr(
        "utils.products.download", lambda found: down.append(found.dtype) or found
    )
    shares = torch.rand(classes, 9, 40, generator=torch.Generator().manual_seed(classes))
    shares[:, 0, :3] = 0.0
    shares[[-1, 0, 1], 0, [0, 1, 2]] = 1.0
    valid = np.ones((9, 40), bool)
    valid[3:5] = False
    found = classes_of(Part(Tile(0, 0, 9, 40), shares, valid))
    assert found.dtype == content.dtype
    wanted = np.where(valid, shares.numpy().argmax(0), np.int64(content.nodata))
    assert np.array_equal(found, wanted)
    assert [str(dtype) for dtype in down] == [f"torch.{content.dtype}"]


@pytest.mark.parametrize("classes", [2, 300])
def test_pixels_without_data_need_no_class(classes):
    nothing = Part(Tile(0, 0, 2, 3), torch.full((classes, 2, 3), np.nan), np.zeros((2, 3), bool))
    content = class_map(default_legend(classes))
    assert (classes_of(nothing) == content.nodata).all()
    assert classes_of(nothing).dtype == content.dtype
