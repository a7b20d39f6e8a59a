"""A scene of any height is mapped in the same memory: peaks of processes of their own."""

import sys

import project
import pytest
from size import figure, sized

MAP = """
import sys
from pathlib import Path
from config import Config, Inference
from utils.process import set_environment

scene, output = Path(sys.argv[1]), Path(sys.argv[2])
section = Inference(enable=True, input_tif=scene, output_tif=output)
off = {"enable": False}
config = Config(inference=section.model_dump(), prepare=off, verify=off, train=off)
set_environment(config)
import torch
from utils.block_cache import make_room
from utils.inference import Trained, predict_scene
from utils.logging import VerbosityLogger
from utils.maps import default_legend
from utils.raster import Reading
from utils.scenes import SceneFile

make_room(config)
share = torch.tensor([0.25, 0.75]).view(1, 2, 1, 1)
network = lambda pixels: share.expand(len(pixels), 2, *pixels.shape[-2:])
reading = Reading(bands=(1, 2, 3), ranges=((0.0, 255.0),) * 3)
trained = Trained(default_legend(2), reading, None, {"made": "by a test"})
log = VerbosityLogger("error", silent=True)
predict_scene(section, SceneFile("scene", scene), False, network, trained, torch.device("cpu"), log)
status = Path("/proc/self/status").read_text()
print(status.partition("VmHWM:")[2].split()[0])  # not ru_maxrss: a child inherits its parent's
"""
SPARSE = """
import sys
import rasterio
from rasterio.transform import from_origin
path, height, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
keys = dict(driver="GTiff", count=3, dtype="uint8", crs="EPSG:32633", sparse_ok=True, tiled=True,
            blockxsize=512, blockysize=512, transform=from_origin(412000, 5326000, 0.5, 0.5))
with rasterio.open(path, "w", height=height, width=width, **keys):
    pass
"""
LIMIT = 1536  # MB


def peak(folder, height: int, width: int) -> int:
    """MB that mapping a scene of a size takes at most, in a process of its own.

    The lowest of some runs: equal ones differ by up to 20.
    """
    scene, output = folder / f"scene{height}.tif", folder / f"map{height}.tif"
    project.printed_by(SPARSE, scene, height, width)
    peaks = []
    for _ in range(sized(2, 3)):
        peaks.append(int(project.printed_by(MAP, scene, output)) // 1024)
        assert output.stat().st_size > 1000
        output.unlink()  # else it is kept
    return min(peaks)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_the_height(tmp_path):
    side = sized(4000, 30000)
    first, second = peak(tmp_path, side, side), peak(tmp_path, 2 * side, side)
    assert first <= LIMIT
    assert second < 1.05 * first
    figure(
        f"memory: mapping {side} × {side}",
        f"{first} MB at most; twice the height: {(second - first) / first:+.1%}",
    )
