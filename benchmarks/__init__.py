"""What phases cost beside their networks: a script for each, all with `python -m benchmarks`."""

from utils.process import keep_one_heap

keep_one_heap()  # as the program does: before libraries are imported, whose threads make heaps
