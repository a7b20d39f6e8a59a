"""Two ranks as children of the test, ended together as torchrun ends its own."""

import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial

from forked import LONGEST, Child

GLOO = ("resources.distributed=true", "resources.dist_backend=gloo")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def started(call: Callable[[], int], count: int = 2) -> list[Child]:
    """A call in each of some ranks, which find each other through a port of the first."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    place |= {"GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}

    def as_rank(rank: int) -> int:
        os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
        return call()

    return [Child(partial(as_rank, rank)) for rank in range(count)]


def ended(ranks: list[Child], seconds: float = LONGEST) -> list[int]:
    """The codes of ranks; where one fails the others get SIGTERM, as from torchrun."""
    deadline, told = time.monotonic() + seconds, False
    while any(rank.code is None for rank in ranks) and time.monotonic() < deadline:
        if not told and any(rank.code for rank in ranks):
            told = True
            for rank in ranks:
                if rank.code is None:
                    rank.kill(signal.SIGTERM)
        time.sleep(0.005)
    return [rank.wait(0.1) for rank in ranks]
