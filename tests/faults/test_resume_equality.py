"""Training goes on from every state of a run of 12 steps, to the same bits."""

import shutil
from collections.abc import Callable
from pathlib import Path

import project
import pytest
from bits import content_of
from forked import forked
from ranks import GLOO, Ranks, ended
from size import WHOLE, figure, sized

from models import HEADS
from utils.resume import Resume

ONLY_TRAIN = project.only("train")
WAYS = {
    "EMA": ("train.ema_decay=0.9", "train.batch_size=4"),
    "accumulation": ("train.grad_accum_steps=2", "train.batch_size=2"),
    "two ranks": (*GLOO, "train.batch_size=2"),
}
STEPS, EPOCHS = 12, 4
CASES = [(head, way) for head in HEADS for way in WAYS] if WHOLE else [("linear", "two ranks")]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    """A project with ten tiles or so to train on."""
    shape = {"epochs": EPOCHS, "checkpoint_minutes": 1e-9}
    path = project.write_project(tmp_path_factory.mktemp("equal"), 190, 250, train=shape)
    assert project.run(path, "train.enable=false", "inference.enable=false") == 0
    return path


def train(config: Path, head: str, way: str, weights: Path, keep: Callable) -> None:
    """Train to the end in children; `keep` is what they call to keep a state."""
    settings = (*ONLY_TRAIN, f"model.head={head}", *WAYS[way], f"train.weights_dir={weights}")

    def run() -> int:
        Resume.keep = keep
        return project.run(config, *settings)

    if way == "two ranks":
        ranks = Ranks(run)
        assert ended(ranks) == [0, 0], ranks[0].said
    else:
        assert forked(run) == 0


def results(weights: Path) -> dict[str, bytes]:
    """The history, the weights, and where training stands."""
    files = (path for path in weights.glob("*.*") if path.suffix in (".csv", ".pth"))
    return {path.name: content_of(path) for path in files if "before" not in path.name}


@pytest.mark.parametrize(("head", "way"), CASES)
def test_training_from_any_state_comes_to_the_same_bits(config, tmp_path, head, way):
    weights, keep = config.parent / "weights", Resume.keep

    def copying(self: Resume, progress) -> None:
        keep(self, progress)
        number = len(list(tmp_path.iterdir()))
        shutil.copytree(self.path.parent, tmp_path / f"{number:02}")

    shutil.rmtree(weights, ignore_errors=True)
    train(config, head, way, weights, copying)
    wanted, states = results(weights), sorted(tmp_path.iterdir())
    assert len(wanted) == 3
    assert len(states) == STEPS + EPOCHS  # after each step, and after each validation
    for state in states[:: sized(5, 1)]:
        shutil.rmtree(weights)
        shutil.copytree(state, weights)
        train(config, head, way, weights, keep)
        assert results(weights) == wanted, state.name
    figure(f"resume equality: {head}, {way}", f"{STEPS} steps, {len(states)} states: bit-equal")
