"""The tools of the fault tests: children that end in every way."""

import json
import os
import signal
import time

import pytest
import size
from forked import Child, forked, killed, left_of


def test_a_child_gives_its_code_or_its_signal_and_what_it_said(capfd):
    def speak() -> int:
        print("out")  # noqa: T201
        os.write(2, b"err\n")
        return 7

    child = Child(speak)
    assert child.wait() == 7
    assert sorted(child.said.split()) == ["err", "out"]
    assert capfd.readouterr() == ("", "")
    assert forked(lambda: os.kill(os.getpid(), signal.SIGTERM)) == -signal.SIGTERM


def test_an_exception_is_1_and_shown(capsys):
    def fail() -> int:
        raise ValueError("no such tile")

    assert forked(fail) == 1
    assert "ValueError: no such tile" in capsys.readouterr().err


def test_a_child_is_killed_where_it_still_runs():
    assert killed(lambda: time.sleep(60), after=0.05) == -9
    assert killed(lambda: 0, after=0.2) == 0


def test_a_child_that_hangs_fails_the_test_and_is_gone():
    child = Child(lambda: time.sleep(60))
    with pytest.raises(AssertionError, match="still there after"):
        child.wait(0.1)
    assert left_of(child.pid) == []


def test_what_a_child_leaves_is_found():
    def leave() -> int:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        return 0

    child = Child(leave)
    assert child.wait() == 0
    [pid] = left_of(child.pid)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while left_of(child.pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert left_of(child.pid) == []


def test_sizes_and_figures(monkeypatch, tmp_path):
    assert size.sized(5, 100) == (100 if size.WHOLE else 5)
    monkeypatch.setenv("DINOV3SEG_FAULTS_TABLE", str(tmp_path / "table"))
    size.figure("kill -9", "100: all equal")
    size.figure("disk full", "20")
    rows = [json.loads(line) for line in (tmp_path / "table").read_text().splitlines()]
    assert rows == [["kill -9", "100: all equal"], ["disk full", "20"]]
