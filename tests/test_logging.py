"""What a run says: levels, stamps, the file, one line per message, progress in two ways."""

import io
import os
import re
import signal
import time
from pathlib import Path

import pytest
from tqdm import tqdm

from utils import logging as module
from utils.logging import TimedBlock, VerbosityLogger, complain, duration, progress_line, say


class Terminal(io.StringIO):
    """A stream that claims to be a terminal."""

    def isatty(self) -> bool:
        return True


def logger(level: str = "info", **options) -> VerbosityLogger:
    return VerbosityLogger(level, **{"timestamps": False, "stream": io.StringIO(), **options})


def said(log: VerbosityLogger) -> list[str]:
    return log.stream.getvalue().splitlines()


def talk(log: VerbosityLogger) -> list[str]:
    for name in ("error", "warning", "info", "debug"):
        getattr(log, name)(f"an {name}")
    return said(log)


def test_each_level_says_what_it_should():
    lines = ["[ERROR] an error", "[WARNING] an warning", "[INFO] an info", "[DEBUG] an debug"]
    assert talk(logger("error")) == lines[:1]
    assert talk(logger("info")) == lines[:3]
    assert talk(logger("debug")) == lines


def test_a_timestamp_stands_before_each_line():
    log = logger(timestamps=True)
    log.info("here")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[INFO\] here", said(log)[0])


def test_every_line_goes_to_the_file_too_and_its_folder_is_made(tmp_path):
    path = tmp_path / "new" / "folder" / "run.log"
    for number in range(2):
        log = logger(file=path)
        log.info(f"Ödland {number}")
        log.debug("not said")
        log.close()
        assert said(log) == [f"[INFO] Ödland {number}"]
    assert path.read_text(encoding="utf-8") == "[INFO] Ödland 0\n[INFO] Ödland 1\n"


def test_after_close_nothing_is_written(tmp_path):
    log = logger(file=tmp_path / "run.log")
    log.close()
    log.info("late")
    assert (tmp_path / "run.log").read_text() == ""


@pytest.mark.parametrize(
    "character",
    ["\n", "\r", "\x1b", "\x00", "\x7f", "\x9b", "\t", "\u2028", "\u202e", "\u200b", "\ud800"],
)
def test_a_message_is_one_line_whatever_is_in_it(tmp_path, character):
    log = logger(file=tmp_path / "run.log", timestamps=True)
    log.info(f"before{character}[ERROR] after")
    log.close()
    escaped = character.encode("unicode_escape").decode()
    for text in (log.stream.getvalue(), (tmp_path / "run.log").read_bytes().decode()):
        assert text.count("\n") == 1
        assert f"before{escaped}[ERROR] after" in text


def test_percent_signs_and_braces_are_text():
    log = logger()
    log.info("100 % of %s {name}")
    assert said(log) == ["[INFO] 100 % of %s {name}"]


def test_a_silent_rank_says_nothing_and_makes_no_file(tmp_path):
    log = logger("debug", silent=True, file=tmp_path / "logs" / "run.log", stream=Terminal())
    assert talk(log) == []
    assert list(log.progress(range(100), "train")) == list(range(100))
    with TimedBlock(log, "train"):
        pass
    log.close()
    assert said(log) == []
    assert not (tmp_path / "logs").exists()


def test_loggers_do_not_share_their_handlers():
    first, second = logger(), logger()
    first.info("one")
    second.info("two")
    assert (said(first), said(second)) == (["[INFO] one"], ["[INFO] two"])


# Progress


@pytest.mark.parametrize(("count", "every", "lines"), [(35, 10, 3), (30, 10, 2), (120, 50, 2)])
def test_without_a_terminal_a_line_comes_every_so_many_items(count, every, lines):
    log = logger()
    assert list(log.progress(range(count), "train", every=every)) == list(range(count))
    assert len(said(log)) == lines
    pattern = rf"\[INFO\] train: {every}/{count} batches, [\d.]+ batches/s, .* left"
    assert re.fullmatch(pattern, said(log)[0])


def test_progress_of_a_generator_has_the_total_it_is_given():
    log = logger()
    items = (number for number in range(100))
    list(log.progress(items, "prepare", total=100, unit="tile", every=50))
    [line] = said(log)
    assert line.startswith("[INFO] prepare: 50/100 tiles, ")
    list(log.progress((number for number in range(60)), "prepare", unit="tile", every=50))
    assert re.fullmatch(r"\[INFO\] prepare: 50 tiles, [\d.]+ tiles/s", said(log)[1])


def test_a_line_of_progress_comes_when_the_item_is_done():
    log = logger()
    for item in log.progress(range(11), "train"):
        assert (len(said(log)) > 0) is (item >= 10)


