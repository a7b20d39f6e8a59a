"""What files hold, down to the last bit."""

from pathlib import Path
from typing import Any

import torch


def content_of(path: Path) -> bytes:
    """A file's bytes; of weights and states all that they hold, for pickle writes it in two ways.

    Equal strings that are one object are written once, those that a file gave back each by itself.
    """
    return told(torch.load(path)).encode() if path.suffix == ".pth" else path.read_bytes()


def told(value: Any) -> str:
    """Nested values in words, down to the last bit of each tensor."""
    if isinstance(value, dict):
        return str([(told(key), told(each)) for key, each in value.items()])
    if isinstance(value, list | tuple):
        return str([told(each) for each in value])
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {tuple(value.shape)} {value.numpy().tobytes().hex()}"
    return repr(value)
