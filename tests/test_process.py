"""The process around a run: one heap that keeps what is freed, and what an error is called."""

import errno
import os
import sys

import project
import pytest

from utils.process import ending_of

HEAPS = """
import ctypes, sys, threading
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
exec(sys.argv[1])
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
@pytest.mark.parametrize(
    ("first", "wanted"),
    [
        ("from utils.process import keep_one_heap; keep_one_heap()", "[True]"),
        ("import benchmarks.workload", "[True]"),  # whose libraries have begun threads by then
        ("", "[False]"),
    ],
    ids=["one heap", "in a benchmark", "as it is"],
)
def test_threads_take_memory_from_the_heap_of_the_process(first, wanted):
    assert project.printed_by(HEAPS, first).strip() == wanted


PAGES = """
import ctypes, resource, sys
from utils.process import keep_one_heap
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
if sys.argv[1] == "kept":
    keep_one_heap()
def pages_of_layers(count=8, size=8 << 20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    maps = [libc.malloc(size) for _ in range(count)]
    for address in maps:
        ctypes.memset(address, 1, size)
    for address in maps:
        libc.free(address)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(*(pages_of_layers() * resource.getpagesize() >> 20 for _ in range(4)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="faults are counted as Linux counts them")
@pytest.mark.parametrize(("heap", "fresh"), [("kept", False), ("as it is", True)])
def test_maps_of_a_layer_take_the_memory_of_the_layer_before(heap, fresh):
    megabytes = [int(number) for number in project.printed_by(PAGES, heap).split()]
    assert megabytes[0] > 0  # the first have to come from the system
    assert (megabytes[-1] > 0) == fresh


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "No space left on device; make room there, or name another place, and run"),
        (errno.EDQUOT, "make room there"),
        (errno.EROFS, "grant it, or name another place"),
        (errno.EISDIR, "Is a directory; remove what is in the way, or name another place, and run"),
        (errno.EIO, "Input/output error; look at the disk, or the way to it, and run again"),
        (errno.EMFILE, "let more files be open (ulimit -n), and run again"),
        (errno.ENOENT, "No such file or directory; look at that place, and run again"),
    ],
)
def test_what_the_system_objects_to_is_told_with_place_and_remedy(number, said):
    code, line = ending_of(OSError(number, os.strerror(number), "cache/north.pt"))
    assert code == 4
    assert line.startswith("cache/north.pt: ")
    assert said in line


def test_what_the_system_objects_to_without_a_place_is_told_as_it_is():
    assert ending_of(OSError("the wire was cut")) == (4, "the wire was cut")


def test_both_places_of_a_rename_are_told_and_a_number_is_none():
    error = OSError(errno.ENOENT, "No such file or directory", "a.tmp", None, "gone/a.pt")
    assert ending_of(error)[1].startswith("a.tmp -> gone/a.pt: No such file or directory; ")
    assert ending_of(OSError(errno.EBADF, "Bad file descriptor", 99))[1].startswith("[Errno 9]")
