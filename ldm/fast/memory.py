"""What the operating system is told about memory: to leave freed pages with the process, and to take back what a file has.

Both are advice that Linux and glibc take; elsewhere nothing is done, and nothing is lost but speed or room.
"""

import ctypes
import mmap

import numpy as np
import torch
from torch import Tensor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -2, -3, -4  # of mallopt(3)
MMAP_THRESHOLD = 32 << 20  # bytes, the most that it takes
TOP_PAD = 64 << 20  # bytes by which the heap grows at the least


def keep_pages() -> bool:
    """Have this process keep the memory that it frees, from now on, rather than return it and ask for it again.

    A network's large tensors are otherwise made of fresh pages after every operation, and each page of 4 KiB costs a fault: a
    tenth of the time of Stable Diffusion v1's steps, and more. The price is that memory once used stays with the process. It is
    a setting of the whole process, which cannot be undone. Returns whether the C library took it.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = ((M_MMAP_THRESHOLD, MMAP_THRESHOLD), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, TOP_PAD))
    results = [mallopt(option, value) for option, value in wanted]
    return all(result == 1 for result in results)


def converted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in dtype, without its gradient; where that is a copy, what it was copied from is let go of."""
    made = tensor.detach().to(dtype)
    if made.data_ptr() != tensor.data_ptr():
        let_go(tensor)
    return made


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
