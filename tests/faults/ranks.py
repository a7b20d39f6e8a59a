"""Two ranks as children of the test, ended together as torchrun ends its own."""

import contextlib
import os
import signal
import time
from collections.abc import Callable
from functools import partial

from forked import LONGEST, Child
from torch.distributed import TCPStore

from utils.process import outlive

GLOO = ("resources.distributed=true", "resources.dist_backend=gloo")


class Ranks(list[Child]):
    """A call in each of some ranks, which find each other through a store of their parent's.

    The store has a child of its own: no thread of it runs where ranks are forked.
    """

    def __init__(self, call: Callable[[], int], count: int = 2) -> None:
        self.parent = os.getpid()
        read, write = os.pipe()
        self.host = Child(partial(_host, write))
        os.close(write)
        port = os.read(read, 8).decode()
        os.close(read)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        place |= {"GLOO_SOCKET_IFNAME": "lo"}

        def as_rank(rank: int) -> int:
            os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
            return call()

        super().__init__(Child(partial(as_rank, rank)) for rank in range(count))

    def __del__(self) -> None:
        if os.getpid() == self.parent:
            with contextlib.suppress(ProcessLookupError):
                self.host.kill()
            self.host.wait()


def _host(write: int) -> int:
    """Hold a store, tell its port, end with the parent."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(write, str(store.port).encode())
    outlive(os.getppid())
    return 0


def ended(ranks: Ranks, seconds: float = LONGEST) -> list[int]:
    """The codes of ranks; where one fails the others get SIGTERM, as from torchrun."""
    deadline, told = time.monotonic() + seconds, False
    while any(rank.code is None for rank in ranks) and time.monotonic() < deadline:
        if not told and any(rank.code for rank in ranks):
            told = True
            for rank in ranks:
                if rank.code is None:
                    rank.kill(signal.SIGTERM)
        time.sleep(0.005)
    hanging = [rank.said for rank in ranks if rank.code is None]
    assert not hanging, f"still there after {seconds} s: {hanging}"
    return [rank.wait() for rank in ranks]
