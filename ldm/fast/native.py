"""`attention.c` and `products.c` for tensors: what a CPU does where a C compiler is at hand (`compiling.py`).

On a processor with AVX-512, torch's own attention takes 2.3 times as long for Stable Diffusion v1's largest shape in float32,
3.7 times in bfloat16, with the same error; with AVX2 alone, 1.2 and 1.4 times.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from ldm.fast import compiling

ATTENTION = {torch.float32: "attention_float", torch.bfloat16: "attention_bfloat16"}
WIDTHS = 8  # heads' widths are multiples of


def attends(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for attention in dtype, and it is quicker than torch's: not where a matrix engine (AMX)
    computes that type."""
    if dtype not in ATTENTION or (dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()):
        return False
    return compiling.library("attention") is not None


def multiplies(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for products of matrices in dtype, and it is quicker than torch's: with AVX-512, but not on
    Intel's processors, whose own library torch multiplies with, and which gives its best to no others."""
    return dtype == torch.float32 and not _of_intel() and compiling.library("products") is not None


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` computes with such tensors, where it `attends` to their type."""
    tensors = (query, key, value)
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return False
    alike = all(one.dtype == query.dtype and one.device.type == "cpu" and one.stride(-1) == 1 for one in tensors)
    return alike and query.shape[-1] % WIDTHS == 0 and query.numel() > 0 and key.shape[2] > 0


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V: (b, h, n, d), (b, h, m, d) twice -> (b, h, n, d), in memory (b, n, h, d)."""
    (b, h, n, d), m = query.shape, key.shape[2]
    out = query.new_empty(b, n, h, d).transpose(1, 2)
    tensors = (query, key, value, out)
    strides = [stride for one in tensors for stride in one.stride()[:3]]
    parts = -(-2 * torch.get_num_threads() // (b * h))  # two a thread at the least, so that none waits long for the others
    call = (ctypes.c_int64 * 22)(*(one.data_ptr() for one in tensors), b, h, n, m, d, *strides, parts)
    if getattr(compiling.library("attention"), ATTENTION[query.dtype])(call):
        raise MemoryError(f"no memory for attention to {m} keys of width {d}")
    return out


def products(a: Tensor, b: Tensor) -> Tensor:
    """`torch.bmm` of float32 matrices: (n, rows, k), (n, k, columns) -> (n, rows, columns)."""
    (n, rows, k), columns = a.shape, b.shape[2]
    a, b, out = a.contiguous(), b.contiguous(), a.new_empty(n, rows, columns)
    parts = -(-2 * torch.get_num_threads() // n)
    pointers = (ctypes.c_void_p(one.data_ptr()) for one in (a, b, out))
    compiling.library("products").products(*pointers, *map(ctypes.c_int64, (n, rows, k, columns, parts)))
    return out


@functools.cache
def _of_intel() -> bool:
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
