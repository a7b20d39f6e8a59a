"""Devices: which one is used and why, in what precision, what goes up and comes down.

Code elsewhere is the same on a CPU and on a GPU.
"""

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from config import Compile
from utils.logging import VerbosityLogger

Network = TypeVar("Network", bound=Callable[..., Any])


class DeviceError(Exception):
    """The machine lacks what the configuration asks for, or the run was started the wrong way."""

    exit_code = 4


def precision_of(wanted: str, device: torch.device) -> str:
    """What `resources.precision` means on a device: `auto` is bf16 where it computes in it.

    >>> precision_of("bf16", torch.device("cpu"))
    'bf16'
    """
    if wanted != "auto":
        return wanted
    return "bf16" if has_bf16(device) else "fp32"


def has_bf16(device: torch.device) -> bool:
    """Whether a processor multiplies bf16 itself: CUDA from Ampere on, CPUs with AVX-512 BF16, AMX
    or Arm's BF16."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The products of a network in `precision`: the same in prepare, train and inference."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def upload(pixels: np.ndarray, device: torch.device) -> Tensor:
    """Raw pixels on the device; to a GPU from pinned memory, so that nobody waits for the copy."""
    tensor = torch.from_numpy(pixels)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor


def download(tensor: Tensor) -> Tensor:
    """A tensor in the CPU's memory, laid out as it was: from a GPU pinned, from a CPU itself.

    It is whole when this returns, in whatever thread.

    >>> classes = torch.zeros(2, 2, dtype=torch.uint8)
    >>> download(classes) is classes
    True
    """
    if tensor.device.type != "cuda":
        return tensor.cpu()
    here = torch.empty_like(tensor, device="cpu", pin_memory=True)
    if here.stride() != tensor.stride():  # only what lies densely is copied in one go, unwatched
        tensor = tensor.clone()
    here.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).record_event().synchronize()
    return here


def most_at_once(device: torch.device) -> int | None:
    """Tiles that a network had better be given together, None for any number.

    A CPU's caches hold the activations of two: eight at once take a tenth longer.

    >>> most_at_once(torch.device("cpu")), most_at_once(torch.device("cuda"))
    (2, None)
    """
    return 2 if device.type == "cpu" else None


def compiled(
    network: Network, wanted: Compile, device: torch.device, phase: str, log: VerbosityLogger
) -> Network:
    """A phase's frozen network, by torch.compile where `resources.compile` wants it."""
    tell_of_compiling(f"{phase}: resources.compile", wanted, device, log)
    return torch.compile(network) if compiles(wanted, device) else network


def compiles(wanted: Compile, device: torch.device) -> bool:
    """Whether networks are compiled on a device: `auto` where it pays and the machine can.

    >>> compiles("auto", torch.device("cpu")), compiles(True, torch.device("cpu"))
    (False, True)
    """
    if wanted == "auto":
        return device.type == "cuda" and not lacking_to_compile()
    return wanted


def tell_of_compiling(
    key: str, wanted: Compile, device: torch.device, log: VerbosityLogger
) -> None:
    """Say what is compiled where that takes time and may not pay, and what keeps `auto` from it."""
    if device.type == "cpu" and wanted == "auto":
        log.info(f"{key}: auto compiles nothing on a CPU, where that was measured not to pay")
    elif device.type == "cpu" and wanted:
        log.info(f"{key}: compiles as configured; on a CPU that was measured not to pay")
    elif wanted == "auto" and (lacking := lacking_to_compile()):
        log.info(f"{key}: auto compiles nothing, for this machine has no {lacking}")
    elif wanted:
        log.info(f"{key}: compiles, so the first batches take longer")


def lacking_to_compile() -> str:
    """What torch.compile needs for CUDA and does not find here; empty if it finds all."""
    compilers = (os.environ.get("CC"), "gcc", "clang", "cc")
    needed = {
        "triton": importlib.util.find_spec("triton"),
        "C compiler": any(shutil.which(name) for name in compilers if name),
        "Python.h": Path(sysconfig.get_path("include"), "Python.h").is_file(),
    }
    return " and no ".join(name for name, found in needed.items() if not found)


def no_cuda() -> str:
    """Why there is no CUDA device, in words."""
    if torch.version.cuda is None:
        return "this build of torch has no CUDA"
    return "torch finds no CUDA device"


def device_reason(name: str, device: torch.device) -> str:
    """What was picked and why, for the log.

    >>> device_reason("cpu", torch.device("cpu"))
    'device: cpu, as configured'
    """
    if name != "auto":
        return f"device: {device}, as configured"
    if device.type == "cpu":
        return f"device: cpu, picked by auto since {no_cuda()}"
    return f"device: {device} ({torch.cuda.get_device_name(device)}), picked by auto"
