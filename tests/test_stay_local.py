"""GDAL stays off the net, whatever a raster or a file beside it names."""

import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import project
import pytest

ASK = """
import sys
from config import Config
from utils.process import set_environment
if sys.argv[1] == "limited":
    set_environment(Config())
import rasterio
for name in sys.argv[2:]:
    try:
        with rasterio.open(name) as dataset:
            dataset.read(1, out_shape=(1, 8, 8))
    except rasterio.errors.RasterioError:
        pass
"""


@pytest.fixture
def server():
    """An address, and what was asked for there."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("how", ["limited", "free"])
def test_no_address_is_asked_for(tmp_path, write_tiff, rng, server, how, monkeypatch):
    address, asked = server
    for name in [name for name in os.environ if name.startswith(("GDAL_", "CPL_", "OGR_"))]:
        monkeypatch.delenv(name)  # what other tests of this process have set
    scene = write_tiff("scene.tif", rng.integers(1, 255, (3, 64, 64), dtype="uint8"))
    entry = "<MDI key='OVERVIEW_FILE'>{}</MDI>"
    side = f"<PAMDataset><Metadata domain='OVERVIEWS'>{entry}</Metadata></PAMDataset>"
    (tmp_path / "scene.tif.aux.xml").write_text(side.format(f"/vsicurl/http://{address}/ovr.tif"))
    names = [str(scene), f"/vsicurl/http://{address}/a.tif", f"http://{address}/b.tif",
             f"/vsicurl_streaming/http://{address}/c.tif", f"/vsiwebhdfs/http://{address}/d",
             f"/vsicurl?url=http%3A%2F%2F{address}%2Fe.tif"]  # fmt: skip
    ended = project.start([project.PYTHON, "-c", ASK, how, *names], tmp_path)
    assert ended.returncode == 0, ended.stderr
    if how == "free":
        assert {"/a.tif", "/b.tif", "/ovr.tif"} <= set(asked)  # else the test proves nothing
    else:
        assert not asked
    assert sorted(path.name for path in tmp_path.iterdir()) == ["scene.tif", "scene.tif.aux.xml"]
