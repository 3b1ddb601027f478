"""The quickest kernel of scaled dot product attention: on a CPU ours, where there is one (`native.py`); on a GPU that of
torch's which is quickest for a shape, asked of the device, once for each.

torch chooses by rules that do not know the device. (4096, 40), (1024, 80), (256, 160) and 77 keys, the shapes of Stable
Diffusion v1, have each another best kernel, and another on another device.
"""

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.fast import native
from ldm.models.attention import attention

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)
CALLS = 20  # that are timed
HEAD_START = 10_000_000  # cycles, some milliseconds, that the device is kept busy with while the calls to be timed are queued
AS_QUICK = 1.03  # times the quickest's: two measurements of one kernel differ by so much


class ChosenAttention:
    """`ldm.models.attention.attention`, by the quickest kernel. One of these is shared by a network's layers."""

    def __init__(self, *, choose: bool = True):
        """choose: whether to; torch's own choice otherwise."""
        self.choose = choose
        self.chosen: dict[tuple, SDPBackend | None] = {}

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if not self.choose:
            return attention(query, key, value)
        if not query.is_cuda:
            ours = native.attends(query.dtype) and native.takes(query, key, value)
            return (native.attention if ours else attention)(query, key, value)
        shape = (query.shape, key.shape, query.stride(), key.stride(), query.dtype)
        if shape not in self.chosen:
            if torch.cuda.is_current_stream_capturing():  # nothing can be timed now
                return attention(query, key, value)
            self.chosen[shape] = quickest(query, key, value)
        if self.chosen[shape] is None:
            return attention(query, key, value)
        with sdpa_kernel(self.chosen[shape]):
            return attention(query, key, value)


def quickest(query: Tensor, key: Tensor, value: Tensor) -> SDPBackend | None:
    """The kernel that takes least time for these, of those that take them at all, the first of those that are as quick; None
    where none does."""
    times: dict[SDPBackend, float] = {}
    for backend in BACKENDS:
        try:
            with sdpa_kernel(backend), torch.cuda.device_of(query):  # on which events are recorded
                times[backend] = _timed(query, key, value)
        except RuntimeError:  # it does not take such a shape or type
            continue
    return next((backend for backend in times if times[backend] <= AS_QUICK * min(times.values())), None)


def _timed(query: Tensor, key: Tensor, value: Tensor) -> float:
    """Milliseconds of a number of calls, one right after the other: of small shapes, Python would be timed otherwise."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(3):
        attention(query, key, value)
    torch.cuda._sleep(HEAD_START)
    begin.record()
    for _ in range(CALLS):
        attention(query, key, value)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)
