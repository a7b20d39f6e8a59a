"""Rounded features: bytes near what they stand for, and maps made of what was trained on."""

import project
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import main
import models
from models.backbone import build_backbone, describe_backbone
from utils.cache import check_tile, load_tile, tile_path, write_tile
from utils.devices import autocast
from utils.manifest import read_manifest
from utils.quantize import HALF, dequantize, quantize, restored, rounding
from utils.tiling import tiles

CPU = torch.device("cpu")


def maps(seed: int, *shape: int) -> torch.Tensor:
    """Half-precision maps whose channels differ in scale and offset, as a ViT's do."""
    generator = torch.Generator().manual_seed(seed)
    channels = shape[-3]
    spread = 10 ** torch.linspace(-3, 2, channels)[:, None, None]
    return (spread * (torch.randn(*shape, generator=generator) + 3)).half()


@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 6))
def test_bytes_are_half_a_step_from_what_they_stand_for(seed, rows, cols):
    level = maps(seed, 8, rows, cols)
    codes, scales = quantize(level)
    assert codes.dtype == torch.int8
    assert (scales.shape, scales.dtype) == ((2, 8), torch.float32)
    span = level.float().amax((1, 2)) - level.float().amin((1, 2))
    assert torch.allclose(scales[0], span / 255)
    step = scales[0][:, None, None]
    rounded = level.float().abs() / 1024  # to half precision once more
    error = (dequantize(codes, scales).float() - level.float()).abs()
    assert (error <= 0.501 * step + rounded).all()


@given(st.integers(0, 99))
def test_least_and_greatest_values_and_constant_channels_stay(seed):
    level = maps(seed, 6, 4, 5)
    level[2], level[3] = -0.125, 60000
    codes, scales = quantize(level)
    found = dequantize(codes, scales)
    assert (codes[2:4] == -128).all()
    assert torch.equal(found[2:4], level[2:4])
    for each in (torch.amin, torch.amax):
        assert torch.allclose(each(found.float(), (1, 2)), each(level.float(), (1, 2)), rtol=1e-3)


@given(st.integers(0, 99), st.integers(1, 4))
def test_a_tile_is_rounded_alike_alone_and_in_a_batch_whatever_its_memory(seed, count):
    batch = maps(seed, count, 8, 4, 4)
    last = batch.contiguous(memory_format=torch.channels_last)
    codes, scales = quantize(last)
    assert codes.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(dequantize(codes, scales), dequantize(*quantize(batch)))
    for number, level in enumerate(batch):
        assert torch.equal(dequantize(codes, scales)[number], dequantize(*quantize(level)))


@pytest.mark.parametrize("odd", [torch.inf, -torch.inf, torch.nan])
def test_what_is_no_number_is_found_in_the_scales(odd):
    level = maps(0, 8, 4, 4)
    level[5, 1, 2] = odd
    codes, scales = quantize(level)
    broken = [5]
    assert torch.where(~scales.isfinite().all(0))[0].tolist() == broken
    found = dequantize(codes, scales)
    assert torch.where(~found.isfinite().all(-1).all(-1))[0].tolist() == broken


def test_without_scales_maps_are_used_as_they_are():
    level = maps(0, 2, 8, 4, 4)
    assert restored([level], [])[0] is level
    assert restored([level], ()) == [level]


# The whole way


def prepared(folder, feature_dtype: str, *settings: str):
    """A project of one scene, its cache made and a head trained."""
    config = project.write_project(folder, height=100, width=150, nodata=None)
    off = ("inference.enable=false", "train.epochs=1", "train.muon_lr=1e-4")
    assert project.run(config, f"prepare.feature_dtype={feature_dtype}", *off, *settings) == 0
    return config


@pytest.mark.parametrize("feature_dtype", HALF)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_map_is_made_of_the_features_that_were_trained_on(
    tmp_path, monkeypatch, feature_dtype, precision
):
    precise = f"resources.precision={precision}"
    config = prepared(tmp_path, feature_dtype, precise, "prepare.batch_size=1")
    seen, build_head = [], models.build_head

    def watched(*arguments):
        head = build_head(*arguments)
        head.register_forward_pre_hook(
            lambda _, inputs: seen.extend(zip(*(level.clone() for level in inputs[1]), strict=True))
        )
        return head

    monkeypatch.setattr("utils.phases.build_head", watched)
    off = [f"{phase}.enable=false" for phase in ("prepare", "verify", "train")]
    window = ("inference.overlap=0.0", "inference.batch_size=1")
    scene = f"inference.input_tif={tmp_path / 'scenes' / 'north.tif'}"
    assert project.run(config, precise, *off, *window, scene) == 0
    plan = tiles(100, 150, project.TILE)
    assert len(seen) == len(plan) == 6
    for tile, features in zip(plan, seen, strict=True):
        cached = load_tile(tile_path(tmp_path / "cache", f"north__{tile.name}"))
        for ours, stored in zip(
            features, restored(cached["features"], cached.get("scales", ())), strict=True
        ):
            assert ours.dtype == stored.dtype == HALF[feature_dtype]
            assert torch.equal(ours, stored)


@pytest.mark.parametrize("feature_dtype", HALF)
def test_a_cache_holds_the_features_rounded_as_configured(tmp_path, feature_dtype):
    path = prepared(tmp_path, feature_dtype, "train.enable=false", "prepare.batch_size=2")
    config = main.load_config(path)
    spec = describe_backbone(config.model)
    exact = build_backbone(config.model, spec, HALF[feature_dtype])
    manifest = read_manifest(tmp_path / "cache")
    assert manifest.feature_dtype == feature_dtype
    for name in manifest.tiles:
        cached = load_tile(tile_path(tmp_path / "cache", name))
        with torch.inference_mode(), autocast(CPU, "fp32"):
            levels = rounding(feature_dtype)(exact(cached["image"][None]))
        found = restored(cached["features"], cached.get("scales", ()))
        for ours, level in zip(found, levels, strict=True):
            assert torch.equal(ours, level[0])
            assert ours.permute(1, 2, 0).is_contiguous()


@pytest.mark.parametrize(("channels", "feature_dtype"), [
    (384, "fp16"), (1024, "bf16"), (384, "int8"), (1024, "int8"),
])  # fmt: skip
def test_a_file_takes_the_bytes_that_its_features_need(tmp_path, channels, feature_dtype):
    levels = [maps(n, channels, 32, 32).to(HALF[feature_dtype]) for n in range(4)]
    parts, each = {"features": levels}, 2
    if feature_dtype == "int8":
        codes, scales = zip(*map(quantize, levels), strict=True)
        parts, each = {"features": codes, "scales": scales}, 1
    image = torch.zeros(3, 512, 512, dtype=torch.uint8)
    manifest = project.manifest_of(channels, 4, tile_size=512, feature_dtype=feature_dtype)
    write_tile(tmp_path, "tile", image, image[0], **parts, stamp=manifest.stamp_of("tile"))
    held = 4 * channels * 32**2 * each + 4 * 512**2
    assert held < tile_path(tmp_path, "tile").stat().st_size <= 1.01 * held
    check_tile(tile_path(tmp_path, "tile"), manifest)
