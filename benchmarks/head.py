"""What the head unet_v2 costs: its operations, and what bf16 and channels_last save on a CPU.

    python -m benchmarks.head                   a batch of 4 tiles, as in training
    python -m benchmarks.head --tiles 1         one tile alone

Both forms have the same weights and run the same code in evaluation mode, on one thread. One is
float32, with kernels, pixels and maps in NCHW; the other is inference's: autocast to bfloat16,
weights rounded once, everything channels_last, maps in half precision as the backbone gives them.
They take turns, and each turn begins with a run that does not count. The process keeps its memory
as the program's own do.
"""

import copy
import sys
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.rows import Row, command_line, report
from models import build_head
from models.base import SegmentationHead, enlarge
from models.segmenter import round_once
from utils.devices import has_bf16
from utils.logging import say

NO_BF16 = "this processor emulates bf16, which the program does not use on it: not measured"
CHANNELS, LEVELS, SIZE = 1024, 4, 512
CLASSES = 2


def measure(tiles: int = 4, turns: int = 7) -> list[Row]:
    """Rows for operations per tile and, where the processor multiplies bf16, for the speed-up."""
    begin()
    rows = [Row("unet_v2: forward of a 512² tile", operations() / 1e9, 20, "GFLOP")]
    if not has_bf16(torch.device("cpu")):
        say(f"head: {NO_BF16}")
        return rows
    head = build_head("unet_v2", CHANNELS, LEVELS, CLASSES).eval()
    plain = copy.deepcopy(head).to(memory_format=torch.contiguous_format)
    round_once(head)
    image, maps = make_inputs(tiles)
    apart = [level.contiguous() for level in maps]
    slow, fast = alternate(turns, lambda: in_nchw(plain, image, apart), lambda: head(image, maps))
    gain = Row("unet_v2: fp32 over bf16 + channels_last", slow / fast, 3, at_least=True)
    return [*rows, gain]


def begin() -> None:
    """One thread, and the same dice each time."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


def make_inputs(tiles: int) -> tuple[Tensor, list[Tensor]]:
    """Pixels, and maps whose memory is (tiles, rows, cols, channels): what a ViT gives."""
    image = torch.randn(tiles, 3, SIZE, SIZE)
    shape = (tiles, SIZE // 16, SIZE // 16, CHANNELS)
    return image, [torch.randn(shape).half().permute(0, 3, 1, 2) for _ in range(LEVELS)]


def in_nchw(head: SegmentationHead, image: Tensor, maps: Sequence[Tensor]) -> Tensor:
    """The head's forward without its change of layout."""
    return enlarge(head.decode(image, [level.float() for level in maps]).logits, (SIZE, SIZE))


@torch.inference_mode()
def alternate(turns: int, in_float32: Callable, in_bfloat16: Callable) -> tuple[float, float]:
    """CPU seconds of either form, medians over turns A B A B."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(turns):
        seconds[0].append(cpu_seconds(in_float32))
        with torch.autocast("cpu", torch.bfloat16):
            seconds[1].append(cpu_seconds(in_bfloat16))
    return median(seconds[0]), median(seconds[1])


def cpu_seconds(call: Callable) -> float:
    """Of the middle one of three calls, after one that does not count."""
    call()
    seconds = []
    for _ in range(3):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return median(seconds)


def operations() -> int:
    """Floating-point operations of a forward of one tile."""
    with torch.device("meta"):
        head = build_head("unet_v2", CHANNELS, LEVELS, CLASSES).eval()
        image, maps = make_inputs(tiles=1)
    return operations_of(lambda: head(image, maps))


def operations_of(call: Callable[[], object]) -> int:
    """Floating-point operations of a call, two a multiply-add.

    >>> operations_of(lambda: torch.ones(3, 4) @ torch.ones(4, 5))
    120
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table and the ratio."""
    parser = command_line(__doc__)
    parser.add_argument("--tiles", type=int, default=4)
    parser.add_argument("--turns", type=int, default=7)
    given = parser.parse_args(arguments)
    report(measure(given.tiles, given.turns))
    return 0


if __name__ == "__main__":
    sys.exit(main())
