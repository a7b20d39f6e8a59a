"""The process around a run: one heap for all threads."""

import subprocess
import sys

import project
import pytest

HEAPS = """
import ctypes, sys, threading
from utils.process import share_one_heap
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
if sys.argv[1] == "one":
    share_one_heap()
def heap_of_small_block():
    address = libc.malloc(1000)
    for line in open("/proc/self/maps"):
        start, end = (int(part, 16) for part in line.split()[0].split("-"))
        if start <= address < end:
            found.append("[heap]" in line)
found = []
thread = threading.Thread(target=heap_of_small_block)
thread.start()
thread.join()
print(found)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="heaps are told apart in /proc")
@pytest.mark.parametrize(("heaps", "wanted"), [("one", "[True]"), ("as it is", "[False]")])
def test_threads_take_memory_from_the_heap_of_the_process(heaps, wanted):
    command = [sys.executable, "-c", HEAPS, heaps]
    result = subprocess.run(
        command, env=project.surroundings(), capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == wanted
