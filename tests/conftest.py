"""Fixtures that the tests share: GeoTIFFs, a tiny random backbone, a logger that can be read."""

import io
import os
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported

import numpy as np
import pytest
import rasterio
import torch
from hypothesis import settings
from rasterio.transform import Affine

from config import Model
from models.backbone import DinoBackbone, build_backbone, describe_backbone, write_random_backbone
from utils.logging import VerbosityLogger

settings.register_profile("light", deadline=None, derandomize=True, max_examples=100)
settings.load_profile("light")
torch.set_num_threads(1)  # small tensors: threads would only wait for each other

CRS = "EPSG:32633"
NORTH_UP = Affine(0.5, 0, 412000, 0, -0.5, 5326000)

WriteTiff = Callable[..., Path]


@pytest.fixture
def write_tiff(tmp_path: Path) -> WriteTiff:
    """A function that writes an array (bands, H, W) or (H, W) as a GeoTIFF below tmp_path."""

    def write(
        name: str, pixels: np.ndarray, crs=CRS, transform=NORTH_UP, mask=None, **profile
    ) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = pixels if pixels.ndim == 3 else pixels[None]
        count, height, width = pixels.shape
        with rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width,
            dtype=pixels.dtype, crs=crs, transform=transform, **profile,
        ) as dataset:  # fmt: skip
            dataset.write(pixels)
            if mask is not None:
                dataset.write_mask(mask)
        return path

    return write


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


@pytest.fixture(scope="session")
def backbone_folder(tmp_path_factory) -> Path:
    """A DINOv3 ViT of four small blocks in the Hugging Face folder format."""
    folder = tmp_path_factory.mktemp("backbone")
    # large weights, so that each block changes what it is given
    sizes = {"hidden_size": 32, "intermediate_size": 64, "initializer_range": 0.3}
    heads = {"num_hidden_layers": 4, "num_attention_heads": 2}
    write_random_backbone(folder, seed=0, **sizes, **heads)
    return folder


@pytest.fixture(scope="session")
def backbone(backbone_folder: Path) -> DinoBackbone:
    """That ViT, tapped at its second and last block."""
    section = Model(backbone=str(backbone_folder), layers=[1, 3], num_classes=3)
    return build_backbone(section, describe_backbone(section))


@pytest.fixture
def log() -> VerbosityLogger:
    """A logger of every level; what it said is `log.stream.getvalue()`."""
    return VerbosityLogger("debug", timestamps=False, stream=io.StringIO())


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real imagery that DINOV3SEG_REAL_DATA names."""
    folder = os.environ.get("DINOV3SEG_REAL_DATA")
    if not folder:
        pytest.skip("DINOV3SEG_REAL_DATA is not set: no real imagery to test on")
    if not Path(folder).is_dir():
        pytest.fail(f"DINOV3SEG_REAL_DATA names {folder}, which is no folder")
    return Path(folder)
