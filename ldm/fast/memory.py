"""What the operating system is told about memory: to leave freed pages with the process, and to take back what a file has.

Both are advice that Linux and glibc take; elsewhere nothing is done, and nothing is lost but speed or room.
"""

import ctypes
import mmap
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # of mallopt(3)
MMAP_THRESHOLD, MMAP_MAX = 32 << 20, 1 << 16  # bytes, the most that it takes; blocks, its default
TOP_PAD = 64 << 20  # bytes by which the heap grows at the least

_kept = False  # whether this process keeps what it frees


def keep_pages() -> bool:
    """Have this process keep the memory that it frees, from now on, rather than return it and ask for it again.

    A network's large tensors are otherwise made of fresh pages after every operation, and each page of 4 KiB costs a fault: a
    tenth of the time of Stable Diffusion v1's steps, and more. The price is that memory once used stays with the process. It is
    a setting of the whole process, which cannot be undone. Returns whether the C library took it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    global _kept
    wanted = ((M_MMAP_THRESHOLD, MMAP_THRESHOLD), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, TOP_PAD))
    results = [mallopt(option, value) for option, value in wanted]
    _kept = all(result == 1 for result in results)
    return _kept


@contextmanager
def large_apart() -> Iterator[None]:
    """While in it, what is larger than 32 MiB is had from the system and returned to it, whether or not pages are kept.

    For a network of few and large maps: they do not fit where an earlier network's many small ones were, so that keeping the
    pages of both would take the room of both. What is free at the beginning is returned.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
    if _kept:
        library.mallopt(M_MMAP_MAX, MMAP_MAX)
    try:
        yield
    finally:
        if _kept:
            library.mallopt(M_MMAP_MAX, 0)


def let_go(tensor: Tensor) -> bool:
    """Have the system take back the pages of a file that `tensor` is a view of, since a copy will be read in its place. It
    keeps its values: whoever reads it again has the pages again, from the system's cache or from the file.

    Only for pages that are the file's own, as Linux tells of each: memory of the process's own would lose what it holds.
    Returns whether they were let go.
    """
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or not hasattr(mmap, "MADV_DONTNEED"):
        return False
    first = -(-tensor.data_ptr() // mmap.PAGESIZE)
    count = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE - first
    if count <= 0 or not tensor.is_contiguous() or not _all_of_files(first, count):
        return False
    address, length = ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(count * mmap.PAGESIZE)
    return ctypes.CDLL(None).madvise(address, length, mmap.MADV_DONTNEED) == 0


def _all_of_files(first: int, count: int) -> bool:
    """Whether every one of these pages that is in memory belongs to a file (Documentation/admin-guide/mm/pagemap.rst)."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
            pagemap.seek(8 * first)
            entries = np.frombuffer(pagemap.read(8 * count), dtype=np.uint64)
    except OSError:
        return False
    present, swapped, of_file = (entries >> np.uint64(bit) & np.uint64(1) for bit in (63, 62, 61))
    return len(entries) == count and not swapped.any() and bool((present <= of_file).all()) and bool(present.any())
