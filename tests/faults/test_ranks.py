"""Two ranks: one killed, one that hangs, told to end, orphaned: all end in time and go on.

Most are children of the test, which ends them as torchrun does; in the whole size some are started
by torchrun itself.
"""

import gc
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import project
import pytest
import torch
from bits import content_of, told
from forked import Child, left_of
from ranks import GLOO, Ranks, ended
from size import figure, sized
from torch.nn.parallel import DistributedDataParallel

from utils import distributed
from utils.divergence import tensors_in
from utils.step import Step

KEYS = {"model": {"head": "unet"}, "train": {"batch_size": 1, "epochs": 4, "ema_decay": 0.9}}
SOON = 10.0  # seconds in which a job ends when a rank is killed
HANGS = 0.05  # minutes without a sign of life of a rank
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


class Trial:
    """A project of two ranks that begins anew each time, and what an unbroken run makes of it."""

    def __init__(self, folder: Path) -> None:
        self.kept, self.work = folder / "kept", folder / "work"
        project.write_project(self.work, 190, 250, inference={"enable": False}, **KEYS)
        shutil.copytree(self.work, self.kept)
        ranks = self.start(1)
        wait_for(lambda: "train: started" in ranks[0].said)
        begun = time.monotonic()
        assert ended(ranks) == [0, 0], ranks[0].said
        self.seconds = time.monotonic() - begun  # of training
        self.wanted = self.results()
        shutil.copy(self.work / "cache" / "splits.geojson", folder)

    def start(self, workers: int, *settings: str) -> Ranks:
        """The run in two ranks."""
        config, more = self.work / "config.yml", (f"train.num_workers={workers}", *settings)
        return Ranks(lambda: project.run(config, *GLOO, *more))

    def renew(self) -> None:
        """Bring the project back to where it began."""
        shutil.rmtree(self.work)
        shutil.copytree(self.kept, self.work)

    def results(self) -> dict[str, object]:
        """Tiles, weights and history."""
        [best] = self.work.glob("weights/*_best.pth")
        stored = {key: each for key, each in torch.load(best).items() if key != "config"}
        paths = [*self.work.glob("cache/*.pt"), self.work / "weights" / "metrics.csv"]
        return {path.name: content_of(path) for path in paths} | {best.name: told(stored)}

    def goes_on(self) -> bool:
        """Whether the same command, run again, comes to what an unbroken run made."""
        ranks = self.start(0)
        assert ended(ranks) == [0, 0], ranks[0].said
        return self.results() == self.wanted

    def status(self) -> dict[str, object]:
        """What status.json says."""
        return json.loads((self.work / "weights" / "status.json").read_text())


@pytest.fixture(scope="module")
def trial(tmp_path_factory) -> Trial:
    return Trial(tmp_path_factory.mktemp("ranks"))


def wait_for(done: Callable[[], object], seconds: float = 30.0) -> float:
    """Wait until something is so; how long it took."""
    begun = time.monotonic()
    while not done():
        assert time.monotonic() < begun + seconds, "waited in vain"
        time.sleep(0.002)
    return time.monotonic() - begun


def begun_phase(ranks: list[Child], dice: random.Random, seconds: float) -> None:
    """Wait for a moment in one of the phases."""
    phase = dice.choice(("prepare", "train", "train", "train"))
    wait_for(lambda: f"{phase}: started" in ranks[0].said)
    time.sleep(dice.uniform(0, seconds if phase == "train" else 0.05))


def nothing_left(ranks: list[Child]) -> bool:
    return not any(left_of(rank.pid) for rank in ranks)


def errors_of(ranks: list[Child]) -> list[str]:
    """The lines that say why a run ended."""
    lines = [line for rank in ranks for line in rank.said.splitlines()]
    return [line for line in lines if line.startswith("error: ")]


