"""What the operating system is told about memory: to leave freed pages with the process, and to take back what a file has.

Both are advice that Linux and glibc take; elsewhere nothing is done, and nothing is lost but speed or room.
"""

import ctypes
import mmap

from torch import Tensor

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of mallopt(3)
MADV_PAGEOUT = 21  # of madvise(2), Linux 5.4
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
    wanted = ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1), (M_TOP_PAD, TOP_PAD))
    return all(mallopt(option, value) == 1 for option, value in wanted)


def page_out(tensor: Tensor) -> None:
    """Let the system take back the pages of a tensor that will not be read soon. It keeps its values: a page of a file is read
    again where it is wanted, and one of the process's own goes nowhere without swap."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None or tensor.device.type != "cpu" or not tensor.nbytes:
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), MADV_PAGEOUT)
