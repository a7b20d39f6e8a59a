"""Ranks, sharing of work and agreement; one process is world size 1.

The only room that knows torch.distributed. Code elsewhere calls `run.share`, `run.sum`, `run.agree`
and `run.wait` and is the same on one CPU and on many GPUs.
"""

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import Resources
from utils.devices import DeviceError, no_cuda
from utils.process import STOP, StoppedError, exit_code_of

Item = TypeVar("Item")
BEAT, LOOK = 1.0, 0.05  # seconds between two signs of life, and between two looks for them
GRACE = 5.0  # seconds without one, after which a rank that is asked to end does so alone
# A group that a DDP module lets go of last waits for threads of its own that wait for Python: an
# error's frames may hold such a module until the run is over, so groups are held for longer.
GROUPS: list[dist.ProcessGroup] = []

LAUNCH = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}  # what torchrun sets


class LaunchError(DeviceError):
    """The run was started the wrong way."""

    everywhere = True  # every rank meets it, so the first one's word is enough


class PeerError(Exception):
    """Another rank ended or cannot be reached, and this one cannot go on alone.

    exit_code: that of the rank that failed first; everywhere: whether that one said why, so that
    the others need not.
    """

    def __init__(self, text: str, exit_code: int = 4, everywhere: bool = False) -> None:
        super().__init__(text)
        self.exit_code, self.everywhere = exit_code, everywhere


class Pulse:
    """Signs of life and last words of ranks, in the store by which they found each other.

    An exchange between ranks ends them all when it takes longer than `resources.timeout_minutes`.
    Where one may wait for hours while another works, they meet here first: that one still beats.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, minutes: float) -> None:
        self.store, self.rank, self.world_size, self.minutes = store, rank, world_size, minutes
        self._meetings, self._beat, self._looked, self._asked = 0, 0.0, 0.0, False

    def beat(self) -> None:
        """Tell the others that this rank is at work; called between any two pieces of it."""
        if time.monotonic() - self._beat > BEAT:
            self._beat = time.monotonic()
            self.store.add(f"beats of {self.rank}", 1)

    def stopping(self) -> bool:
        """Whether a signal asked this rank to end, which the others learn, or, lately, another."""
        if STOP.asked:
            self.store.set("stopping", "")
        elif time.monotonic() - self._looked > BEAT:
            self._looked = time.monotonic()
            self._asked = self.store.check(["stopping"])
        return STOP.asked or self._asked

    def meet(self, stop_alone: bool = True) -> None:
        """Go on when all ranks are here; not while they work, but long after one gave no sign.

        stop_alone: whether a signal ends this rank at once; otherwise it tells the others, who come
        soon if they live.
        """
        self._meetings += 1
        here = f"ranks at meeting {self._meetings}"
        self.store.add(here, 1)
        signs, since = [], time.monotonic()
        while self.store.add(here, 0) < self.world_size:
            if stop_alone:
                STOP.check()
            if self.word() is not None:
                raise PeerError("another rank failed")
            found = [self.store.add(f"beats of {rank}", 0) for rank in range(self.world_size)]
            found.append(self.store.add(here, 0))
            if found != signs:
                signs, since = found, time.monotonic()
            silent = time.monotonic() - since
            if self.stopping() and silent > GRACE:
                STOP.check()
            if silent > 60 * self.minutes:
                raise PeerError(silence(self.minutes))
            time.sleep(LOOK)

    def leave_word(self, code: int) -> None:
        """Tell the others that this rank fails, as far as they can still be told."""
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("failed", "", f"{self.rank} {code}")

    def word(self) -> tuple[int, int] | None:
        """The rank that failed first and its exit code, if one left word."""
        with contextlib.suppress(RuntimeError):
            if self.store.check(["failed"]):
                rank, code = self.store.get("failed").split()
                return int(rank), int(code)
        return None


def silence(minutes: float) -> str:
    """What to say of a rank that hangs.

    >>> silence(30.0)
    'no sign of life of another rank for 30 minutes (resources.timeout_minutes); see its machine'
    """
    return (
        f"no sign of life of another rank for {minutes:g} minutes (resources.timeout_minutes); "
        "see its machine"
    )


@dataclass(frozen=True, slots=True)
class Runtime:
    """This process among its ranks.

    >>> run = Runtime()
    >>> run.is_main, run.share(["a", "b", "c"]), run.agree(0.5)
    (True, ['a', 'b', 'c'], 0.5)
    >>> Runtime(rank=1, world_size=2).share([0, 1, 2, 3, 4])
    [1, 3]
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    pulse: Pulse | None = field(default=None, compare=False, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this rank logs, writes checkpoints and infers."""
        return self.rank == 0

    def device(self, name: str) -> torch.device:
        """The device for `auto`, `cpu`, `cuda` or `cuda:N`; without N each rank has its own GPU."""
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise DeviceError(f"device: {name} asked for, but {no_cuda()}; set it to cpu or auto")
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return torch.device("cpu")
        index = int(name.partition(":")[2] or self.local_rank)
        if index >= torch.cuda.device_count():
            raise DeviceError(
                f"device: cuda:{index} asked for, but this machine has {torch.cuda.device_count()} "
                "GPU(s); start fewer processes or name another device"
            )
        return torch.device("cuda", index)

    def share(self, items: Sequence[Item]) -> list[Item]:
        """This rank's part of the items; the parts of all ranks are the items, each once."""
        return list(items[self.rank :: self.world_size])

    def wrap(self, module: nn.Module, device: torch.device) -> nn.Module:
        """The module with gradients averaged over ranks; on GPU BatchNorm sees the global batch."""
        if self.world_size == 1:
            return module
        if device.type == "cpu" and dist.get_backend() == "nccl":
            raise DeviceError(
                "train.device is cpu and resources.dist_backend nccl; set the backend to gloo"
            )
        if device.type == "cuda":
            module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
        devices = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices)

    def unsynced(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Hold back the gradient exchange for all but the last micro-batch of a step."""
        if self.world_size == 1 or last:
            return contextlib.nullcontext()
        return module.no_sync()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all ranks, the same on every rank and on the tensor's device."""
        if self.world_size == 1:
            return tensor
        total = tensor.to(_backend_device(self.local_rank), copy=True)
        dist.all_reduce(total)
        return total.to(tensor.device)

    def align(self, module: nn.Module) -> None:
        """Give every rank the first rank's buffers (running means of BatchNorm)."""
        if self.world_size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, src=0)

    def gather(self, value: Item) -> list[Item]:
        """Every rank's value, in the order of the ranks, on each of them.

        >>> Runtime().gather("tiles")
        ['tiles']
        """
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def agree(self, value: float) -> float:
        """The first rank's value, on every rank."""
        if self.world_size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def first(
        self, context: contextlib.AbstractContextManager
    ) -> contextlib.AbstractContextManager:
        """A context that only the first rank enters."""
        return context if self.is_main else contextlib.nullcontext()

    def wait(self) -> None:
        """Go on when every rank is here, however long those that work in `beating` take."""
        if self.pulse is not None:
            self.pulse.meet()
        if self.world_size > 1:
            self.sum(torch.zeros(1))

    def beating(self, work: Iterable[Item]) -> Iterator[Item]:
        """The pieces of long work while others may wait; ends between two if a signal asks it to.

        >>> list(Runtime().beating("abc"))
        ['a', 'b', 'c']
        """
        for piece in work:
            STOP.check()
            if self.pulse is not None:
                self.pulse.beat()
            yield piece

    def apart(self, work: Iterable[Item]) -> Iterator[Item]:
        """The pieces of this rank's own share, which waits for no other's; then all ranks meet.

        Where a signal asks one of them to end, all do so within about a second, and together.

        >>> list(Runtime().apart("abc"))
        ['a', 'b', 'c']
        """
        for piece in work:
            if self.pulse.stopping() if self.pulse is not None else STOP.asked:
                break
            if self.pulse is not None:
                self.pulse.beat()
            yield piece
        if self.pulse is not None:
            self.pulse.meet(stop_alone=False)
        if self.sum(torch.tensor(int(STOP.asked))):
            raise StoppedError