def test_a_rank_is_killed(trial):
    dice, count, slowest, inside = random.Random("a rank killed"), sized(1, 17), 0.0, 0
    for number in range(count):
        trial.renew()
        ranks = trial.start((number + 1) % 2)
        begun_phase(ranks, dice, 0.7 * trial.seconds)
        victim = ranks[dice.randrange(2)]
        victim.kill()
        begun = time.monotonic()
        codes = ended(ranks)
        if -9 in codes:
            inside += 1
            assert set(codes) <= {-9, 4, 75}, ranks[0].said + ranks[1].said
            assert len(errors_of(ranks)) <= 1
        wait_for(lambda: nothing_left(ranks), SOON)  # noqa: B023
        slowest = max(slowest, time.monotonic() - begun)
        assert trial.goes_on()
    assert slowest < SOON
    assert inside > count / 2
    figure("two ranks: one killed", f"{count} forked: all over in {slowest:.1f} s, all equal")


def test_a_rank_hangs(trial):
    dice, count, slowest = random.Random("a rank hangs"), sized(1, 18), 0.0
    for number in range(count):
        trial.renew()
        ranks = trial.start((number + 1) % 2, f"resources.timeout_minutes={HANGS}")
        begun_phase(ranks, dice, 0.5 * trial.seconds)
        hanging, other = dice.sample(ranks, 2)
        hanging.kill(signal.SIGSTOP)
        begun = time.monotonic()
        assert other.wait(60 * HANGS + SOON) == 4, other.said
        slowest = max(slowest, time.monotonic() - begun)
        hanging.kill()  # torchrun's last word
        hanging.wait()
        [line] = errors_of([other])
        assert "resources.timeout_minutes" in line
        wait_for(lambda: nothing_left(ranks), SOON)  # noqa: B023
        assert trial.goes_on()
    figure(
        "two ranks: one stopped",
        f"{count} forked, {60 * HANGS:g} s allowed: all over in {slowest:.1f} s, all equal",
    )


def test_both_are_told_to_end(trial):
    dice, count, slowest, kept = random.Random("told to end"), sized(1, 17), 0.0, 0
    for number in range(count):
        trial.renew()
        ranks = trial.start((number + 1) % 2)
        begun_phase(ranks, dice, 0.7 * trial.seconds)
        for rank in ranks:
            os.killpg(rank.pid, signal.SIGTERM)  # as torchrun does: workers are told too
        begun = time.monotonic()
        codes = ended(ranks)
        assert codes in ([75, 75], [0, 0]), ranks[0].said + ranks[1].said
        kept += codes == [75, 75]
        assert trial.status()["exit_code"] == codes[0]
        wait_for(lambda: nothing_left(ranks), SOON)  # noqa: B023
        slowest = max(slowest, time.monotonic() - begun)
        assert trial.goes_on()
    assert slowest < SOON
    assert kept > count / 2
    figure("two ranks: TERM", f"{count} forked: all over in {slowest:.1f} s, all equal")


def test_their_parent_is_killed(trial, tmp_path):
    dice, count, slowest = random.Random("orphans"), sized(1, 17), 0.0
    for number in range(count):
        trial.renew()
        note = tmp_path / f"ranks{number}"

        def launch() -> int:
            ranks = trial.start((number + 1) % 2)  # noqa: B023
            note.write_text(" ".join(str(rank.pid) for rank in ranks))  # noqa: B023
            return max(ended(ranks))

        parent = Child(launch)
        log = trial.work / "run.log"
        wait_for(lambda: log.exists() and "train: started" in log.read_text())  # noqa: B023
        time.sleep(dice.uniform(0, 0.5 * trial.seconds))
        parent.kill()
        assert parent.wait() == -9
        pids = [int(each) for each in note.read_text().split()]
        slowest = max(slowest, wait_for(lambda: not any(map(left_of, pids)), SOON))  # noqa: B023
        assert trial.status()["exit_code"] == 75
        assert trial.goes_on()
    figure("two ranks: parent killed", f"{count} forked: all over in {slowest:.1f} s, all equal")


