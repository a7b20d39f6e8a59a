"""Threads ahead and behind: order, bounds, errors, and each handle in a thread of its own."""

import threading
import time
from contextlib import contextmanager

import pytest

from utils.process import StoppedError
from utils.streaming import RUN, ahead, behind, spread


class Handle:
    """A reader that minds in which thread it is used, and counts what is under way."""

    def __init__(self, read=lambda item: item) -> None:
        self.read, self.events = read, []

    def __enter__(self):
        self.events.append(("open", threading.get_ident()))
        return self

    def __call__(self, item):
        self.events.append((item, threading.get_ident()))
        return self.read(item)

    def __exit__(self, *_):
        self.events.append(("closed", threading.get_ident()))


@pytest.mark.parametrize("readers", [1, 2, 5])
@pytest.mark.parametrize("depth", [1, 3, 100])
def test_results_come_in_order_whoever_is_slow(readers, depth):
    def slow(item):
        time.sleep(0.003 * (item % 3))
        return -item

    with ahead([Handle(slow) for _ in range(readers)], range(20), depth) as found:
        assert list(found) == [-item for item in range(20)]


def test_a_reader_is_opened_called_and_closed_in_one_thread_that_is_not_the_callers():
    handles = [Handle() for _ in range(3)]
    with ahead(handles, range(12), depth=4) as found:
        assert list(found) == list(range(12))
    threads = [{thread for _, thread in handle.events} for handle in handles]
    assert [len(each) for each in threads] == [1, 1, 1]
    assert len(set.union(*threads) | {threading.get_ident()}) == 4
    assert [handle.events[0][0] for handle in handles] == ["open"] * 3
    assert [handle.events[-1][0] for handle in handles] == ["closed"] * 3


def test_no_more_than_depth_items_are_read_before_they_are_asked_for():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    with ahead([Handle()] * 1, items(), depth=4) as found:
        for number, _ in zip(range(10), found, strict=False):
            assert len(taken) <= number + 4


@pytest.mark.parametrize("depth", [1, 8])
def test_all_readers_are_at_work_however_few_items_are_asked_for(depth):
    """Each waits for the others: they would not meet if one had no item."""
    readers = 5
    together = threading.Barrier(readers)

    def read(item):
        if item < RUN * readers:
            together.wait(timeout=10)
        return item

    with ahead([Handle(read) for _ in range(readers)], range(50), depth) as found:
        assert list(found) == list(range(50))


def test_an_error_in_a_reader_is_raised_at_its_item_and_closes_every_handle():
    def read(item):
        if item == 5:
            raise ZeroDivisionError("five")
        return item

    handles, seen = [Handle(read) for _ in range(2)], []
    with pytest.raises(ZeroDivisionError, match="five"), ahead(handles, range(50), 4) as found:
        for item in found:
            seen.append(item)
    assert seen == [0, 1, 2, 3, 4]
    assert all(handle.events[-1][0] == "closed" for handle in handles)
    assert sum(len(handle.events) for handle in handles) < 20  # the rest is not read any more


def test_a_reader_that_cannot_be_opened_says_so():
    @contextmanager
    def broken():
        raise FileNotFoundError("scene.tif")
        yield

    with pytest.raises(FileNotFoundError, match="scene"), ahead([broken()], range(3), 2) as found:
        next(found)


def test_a_caller_that_leaves_early_leaves_no_thread():
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ahead([Handle()] * 1, range(100), 4) as found:
        next(found)
        raise KeyboardInterrupt
    assert threading.active_count() == before


def test_calls_are_made_in_order_in_one_other_thread():
    calls = []
    with behind(depth=2) as hand:
        for number in range(20):
            hand(lambda n: calls.append((n, threading.get_ident())), number)
    assert [number for number, _ in calls] == list(range(20))
    assert len({thread for _, thread in calls} | {threading.get_ident()}) == 2


def test_no_more_than_depth_calls_wait():
    begun, go = [], threading.Event()

    def wait(number):
        begun.append(number)
        go.wait(5)

    with behind(depth=2) as hand:
        hand(wait, 0)
        hand(wait, 1)
        late = threading.Thread(target=hand, args=(wait, 2))
        late.start()
        late.join(0.1)
        assert late.is_alive()
        go.set()
        late.join(5)
    assert begun == [0, 1, 2]


def test_a_failed_call_is_raised_and_what_waits_is_dropped():
    calls = []

    def write(number):
        calls.append(number)
        if number == 1:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"), behind(depth=1) as hand:
        for number in range(50):
            hand(write, number)
    assert calls == [0, 1]


def test_calls_that_wait_are_made_though_the_caller_fails():
    calls = []

    def slow(number):
        time.sleep(0.02)
        calls.append(number)

    with pytest.raises(KeyboardInterrupt), behind(depth=3) as hand:
        for number in range(3):
            hand(slow, number)
        raise KeyboardInterrupt
    assert calls == [0, 1, 2]


def test_a_last_call_that_fails_is_raised_too():
    with pytest.raises(ZeroDivisionError), behind(depth=5) as hand:
        hand(lambda: 1 / 0)


def test_a_failed_call_is_raised_though_a_signal_ends_the_caller():
    """A full disk must not pass for a run that was merely stopped."""

    def full():
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space") as caught, behind(depth=2) as hand:
        hand(full)
        raise StoppedError
    assert isinstance(caught.value.__context__, StoppedError)


def test_one_thread_is_the_callers_and_keeps_the_order():
    calls = []
    with spread(threads=1) as each:
        each(lambda item: calls.append((item, threading.get_ident())), range(9))
    assert calls == [(item, threading.get_ident()) for item in range(9)]


def test_several_threads_are_at_work_at_once_and_all_is_done_at_the_end():
    together, done = threading.Barrier(4), []

    def work(item):
        together.wait(timeout=10)
        time.sleep(0.01 * item)
        done.append(item)

    with spread(threads=4) as each:
        each(work, range(4))
        assert sorted(done) == [0, 1, 2, 3]
        each(work, range(4, 12))
        assert sorted(done) == list(range(12))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_first_failure_is_raised_and_what_has_not_begun_is_dropped(threads):
    begun = []

    def work(item):
        begun.append(item)
        if item >= 4:
            time.sleep(0.02)
            raise OSError(item, "failed")

    with pytest.raises(OSError, match="failed") as caught, spread(threads) as each:
        each(work, range(100))
    assert caught.value.errno == 4
    assert len(begun) <= 4 + 2 * threads
    assert not [each for each in threading.enumerate() if each.name.startswith("spread")]
