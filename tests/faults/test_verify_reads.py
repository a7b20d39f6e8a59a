"""verify under failing reads deletes no healthy tile, and finds every bit that was flipped."""

import errno
import os
import random
from pathlib import Path
from typing import IO

import project
import pytest
from size import figure, sized

from utils.cache import load_tile, tile_names, tile_path
from utils.data import verify
from utils.distributed import Runtime
from utils.manifest import read_manifest

CODES = ("EIO", "ESTALE", "EACCES", "ENOMEM")


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A project whose cache is made."""
    path = project.write_project(tmp_path_factory.mktemp("reads") / "work")
    off = [f"{phase}.enable=false" for phase in ("verify", "train", "inference")]
    assert project.run(path, *off) == 0
    return path


def run_failing(monkeypatch, config: Path, path: Path, code: int, times: float) -> int:
    """Run verify while reads of a tile fail, a number of times; its exit code."""
    plain, left = Path.open, [times]

    def opened(self: Path, *how: str, **named: int) -> IO:
        if self == path and left[0] > 0:
            left[0] -= 1
            raise OSError(code, os.strerror(code)) if code else MemoryError
        return plain(self, *how, **named)

    with monkeypatch.context() as patched:
        patched.setattr("utils.artefacts.WAITS", (0, 0, 0))
        patched.setattr(Path, "open", opened)
        ended = project.run(config, *project.only("verify"))
    assert left[0] == 0 or times > 3
    return ended


@pytest.mark.parametrize("code", [*CODES, None])
def test_a_read_that_fails_at_times_is_healed_and_one_that_always_fails_is_told(
    config, capsys, monkeypatch, code
):
    cache = config.parent / "cache"
    whole = {path.name: path.read_bytes() for path in cache.glob("*.pt")}
    number = getattr(errno, code) if code else 0
    dice, tried = random.Random(f"reads {code}"), 0
    for times in (1, 3, float("inf")):
        for name in dice.sample(sorted(whole), sized(1, len(whole))):
            ended = run_failing(monkeypatch, config, cache / name, number, times)
            assert ended == (4 if times > 3 else 0)
            said = capsys.readouterr().err
            lines = [line for line in said.splitlines() if line.startswith("error: ")]
            assert len(lines) == (times > 3), said
            assert all(str(cache / name) in line for line in lines)
            assert {path.name: path.read_bytes() for path in cache.glob("*.pt")} == whole
            tried += 1
    figure(f"verify, reads fail with {code or 'MemoryError'}", f"{tried}: 0 healthy tiles deleted")


def test_every_flipped_bit_of_what_a_tile_holds_is_found(config, log):
    cache, count, found = config.parent / "cache", sized(100, 1000), 0
    made, dice = read_manifest(cache), random.Random("flips")
    whole = {name: tile_path(cache, name).read_bytes() for name in tile_names(cache, made)}
    while found < count:
        struck = dice.sample(sorted(whole), min(len(whole) // 2, count - found))
        for name in struck:
            tile_path(cache, name).write_bytes(flipped(cache, name, whole[name], dice))
        assert verify(cache, 1, Runtime(), log) == sorted(struck)
        left = {path.stem: path.read_bytes() for path in cache.glob("*.pt")}
        assert left == {name: each for name, each in whole.items() if name not in struck}
        found += len(struck)
        for name in struck:
            tile_path(cache, name).write_bytes(whole[name])
    figure("verify, flipped bits of what tiles hold", f"{found} of {count} found")


def flipped(cache: Path, name: str, whole: bytes, dice: random.Random) -> bytes:
    """A tile's file with one bit of its image, features or label turned over."""
    part = load_tile(tile_path(cache, name))[dice.choice(("image", "features", "label"))]
    laid = part.permute(0, 2, 3, 1) if part.ndim == 4 else part
    start = whole.index(laid.numpy().tobytes())
    place = start + dice.randrange(part.nbytes)
    return whole[:place] + bytes([whole[place] ^ 1 << dice.randrange(8)]) + whole[place + 1 :]