def children_of(pid: int) -> list[int]:
    """The processes that a process started itself."""
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.parametrize("what", ["rank killed", "rank stopped", "TERM", "torchrun killed"])
def test_what_torchrun_started_ends_in_time_and_goes_on(trial, what):
    count, slowest = sized(0, 3 if what != "rank stopped" else 2), 0.0
    if not count:
        pytest.skip("torchrun itself is tried by `make faults`, and by test_distributed")
    for number in range(count):
        trial.renew()
        settings = (*GLOO, f"train.num_workers={number % 2}", f"resources.timeout_minutes={HANGS}")
        more = [part for each in settings for part in ("--set", each)]
        job = subprocess.Popen(
            [project.PYTHON, *LAUNCH, "--shutdown-timeout=3", project.ROOT / "main.py",
             trial.work / "config.yml", *more],
            env=project.surroundings(), stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        log = trial.work / "run.log"
        wait_for(lambda: log.exists() and "epoch 1/4" in log.read_text(), 60)  # noqa: B023
        ranks = children_of(job.pid)
        sent, victim = {
            "rank killed": (signal.SIGKILL, ranks[number % 2]),
            "rank stopped": (signal.SIGSTOP, ranks[number % 2]),
            "TERM": (signal.SIGTERM, job.pid),
            "torchrun killed": (signal.SIGKILL, job.pid),
        }[what]
        os.kill(victim, sent)
        begun = time.monotonic()
        assert job.wait(60) != 0
        wait_for(lambda: not any(map(left_of, ranks)), SOON)  # noqa: B023
        slowest = max(slowest, time.monotonic() - begun)
        assert trial.goes_on()
    assert slowest < SOON + (60 * HANGS + 30 if what == "rank stopped" else 0)
    figure(f"torchrun: {what}", f"{count}: all over in {slowest:.1f} s, all equal")


@pytest.mark.parametrize("what", ["loss", "gradient", "validation loss"])
def test_what_is_no_number_on_one_rank_ends_both_with_one_line_and_its_tiles(trial, what):
    trial.renew()
    config, train = trial.work / "config.yml", ("prepare.enable=false", "verify.enable=false")
    assert project.run(config, "train.enable=false") == 0
    sides = json.loads((trial.kept.parent / "splits.geojson").read_text())["features"]
    side = "val" if what == "validation loss" else "train"
    names = [each["properties"]["tile"] for each in sides if each["properties"]["side"] == side]
    victim = names[1]

    def poison(self, *arguments):
        output = forward(self, *arguments)
        if victim not in arguments[1].name:
            return output
        if what == "gradient":
            output.total.register_hook(lambda gradient: gradient * math.nan)
            return output
        return output._replace(total=output.total * math.nan)

    forward = Step.forward

    def run() -> int:
        Step.forward = poison
        return project.run(config, *GLOO, *train, "train.batch_size=1")

    ranks = Ranks(run)
    assert ended(ranks) == [5, 5], ranks[0].said + ranks[1].said
    [line] = errors_of(ranks)
    assert re.search(rf"{what} is nan .*step \d+ .*rates .*tiles {victim}\b", line), line
    assert line.count("north__") == 1
    assert trial.status()["message"] in line
    for path in trial.work.glob("weights/*.pth"):
        assert all(torch.isfinite(each).all() for each in tensors_in(torch.load(path)))


class Groups(list):
    """Process groups that are let go of when no DDP module can hold one for longer."""

    def clear(self) -> None:
        held = [each for each in gc.get_objects() if type(each) is DistributedDataParallel]
        assert not held
        super().clear()


def test_no_ddp_module_is_left_when_its_group_is(trial):
    trial.renew()

    def run() -> int:
        gc.set_threshold(0)  # a module in a circle would be there until Python looks for such
        distributed.GROUPS = Groups()
        code = project.run(trial.work / "config.yml", *GLOO, "train.epochs=1")
        return 2 if distributed.GROUPS else code

    ranks = Ranks(run)
    assert ended(ranks) == [0, 0], ranks[0].said + ranks[1].said
