"""Threads beside the one that computes: some read ahead of it, one writes behind it.

Both keep the order and hold a bounded number of items, so that memory does not grow where one side
is slower. What goes wrong in a thread is raised in the one that computes.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain, cycle
from typing import Any, TypeVar

RUN = 4
Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def ahead(
    readers: Sequence[AbstractContextManager[Callable[[Item], Result]]],
    items: Iterable[Item],
    depth: int,
    in_turn: int = RUN,
) -> Iterator[Iterator[Result]]:
    """What readers make of items, in order, from a thread for each of the readers.

    A reader is entered, called and left in its own thread, as rasterio's handles want it; each
    takes `in_turn` items after each other, since neighbours share blocks that a handle decodes
    once. `depth`: results that are held or under way; more where the readers' turns are.

    >>> from contextlib import nullcontext
    >>> squares = [nullcontext(lambda number: number**2)] * 2
    >>> with ahead(squares, range(5), depth=3) as results:
    ...     list(results)
    [0, 1, 4, 9, 16]
    """
    pending: deque[Future[Result]] = deque()
    depth = max(depth, in_turn * len(readers))  # or some would wait for their turn to come

    def results() -> Iterator[Result]:
        turns = chain.from_iterable([thread] * in_turn for thread in cycle(threads))
        for item, submit in zip(items, turns, strict=False):
            pending.append(submit(item))
            if len(pending) >= depth:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

    with ExitStack() as stack:
        threads = [stack.enter_context(_living_in_a_thread(reader)) for reader in readers]
        try:
            yield results()
        finally:
            for future in pending:
                future.cancel()


@contextmanager
def _living_in_a_thread(
    reader: AbstractContextManager[Callable[[Item], Result]],
) -> Iterator[Callable[[Item], Future[Result]]]:
    """A function that has a thread call the reader, which is opened and closed in it."""
    held = ExitStack()
    with ThreadPoolExecutor(1, "reader") as thread:
        opened = thread.submit(held.enter_context, reader)
        try:
            yield lambda item: thread.submit(lambda: opened.result()(item))
        finally:
            thread.submit(held.close).result()


@contextmanager
def behind(depth: int) -> Iterator[Callable[..., None]]:
    """A function that has another one called in a thread, in order, and returns at once.

    It waits only where `depth` calls are pending. The block ends when all are done, also where an
    error leaves it; after a call has failed those that have not begun are dropped. A call's failure
    is raised even where another error leaves the block, which it came before.

    >>> written = []
    >>> with behind(depth=2) as hand:
    ...     for number in range(4):
    ...         hand(written.append, number)
    >>> written
    [0, 1, 2, 3]
    """
    pending: deque[Future[Any]] = deque()
    failed = False

    def settle() -> None:
        nonlocal failed
        failed = True
        pending.popleft().result()
        failed = False

    def hand(function: Callable[..., Any], *arguments: Any) -> None:
        while pending and (len(pending) >= depth or pending[0].done()):
            settle()
        pending.append(pool.submit(function, *arguments))

    pool = ThreadPoolExecutor(1, "writer")
    try:
        yield hand
        while pending:
            settle()
    except BaseException:
        pool.shutdown(cancel_futures=failed)
        while pending and not failed:
            settle()
        raise
    finally:
        pool.shutdown()


@contextmanager
def spread(threads: int) -> Iterator[Callable[[Callable[[Item], Any], Iterable[Item]], None]]:
    """A function that calls another one for each item, in so many threads; one is the caller's.

    It returns when all calls are done. The failure of the first item that has one is raised; calls
    that have not begun by then are dropped, and the block ends when the others are done.

    >>> written = []
    >>> with spread(threads=3) as each:
    ...     each(written.append, range(4))
    >>> sorted(written)
    [0, 1, 2, 3]
    """
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(threads, "spread")) if threads > 1 else None

        def each(function: Callable[[Item], Any], items: Iterable[Item]) -> None:
            for _ in pool.map(function, items) if pool else map(function, items):
                pass

        yield each