def test_rate_and_time_left_are_those_of_the_clock(monkeypatch):
    clock = iter([100.0, 105.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    log = logger()
    list(log.progress(range(19), "train"))
    assert said(log) == ["[INFO] train: 10/19 batches, 2.0 batches/s, 4.50 s left"]


def test_a_terminal_has_a_bar_and_no_lines():
    log = logger(stream=Terminal())
    assert list(log.progress(range(200), "train")) == list(range(200))
    text = log.stream.getvalue()
    assert "train:" in text
    assert "\r" in text
    assert "[INFO]" not in text


def test_messages_beside_a_bar_stand_on_lines_of_their_own():
    log = logger(stream=Terminal())
    for item in log.progress(range(3), "train"):
        log.info(f"item {item}")
    lines = re.split(r"[\r\n]+", log.stream.getvalue())
    assert {"[INFO] item 0", "[INFO] item 1", "[INFO] item 2"} <= set(lines)


def test_at_level_error_there_is_no_progress():
    for stream in (io.StringIO(), Terminal()):
        log = logger("error", stream=stream)
        assert list(log.progress(range(100), "train")) == list(range(100))
        assert log.stream.getvalue() == ""


def test_items_are_passed_on_as_they_come():
    log, pulled = logger(), []
    stream = log.progress((pulled.append(n) or n for n in range(5)), "train")
    next(stream)
    assert pulled == [0]


@pytest.mark.parametrize(("unit", "units"), [("batch", "batches"), ("tile", "tiles")])
def test_units_have_their_plural(unit, units):
    assert f" {units}, " in progress_line("x", 3, 9, unit, 1.0)


# Timed blocks


def test_a_block_says_when_it_starts_and_how_long_it_took(monkeypatch):
    clock = iter([0.0, 75.4])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    log = logger()
    with TimedBlock(log, "train") as block:
        assert said(log) == ["[INFO] train: started"]
    assert said(log)[1:] == ["[INFO] train: finished in 1 min 15 s"]
    assert block.seconds == 75.4


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_block_that_fails_says_so_and_passes_the_error_on(monkeypatch, error):
    clock = iter([0.0, 2.5])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    log = logger("info")
    with pytest.raises(type(error)), TimedBlock(log, "train"):
        raise error
    assert said(log)[1:] == ["[INFO] train: failed after 2.50 s"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.00 s"),
        (9.999, "10.0 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min 00 s"),
        (3599.6, "1 h 00 min"),
        (86400, "24 h 00 min"),
    ],
)
def test_durations_read_well_at_their_edges(seconds, text):
    assert duration(seconds) == text


def test_answers_go_to_standard_output_and_complaints_to_standard_error(capsys):
    say("an answer")
    complain("a complaint")
    assert capsys.readouterr() == ("an answer\n", "a complaint\n")


def test_a_rank_is_what_torchrun_says(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert module.launched_rank() == 0
    monkeypatch.setenv("RANK", "3")
    assert module.launched_rank() == 3


def test_a_log_file_that_cannot_be_made_is_an_os_error(tmp_path):
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        logger(file=Path(tmp_path / "taken" / "run.log"))


@pytest.mark.parametrize("level", ["error", "debug"])
def test_the_end_of_a_run_is_one_line_and_its_traceback_goes_to_the_file(tmp_path, level):
    log = logger(level, file=tmp_path / "run.log")
    try:
        raise ValueError("two\nlines")
    except ValueError as error:
        log.fail(f"scene: {error}", error)
    log.close()
    shown = said(log)
    assert shown[0] == "error: scene: two\\nlines"
    assert (len(shown) > 1) == (level == "debug")
    kept = (tmp_path / "run.log").read_text().splitlines()
    assert kept[:2] == [
        "[ERROR] scene: two\\nlines", "[DEBUG] Traceback (most recent call last):"
    ]  # fmt: skip
    assert "[DEBUG] ValueError: two" in kept


def test_a_silent_rank_tells_its_end_all_the_same():
    log = logger("info", silent=True)
    log.fail("rank 1: no memory", MemoryError())
    assert said(log) == ["error: rank 1: no memory"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_log_file_on_a_full_disk_ends_no_run(capsys):
    log = VerbosityLogger("info", timestamps=False, file=Path("/dev/full"))
    log.info("a line")
    log.close()
    assert capsys.readouterr().err == "[INFO] a line\n"


def test_a_process_that_is_killed_while_it_writes_a_line_stops_no_other(log):
    """A child of the same parent says its line, though its sister holds the lock for ever."""
    log.info("before")  # whatever tqdm makes for its lines is there by now
    held, sister = os.pipe(), os.fork()
    if sister == 0:
        tqdm.get_lock().acquire()
        os.write(held[1], b"x")
        time.sleep(60)
        os._exit(0)
    os.read(held[0], 1)
    os.kill(sister, signal.SIGKILL)
    os.waitpid(sister, 0)
    other = os.fork()
    if other == 0:
        signal.alarm(20)
        log.info("after")
        os._exit(0)
    assert os.waitpid(other, 0)[1] == 0
