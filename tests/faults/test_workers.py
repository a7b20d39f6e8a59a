"""Worker processes end with their parent, and otherwise when it says so."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from forked import Child, left_of

from utils.process import serve_parent


def serve(ready: Path, pause: float) -> None:
    """What a worker does: nothing, for long; `pause` comes before it learns of its parent."""
    time.sleep(pause)
    serve_parent()
    ready.write_text(str(os.getpid()))
    time.sleep(60)


def parent_of_a_worker(ready: Path, pause: float = 0.0) -> Child:
    """A child that has a worker."""

    def live() -> int:
        worker = multiprocessing.get_context("fork").Process(target=serve, args=(ready, pause))
        worker.start()
        ready.with_suffix(".begun").write_text("")
        worker.join()
        return worker.exitcode

    return Child(live)


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 10
    while not (path.exists() and (path.suffix or path.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path.read_text()


def gone(session: int, seconds: float = 10.0) -> bool:
    """Whether all processes of a session end in time."""
    deadline = time.monotonic() + seconds
    while left_of(session) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not left_of(session)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_worker_outlives_what_a_stranger_sends_and_ends_with_its_parent(tmp_path, number):
    parent = parent_of_a_worker(tmp_path / "ready")
    worker = int(wait_for(tmp_path / "ready"))
    os.kill(worker, number)
    time.sleep(0.2)
    assert worker in left_of(parent.pid)
    parent.kill()
    assert parent.wait() == -9
    assert gone(parent.pid)


def test_a_worker_ends_when_its_parent_says_so(tmp_path):
    def live() -> int:
        worker = multiprocessing.get_context("fork").Process(
            target=serve, args=(tmp_path / "ready", 0.0)
        )
        worker.start()
        wait_for(tmp_path / "ready")
        worker.terminate()
        worker.join(10)
        return 7 if worker.exitcode == 0 else 1

    assert Child(live).wait() == 7


def test_a_worker_whose_parent_was_gone_before_it_looked_ends_too(tmp_path):
    parent = parent_of_a_worker(tmp_path / "ready", pause=0.5)
    wait_for(tmp_path / "ready.begun")
    parent.kill()
    assert parent.wait() == -9
    assert gone(parent.pid)
