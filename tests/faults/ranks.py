"""Two ranks as children of the test, ended together as torchrun ends its own."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial

from forked import LONGEST, Child
from torch.distributed import TCPStore

GLOO = ("resources.distributed=true", "resources.dist_backend=gloo")


class Ranks(list[Child]):
    """A call in each of some ranks, which find each other through a store of their parent's."""

    def __init__(self, call: Callable[[], int], count: int = 2) -> None:
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(self.store.port)}
        place |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
        place |= {"GLOO_SOCKET_IFNAME": "lo"}

        def as_rank(rank: int) -> int:
            os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank))
            return call()

        super().__init__(Child(partial(as_rank, rank)) for rank in range(count))


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
    return [rank.wait(0.1) for rank in ranks]
