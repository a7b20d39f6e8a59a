"""Maps on disk: whole or not at all, read back by GDAL with their colours, names and tags."""

import json
import math
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import project
import pytest
import rasterio
import rasterio.shutil
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, Compression, MaskFlags
from rasterio.transform import Affine
from rasterio.windows import Window
from rio_cogeo.cogeo import cog_validate

from utils import maps
from utils.grids import Grid, north_up
from utils.maps import (
    MAX_CLASSES,
    OKABE_ITO,
    Content,
    Legend,
    MapError,
    MapWriter,
    UnwrittenError,
    class_map,
    confidence_map,
    default_legend,
    probability_map,
    share_bytes,
    sidecar,
)

GRID = north_up("EPSG:32633", 412000, 5326000, 0.5, 700, 610)
LEGEND = Legend(('<b> & "é"', "água, 水", "a: b | c"), ((1, 2, 3), (250, 251, 252), (0, 158, 115)))
TAGS = {
    "class_names": json.dumps(LEGEND.names, ensure_ascii=False),
    "head": "unet_v2",
    "checkpoint": "9f" * 32,
    "settings": 'tile_size: 512\noverlap: 0.25 = <"a quarter"> & é',
}
FORMATS = ("cog", "gtiff")


def classes(grid: Grid = GRID, num_classes: int = 3, nodata: int = 255) -> np.ndarray:
    """Patches of random classes with a corner of nodata."""
    rng = np.random.default_rng(7)
    coarse = rng.integers(0, num_classes, (grid.height // 5 + 1, grid.width // 5 + 1))
    fine = np.kron(coarse, np.ones((5, 5), int))[: grid.height, : grid.width]
    fine[: grid.height // 4, : grid.width // 3] = nodata
    return fine


def write(
    path: Path, pixels: np.ndarray, content: Content, format: str = "cog", grid: Grid = GRID,
    step: int = 10**6,
) -> Path:  # fmt: skip
    """Write an array, `step` rows at a time."""
    with MapWriter(path, grid, content, format, TAGS) as output:
        for top in range(0, grid.height, step):
            output.write(pixels[..., top : top + step, :])
    return path


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def seen_by_gdal(path: Path) -> ElementTree.Element:
    """The band as GDAL describes it in a VRT, with all that it read beside the file."""
    described = path.with_suffix(".vrt")
    rasterio.shutil.copy(path, described, driver="VRT")
    band = ElementTree.parse(described).find("VRTRasterBand")
    described.unlink()
    return band


def categories(path: Path) -> tuple[str, ...]:
    return tuple(name.text for name in seen_by_gdal(path).iter("Category"))


@pytest.fixture
def old_map(tmp_path: Path) -> Iterator[Path]:
    """An older map of other classes, with what viewers leave beside it."""
    path = write(tmp_path / "map.tif", classes(num_classes=2), class_map(default_legend(2)))
    for ending in (".ovr", ".msk"):
        Path(f"{path}{ending}").write_bytes(b"old")
    return path


@pytest.mark.parametrize("format", FORMATS)
def test_a_map_reads_back_as_it_was_given(tmp_path, format):
    given = classes()
    path = write(tmp_path / "deep" / "map.tif", given, class_map(LEGEND), format)
    with rasterio.open(path) as dataset:
        assert (dataset.read(1) == given).all()
        assert (dataset.crs, dataset.transform) == (GRID.crs, GRID.transform)
        assert (dataset.dtypes, dataset.nodata, dataset.count) == (("uint8",), 255, 1)
        assert dataset.compression is Compression.deflate
        assert dataset.block_shapes == [(512, 512)]
        assert dataset.descriptions == ("class",)
        assert {**dataset.tags(), **TAGS} == dataset.tags()
    assert names_in(path.parent) == ["map.tif", "map.tif.aux.xml"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("bands", [1, 3])
def test_rows_in_any_number_give_the_same_bytes(tmp_path, format, bands):
    content = class_map(LEGEND) if bands == 1 else probability_map(LEGEND)
    pixels = classes() if bands == 1 else np.stack([classes()] * bands)
    whole = write(tmp_path / "whole.tif", pixels, content, format).read_bytes()
    for step in (1, 97, 512, 513):
        parts = write(tmp_path / "parts.tif", pixels, content, format, step=step)
        assert parts.read_bytes() == whole


@pytest.mark.parametrize("size", [(3, 5), (512, 512), (513, 300), (1500, 1100)])
@pytest.mark.parametrize("kind", ["classes", "probabilities", "confidence"])
def test_a_cog_is_valid_and_has_overviews_where_it_is_large(tmp_path, size, kind):
    grid = north_up("EPSG:32633", 412000, 5326000, 0.5, *size)
    pixels = classes(grid)
    content = {
        "classes": class_map(LEGEND),
        "probabilities": probability_map(LEGEND),
        "confidence": confidence_map(),
    }[kind]
    pixels = np.stack([pixels] * 3) if kind == "probabilities" else pixels
    path = write(tmp_path / "map.tif", pixels, content, grid=grid)
    valid, errors, remarks = cog_validate(path, strict=True, quiet=True)
    assert (valid, errors, remarks) == (True, [], [])
    with rasterio.open(path) as dataset:
        levels = max(0, math.ceil(math.log2(max(size) / 512)))
        assert dataset.overviews(1) == [2**level for level in range(1, levels + 1)]


def test_overviews_hold_only_classes_that_exist(tmp_path):
    grid = north_up("EPSG:32633", 412000, 5326000, 0.5, 1500, 1500)
    pixels = np.random.default_rng(3).choice([0, 4, 200, 255], (1500, 1500))
    path = write(tmp_path / "map.tif", pixels, class_map(default_legend(201)), grid=grid)
    for level in (0, 1):
        with rasterio.open(path, overview_level=level) as dataset:
            assert dataset.width == 1500 // 2 ** (level + 1)
            assert set(np.unique(dataset.read(1))) <= {0, 4, 200, 255}


def test_overviews_of_shares_are_means_without_the_nodata(tmp_path):
    pixels = np.tile(np.array([[0, 250], [100, 255]]), (350, 305))
    path = write(tmp_path / "map.tif", pixels, confidence_map())
    with rasterio.open(path, overview_level=0) as dataset:
        assert np.abs(dataset.read(1)[:350, :305].astype(int) - 350 / 3).max() <= 1


@pytest.mark.parametrize("format", FORMATS)
def test_the_palette_is_in_the_file(tmp_path, format):
    path = write(tmp_path / "map.tif", classes(), class_map(LEGEND), format)
    Path(f"{path}.aux.xml").unlink()
    with rasterio.open(path) as dataset:
        palette = dataset.colormap(1)
        assert dataset.colorinterp == (ColorInterp.palette,)
    assert [palette[number][:3] for number in range(3)] == list(LEGEND.colors)
    assert palette[255][3] == 0


@pytest.mark.parametrize("format", FORMATS)
def test_gdal_reads_the_names_and_the_colours_of_the_sidecar(tmp_path, format):
    path = write(tmp_path / "map.tif", classes(), class_map(LEGEND), format)
    band = seen_by_gdal(path)
    assert tuple(name.text for name in band.iter("Category")) == LEGEND.names
    table = band.find("GDALRasterAttributeTable")
    assert table.get("tableType") == "thematic"
    fields = [(f.findtext("Name"), f.findtext("Usage")) for f in table.iter("FieldDefn")]
    assert fields == [("Value", "5"), ("Class", "2"), ("Red", "6"), ("Green", "7"), ("Blue", "8")]
    rows = [tuple(cell.text for cell in row) for row in table.iter("Row")]
    assert rows == [
        (str(number), name, *map(str, color))
        for number, (name, color) in enumerate(zip(LEGEND.names, LEGEND.colors, strict=True))
    ]


def test_a_map_with_nodata_becomes_a_picture(tmp_path):
    path = write(tmp_path / "map.tif", classes(), class_map(LEGEND))
    rasterio.shutil.copy(path, tmp_path / "map.png", driver="PNG")


def test_a_sidecar_has_no_xml_declaration_since_gdal_would_not_read_it():
    assert sidecar(LEGEND).startswith("<PAMDataset>")


@pytest.mark.parametrize("format", FORMATS)
def test_above_254_classes_a_map_has_16_bits(tmp_path, format):
    legend = default_legend(300)
    given = classes(num_classes=300, nodata=65535)
    path = write(tmp_path / "map.tif", given, class_map(legend), format)
    with rasterio.open(path) as dataset:
        assert (dataset.dtypes, dataset.nodata) == (("uint16",), 65535)
        assert (dataset.read(1) == given).all()
        palette = dataset.colormap(1)
    assert tuple(palette[number][:3] for number in range(300)) == legend.colors
    assert categories(path) == legend.names


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("num_classes", [1, 2, 3, 4, 5])
def test_probabilities_are_bands_and_never_red_green_blue_alpha(tmp_path, format, num_classes):
    shares = np.random.default_rng(5).dirichlet(np.ones(num_classes), (700, 610)).transpose(2, 0, 1)
    valid = classes() != 255
    legend = default_legend(num_classes)
    path = tmp_path / "map.tif"
    write(path, share_bytes(shares, valid), probability_map(legend), format)
    with rasterio.open(path) as dataset:
        assert dataset.descriptions == legend.names
        assert dataset.mask_flag_enums == ([MaskFlags.nodata],) * num_classes
        assert not {ColorInterp.red, ColorInterp.alpha} & set(dataset.colorinterp)
        assert (dataset.dataset_mask() > 0).tolist() == valid.tolist()
        read = dataset.read() * np.array(dataset.scales)[:, None, None]
    assert np.abs(read - shares)[:, valid].max() <= 0.5 / 250 + 1e-9
    assert names_in(tmp_path) == ["map.tif"]


def test_shares_fill_the_bytes_to_250():
    shares = np.linspace(0, 1, 251)[None]
    assert share_bytes(shares, np.ones((1, 251), bool))[0].tolist() == list(range(251))
    assert share_bytes(np.array([[np.nan]]), np.array([[False]])).tolist() == [[255]]


@pytest.mark.parametrize(
    ("crs", "transform"),
    [
        (None, Affine.identity()),
        (CRS.from_epsg(4326), Affine(1e-5, 0, 14, 0, -1e-5, 48)),
        (CRS.from_epsg(32633), Affine(0.5, 0, 4e5, 0, 0.5, 5e6)),
        (CRS.from_epsg(32633), Affine.translation(4e5, 5e6) @ Affine.rotation(20)),
    ],
    ids=["none", "lat/lon", "south-up", "rotated"],
)
def test_any_grid_survives_without_a_warning(tmp_path, recwarn, crs, transform):
    grid = Grid(crs, transform, 700, 610)
    path = write(tmp_path / "map.tif", classes(), class_map(LEGEND), grid=grid)
    assert not recwarn.list
    with rasterio.open(path) as dataset:
        assert dataset.crs == crs
        assert dataset.transform.almost_equals(transform)


def test_a_path_of_any_letters_works(tmp_path):
    path = write(tmp_path / "carte d'été #1?" / "a!b [x] 水.tif", classes(), class_map(LEGEND))
    assert names_in(path.parent) == [path.name, f"{path.name}.aux.xml"]


def test_what_lay_beside_an_older_map_goes_with_it(old_map):
    assert categories(old_map) == ("class 0", "class 1")
    write(old_map, classes(), class_map(LEGEND))
    assert names_in(old_map.parent) == ["map.tif", "map.tif.aux.xml"]
    assert categories(old_map) == LEGEND.names
    write(old_map, classes(), confidence_map())
    assert names_in(old_map.parent) == ["map.tif"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("rows", [0, 100, 600])
def test_a_failure_leaves_the_older_map_and_nothing_else(old_map, format, rows):
    before = {path.name: path.read_bytes() for path in old_map.parent.iterdir()}
    with (
        pytest.raises(KeyboardInterrupt),
        MapWriter(old_map, GRID, class_map(LEGEND), format) as output,
    ):
        output.write(classes()[:rows])
        raise KeyboardInterrupt
    assert {path.name: path.read_bytes() for path in old_map.parent.iterdir()} == before


@pytest.mark.parametrize("rows", [699, 701])
def test_a_map_with_a_row_too_few_or_too_many_is_refused(tmp_path, rows):
    with (
        pytest.raises(ValueError, match="rows"),
        MapWriter(tmp_path / "map.tif", GRID, class_map(LEGEND)) as output,
    ):
        output.write(np.zeros((rows, GRID.width), int))
    assert names_in(tmp_path) == []


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("row", [0, 699])
def test_a_pixel_that_the_disk_lost_is_found_before_the_map_gets_its_name(
    old_map, monkeypatch, format, row
):
    """A whole file in structure, with one other value: what a failed write can leave."""
    before, check = old_map.read_bytes(), maps.check_structure
    final = "cog.tif" if format == "cog" else "map.tif"

    def lose(path):
        check(path)
        if path.name != final:
            return
        with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dataset:
            value = dataset.read(1, window=Window(3, row, 1, 1))
            dataset.write(1 - value, 1, window=Window(3, row, 1, 1))

    monkeypatch.setattr(maps, "check_structure", lose)
    said = rf"rows {row // 512 * 512} to \d+ cannot be read back"
    with pytest.raises(UnwrittenError, match=said):
        write(old_map, np.zeros((GRID.height, GRID.width), int), class_map(LEGEND), format)
    assert old_map.read_bytes() == before


def test_rows_of_another_shape_are_refused(tmp_path):
    with (
        pytest.raises(ValueError),
        MapWriter(tmp_path / "map.tif", GRID, probability_map(LEGEND)) as output,
    ):
        output.write(np.zeros((3, GRID.width), int))
    assert names_in(tmp_path) == []


def fails_within(limit: int, folder: Path, format: str) -> bool:
    """Whether a map is refused, with nothing left, when no file may grow beyond `limit` bytes."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # GDAL's own complaints
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            write(folder / "map.tif", classes(), class_map(LEGEND), format)
            os._exit(2)
        except MapError:
            os._exit(1 if not names_in(folder) else 3)
        finally:
            os._exit(4)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_named_wherever_it_fills(tmp_path, format):
    whole = write(tmp_path / "whole" / "map.tif", classes(), class_map(LEGEND), format)
    size = whole.stat().st_size
    folder = tmp_path / "full"
    folder.mkdir()
    for limit in (0, 1000, size // 2, size - 1000, size - 1):
        assert fails_within(limit, folder, format), f"{limit} bytes of {size}"


def test_what_cannot_be_a_map_is_refused_in_one_line(tmp_path):
    content = class_map(LEGEND)
    (tmp_path / "file").write_text("")
    with pytest.raises(MapError, match="format 'jpeg' is none of cog, gtiff"):
        MapWriter(tmp_path / "map.tif", GRID, content, "jpeg")
    with pytest.raises(MapError, match="is a folder"), MapWriter(tmp_path, GRID, content):
        pass
    below_a_file = tmp_path / "file" / "map.tif"
    with (
        pytest.raises(MapError, match="map.tif") as refusal,
        MapWriter(below_a_file, GRID, content),
    ):
        pass
    assert refusal.value.exit_code == (4 if "not written" in str(refusal.value) else 3)
    assert names_in(tmp_path) == ["file"]


@pytest.mark.parametrize(
    ("names", "colors", "found"),
    [
        (("a", "b"), ((0, 0, 0),), "2 names and 1 colours"),
        ((), (), "0 classes"),
        (("a",) * (MAX_CLASSES + 1), ((0, 0, 0),) * (MAX_CLASSES + 1), "65536 classes"),
        (("a", "b\n"), ((0, 0, 0),) * 2, "class 1 'b\\\\n'"),
        (("\ud800",), ((0, 0, 0),), "class 0"),
        (("a",), ((0, 0, 256),), "256"),
        (("a",), ((0, 0),), "three numbers"),
    ],
)
def test_a_legend_that_cannot_be_written_is_refused(names, colors, found):
    with pytest.raises(MapError, match=found):
        Legend(names, colors)


def test_default_colours_are_all_different_and_the_first_far_apart():
    legend = default_legend(MAX_CLASSES)
    assert legend.colors[:8] == OKABE_ITO
    assert len(set(legend.colors)) == len(set(legend.names)) == MAX_CLASSES
    assert default_legend(50).colors == legend.colors[:50]
    first = np.array(legend.colors[:50], float)
    apart = np.linalg.norm(first[:, None] - first, axis=-1) + np.eye(50) * 999
    assert apart.min() > 48


MEMORY = """
import sys
from pathlib import Path
import numpy as np
from utils.maps import MapWriter, class_map, default_legend
from utils.grids import north_up

height, width = int(sys.argv[1]), 4000
rows = np.kron(np.random.default_rng(0).integers(0, 6, (20, width // 5)), np.ones((5, 5), int))
grid = north_up("EPSG:32633", 412000, 5326000, 0.5, height, width)
with MapWriter(Path(sys.argv[2], "map.tif"), grid, class_map(default_legend(6))) as output:
    for _ in range(0, height, 100):
        output.write(rows)
status = Path("/proc/self/status").read_text()
print(status.partition("VmHWM:")[2].split()[0])
"""


def test_memory_does_not_grow_with_the_map(tmp_path):
    peaks = []
    for height in (9000, 18000):  # from about 8000 rows on, GDAL's buffers are full
        peak = project.printed_by(MEMORY, height, tmp_path, GDAL_CACHEMAX="8")
        peaks.append(int(peak) // 1024)  # not ru_maxrss: a child inherits its parent's
    assert peaks[1] - peaks[0] < 20, f"{peaks} MB; the maps differ by 36 MB"
