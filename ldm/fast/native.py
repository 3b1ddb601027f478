"""`attention.c`, `winograd.c` and `normalisation.c` for tensors: what a CPU does where there is a C compiler (`compiling.py`).

On a processor with AVX-512, torch's own attention takes 2.3 times as long for Stable Diffusion v1's largest shape in float32,
3.7 times in bfloat16, with the same error; with AVX2 alone, 1.2 and 1.4 times; with a matrix engine, 1.5 to 2.2 times in
bfloat16. Direct convolutions of its maps of 16 x 16 and
more take 2.0 to 2.8 times as long in float32, with either.
"""

import ctypes
import functools

import torch
from torch import Tensor, nn

from ldm.fast import compiling

ATTENTION = {torch.float32: "attention_float", torch.bfloat16: "attention_bfloat16"}
WINOGRAD = {torch.float32: "winograd_float", torch.bfloat16: "winograd_bfloat16"}
WIDTHS = 8  # heads' widths are multiples of
WIDEST_TILED = 80  # a head for which a matrix engine's kernel is quicker than torch's
CHANNELS, OUTPUTS = 16, 64  # a convolution's are multiples of; a norm's channels too
TYPES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


@functools.cache
def engine() -> bool:
    """Whether there is a matrix engine (AMX) for bfloat16; it is asked for, as Linux wants."""
    return torch.cpu._is_amx_tile_supported() and torch.cpu._init_amx()


def engages(dtype: torch.dtype) -> bool:
    """Whether a matrix engine computes in dtype, and the products are ours (`products.py`)."""
    return dtype == torch.bfloat16 and engine() and compiling.library("products_amx") is not None


def attends(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for attention in dtype, and it is quicker than torch's."""
    return dtype in ATTENTION and _attention(dtype) is not None


def _attention(dtype: torch.dtype) -> ctypes.CDLL | None:
    return compiling.library("attention_amx" if dtype == torch.bfloat16 and engine() else "attention")


def convolves_in(dtype: torch.dtype) -> bool:
    """Whether there is a kernel for Winograd's convolutions in dtype, and it is quicker than torch's: not where a matrix engine
    computes that type."""
    if dtype not in WINOGRAD or (dtype == torch.bfloat16 and engine()):
        return False
    return compiling.library("winograd") is not None


def convolves(conv: nn.Conv2d, dtype: torch.dtype) -> bool:
    """Whether that kernel takes such a convolution: 3x3, stride 1, padding 1."""
    plain = conv.kernel_size == (3, 3) and conv.stride == conv.padding == conv.dilation == (1, 1) and conv.groups == 1
    of_blocks = conv.in_channels % CHANNELS == 0 and conv.out_channels % OUTPUTS == 0
    return plain and of_blocks and convolves_in(dtype)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` computes with such tensors, where it `attends` to their type."""
    tensors = (query, key, value)
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        return False
    alike = all(one.dtype == query.dtype and one.device.type == "cpu" and one.stride(-1) == 1 for one in tensors)
    narrow = query.shape[-1] <= WIDEST_TILED or query.dtype != torch.bfloat16 or not engine()
    return alike and narrow and query.shape[-1] % WIDTHS == 0 and query.numel() > 0 and key.shape[2] > 0


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V: (b, h, n, d), (b, h, m, d) twice -> (b, h, n, d), in memory (b, n, h, d)."""
    (b, h, n, d), m = query.shape, key.shape[2]
    out = query.new_empty(b, n, h, d).transpose(1, 2)
    tensors = (query, key, value, out)
    strides = [stride for one in tensors for stride in one.stride()[:3]]
    parts = -(-2 * torch.get_num_threads() // (b * h))  # two a thread at the least, so that none waits long for the others
    call = (ctypes.c_int64 * 22)(*(one.data_ptr() for one in tensors), b, h, n, m, d, *strides, parts)
    if getattr(_attention(query.dtype), ATTENTION[query.dtype])(call):
        raise MemoryError(f"no memory for attention to {m} keys of width {d}")
    return out


def normalises(channels: int, dtype: torch.dtype) -> bool:
    """Whether there is a kernel for norms of so many channels in dtype."""
    return dtype in TYPES and channels % CHANNELS == 0 and compiling.library("normalisation") is not None


def moments(pixels: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GroupNorm of pixels (b, h, w, c), contiguous, as what is multiplied by and what is then added: (2, b, c), float32.
    weight, bias: (c,), float32."""
    b, h, w, c = pixels.shape
    found = torch.empty(2, b, c)
    pointers = (one.data_ptr() for one in (pixels, weight, bias, *found))
    call = _Moments(*pointers, b, h * w, c, groups, eps)
    if getattr(compiling.library("normalisation"), f"moments_{TYPES[pixels.dtype]}")(ctypes.byref(call)):
        raise MemoryError(f"no memory for the moments of {c} channels")
    return found


class _Moments(ctypes.Structure):
    _fields_ = [(f"_{i}", ctypes.c_int64) for i in range(9)] + [("eps", ctypes.c_double)]


def normalise(part: Tensor, found: Tensor, out: Tensor, silu: bool) -> None:
    """Any part of a map (b, h, w, c) by its `moments`, and SiLU of it, -> out, as large."""
    part = part if part.stride(3) == 1 else part.contiguous()
    pointers = (one.data_ptr() for one in (part, out, *found))
    call = (ctypes.c_int64 * 15)(*pointers, *part.shape, *part.stride()[:3], *out.stride()[:3], silu)
    getattr(compiling.library("normalisation"), f"normalise_{TYPES[part.dtype]}")(call)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of the last axis, (..., c). weight, bias: (c,), float32."""
    x = x.contiguous()
    out = torch.empty_like(x)
    call = _Layer(*(one.data_ptr() for one in (x, weight, bias, out)), x.numel() // x.shape[-1], x.shape[-1], eps)
    getattr(compiling.library("normalisation"), f"layer_{TYPES[x.dtype]}")(ctypes.byref(call))
    return out


class _Layer(ctypes.Structure):
    _fields_ = [(f"_{i}", ctypes.c_int64) for i in range(6)] + [("eps", ctypes.c_double)]


def kernels(taps: Tensor) -> Tensor:
    """A convolution's weights, (9, c, o), as `winograd` reads them: (o / OUTPUTS, c, 9, OUTPUTS)."""
    return taps.unflatten(2, (-1, OUTPUTS)).permute(2, 1, 0, 3).contiguous()


def winograd(pixels: Tensor, kernels: Tensor, bias: Tensor, out: Tensor, scale: int = 1) -> None:
    """The convolution of pixels (b, h / scale + 2, w / scale + 2, c), contiguous, -> out (b, h, w, o).

    scale: 2 where each pixel is to be four. h, w: multiples of 4. out: any part of a map whose pixels are neighbours in a row.
    """
    library, (b, h, w, o), c = compiling.library("winograd"), out.shape, pixels.shape[3]
    library.winograd_room.restype = ctypes.c_int64
    room = torch.empty(library.winograd_room(ctypes.c_int64(b * h * w // 16), ctypes.c_int64(c)))
    bias = bias.float()
    tensors = (one.data_ptr() for one in (pixels, kernels, bias, out, room))
    call = (ctypes.c_int64 * 13)(*tensors, b, h // 4, w // 4, c, o, scale, *out.stride()[:2])
    if getattr(library, WINOGRAD[pixels.dtype])(call):
        raise MemoryError(f"no memory for a convolution of {o} channels")
