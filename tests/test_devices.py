"""Devices: precision, what comes down from them, and what is compiled for them."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from utils.devices import (
    autocast,
    compiled,
    compiles,
    download,
    lacking_to_compile,
    precision_of,
    upload,
)

CPU = torch.device("cpu")


@pytest.mark.parametrize(("found", "wanted"), [({"amx_bf16": True}, "bf16"), ({}, "fp32")])
def test_precision_auto_is_what_the_processor_computes_in(monkeypatch, found, wanted):
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx2": True} | found)
    assert precision_of("auto", CPU) == wanted
    assert precision_of("fp32", CPU) == "fp32"
    assert precision_of("bf16", CPU) == "bf16"


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_products_are_computed_in_the_precision_that_is_asked_for(precision, dtype):
    with autocast(CPU, precision):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


LAID = [
    lambda: torch.arange(24).view(2, 3, 4),
    lambda: torch.arange(24.0).view(2, 3, 4).permute(0, 2, 1),  # as features are cached
    lambda: torch.arange(96).view(4, 4, 6)[:, 1:3, 2:5],  # as finished pixels are
    lambda: torch.arange(5, dtype=torch.uint8).to(torch.uint16)[None].expand(3, -1),
]


class OnGpu(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("made", LAID)
def test_what_comes_down_is_waited_for_and_lies_as_it_did(monkeypatch, made):
    calls, empty_like, copy = [], torch.empty_like, torch.Tensor.copy_

    def pinned(tensor, device, pin_memory):
        assert (device, pin_memory) == ("cpu", True)
        return empty_like(tensor.as_subclass(torch.Tensor))

    def copied(here, tensor, non_blocking):
        assert non_blocking
        assert here.stride() == tensor.stride()
        calls.append("copy")
        return copy(here, tensor.as_subclass(torch.Tensor))

    event = SimpleNamespace(synchronize=lambda: calls.append("waited"))
    stream = SimpleNamespace(record_event=lambda: calls.append("recorded") or event)
    monkeypatch.setattr(torch, "empty_like", pinned)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    found = download(made().as_subclass(OnGpu))
    assert calls == ["copy", "recorded", "waited"]
    assert found.tolist() == made().tolist()
    assert found.stride() == empty_like(made()).stride()


def test_what_goes_up_is_pinned_and_not_waited_for(monkeypatch):
    calls = []

    def to(tensor, device, non_blocking):
        calls.append((device.type, non_blocking))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: calls.append("pinned") or self)
    monkeypatch.setattr(torch.Tensor, "to", to)
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 3, 2, 2)
    assert np.array_equal(upload(pixels, torch.device("cuda")).numpy(), pixels)
    assert calls == ["pinned", ("cuda", True)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA")
@pytest.mark.parametrize("made", LAID)
def test_what_comes_down_from_a_gpu_is_what_was_there(made):
    found = download(made().cuda())
    assert found.is_pinned()
    assert found.tolist() == made().tolist()


class Recorder:
    """A log that keeps its lines by level."""

    def __init__(self):
        self.lines = []

    def info(self, line):
        self.lines.append(f"info: {line}")

    def debug(self, line):
        self.lines.append(f"debug: {line}")


PAYS_NOT = "on a CPU, where that was measured not to pay"


@pytest.mark.parametrize(
    ("wanted", "device", "lacking", "compiling", "line"),
    [
        ("auto", "cuda", "", True, "info: {}: compiles, so the first batches take longer"),
        ("auto", "cuda", "triton", False, "info: {}: auto compiles nothing, for this .* no triton"),
        ("auto", "cpu", "", False, f"info: {{}}: auto compiles nothing {PAYS_NOT}"),
        (True, "cuda", "triton", True, "info: {}: compiles, so the first batches take longer"),
        (True, "cpu", "triton", True, "info: {}: compiles as configured; on a CPU .* not to pay"),
        (False, "cuda", "", False, None),
        (False, "cpu", "triton", False, None),
    ],
)
def test_auto_compiles_where_it_pays_and_one_line_says_so(
    monkeypatch, wanted, device, lacking, compiling, line
):
    monkeypatch.setattr("utils.devices.lacking_to_compile", lambda: lacking)
    monkeypatch.setattr(torch, "compile", lambda network: (network,))
    log, device, network = Recorder(), torch.device(device), nn.Linear(2, 1)
    assert compiles(wanted, device) == compiling
    found = compiled(network, wanted, device, "prepare", log)
    assert found == ((network,) if compiling else network)
    assert len(log.lines) == (line is not None)
    if line:
        assert re.fullmatch(line.format(r"prepare: resources\.compile"), log.lines[0])


def test_what_compiling_for_cuda_needs_is_looked_for(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.setattr("sysconfig.get_path", lambda name: "/nowhere")
    assert lacking_to_compile() == "triton and no C compiler and no Python.h"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name)
    assert lacking_to_compile() == "Python.h"