def _backend_device(local_rank: int) -> torch.device:
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")


@contextlib.contextmanager
def distributed(resources: Resources) -> Iterator[Runtime]:
    """The process group for the phases that need it; a lone process where none is asked for."""
    if not resources.distributed:
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise LaunchError(
                "resources.distributed is false, but torchrun started "
                f"{os.environ['WORLD_SIZE']} processes; set it to true or start with python"
            )
        yield Runtime()
        return
    if not os.environ.keys() >= LAUNCH:
        raise LaunchError(
            "resources.distributed is true, but torchrun did not start this process; start it with "
            "torchrun --standalone --nproc_per_node=GPUS main.py config.yml, or set it to false"
        )
    local_rank = int(os.environ["LOCAL_RANK"])
    if resources.dist_backend == "nccl":
        Runtime(local_rank=local_rank).device("cuda")
        torch.cuda.set_device(local_rank)
    pulse, patience = None, timedelta(minutes=resources.timeout_minutes)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=patience))
        pulse = Pulse(
            dist.PrefixStore("pulse", store), rank, size, resources.timeout_minutes
        )
        pulse.meet()  # where a signal can end the wait for a rank that never comes
        dist.init_process_group(
            resources.dist_backend, timeout=patience, store=store, rank=rank, world_size=size
        )
        GROUPS.append(dist.group.WORLD)
        yield Runtime(rank, local_rank, size, pulse)
        GROUPS.clear()
    except Exception as error:
        ending = told(error, pulse, resources.timeout_minutes)
        if ending is error:
            raise
        raise ending from error
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def told(error: Exception, pulse: Pulse | None, minutes: float) -> Exception:
    """What a rank ends with: its own error, whose code the others learn, or that of one of them."""
    stopped = isinstance(error, StoppedError)
    if not (stopped or isinstance(error, PeerError) or lost(error)):
        if pulse is not None:
            pulse.leave_word(exit_code_of(error) or 1)
        return error
    if pulse is not None and (word := pulse.word()) is not None:
        rank, code = word
        reason = f"rank {rank} failed with exit code {code}; its own line says why"
        return PeerError(reason, code, everywhere=True)
    if stopped or STOP.asked or STOP.orphaned:  # the lost exchange may be told first
        return StoppedError()
    if isinstance(error, PeerError):
        return error
    reason = str(error).partition("\n")[0]
    if "Timed out" in reason:
        return PeerError(silence(minutes))
    return PeerError(f"cannot reach another rank ({reason}); run it again to go on")


def lost(error: Exception) -> bool:
    """Whether an exchange failed since another rank is gone or silent."""
    return isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or "gloo" in str(error)
    )
