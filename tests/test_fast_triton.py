"""The Triton kernels of `ldm.fast`: in Triton's interpreter, which runs on a CPU, and where there is a GPU, on it."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from ldm.fast import normalisation
from ldm.fast.plan import Plan
from tests.measure import relative_error


def test_triton_is_used_where_it_compiles_and_is_missed_aloud_where_it_does_not(monkeypatch):
    """It is there and cannot where there is no C compiler, say, as in most containers."""
    cpu, asked = torch.device("cpu"), []

    def failing(*_):
        asked.append(True)
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")

    def working(*_):
        asked.append(True)

    def found(module):
        normalisation.in_triton.cache_clear()
        monkeypatch.setitem(sys.modules, "ldm.fast.kernels", module)
        return normalisation.in_triton(cpu, torch.float32)

    assert found(None) is None  # not installed
    with pytest.warns(UserWarning, match=r"cannot compile for cpu \(Failed to find C compiler.*; GroupNorm is torch's"):
        assert found(SimpleNamespace(group_norm_silu=failing)) is None
    assert normalisation.in_triton(cpu, torch.float32) is None and len(asked) == 1
    assert found(SimpleNamespace(group_norm_silu=working)) is working and len(asked) == 2
    normalisation.in_triton.cache_clear()


@pytest.mark.parametrize(
    ("dtype", "silu", "kernels"),
    [(torch.float16, True, True), (torch.float16, True, False), (torch.float16, False, True), (torch.float64, True, True)],
)
def test_norms_on_a_gpu_ask_whether_triton_works_there(monkeypatch, dtype, silu, kernels):
    monkeypatch.setattr(normalisation, "in_triton", lambda *given: given)
    with FakeTensorMode():
        norm = torch.nn.GroupNorm(2, 4, device="cuda:0")
        made = normalisation.GroupNorm(norm, Plan(dtype=dtype, kernels=kernels), silu=silu)
    asked = silu and kernels and dtype != torch.float64
    assert made.kernel == ((torch.device("cuda", 0), dtype) if asked else None)


TRITON = """
import contextlib
import torch
import torch.nn.functional as F
from ldm.fast import kernels

torch.manual_seed(0)
devices_of = []
torch.cuda.device_of = lambda x: contextlib.nullcontext(devices_of.append(x))
# How it lies in memory; programs, and elements of a tile: where they are few, every loop takes several turns.
LAID = (
    (lambda x: x.to(memory_format=torch.channels_last), kernels.PROGRAMS, kernels.TILE),
    (lambda x: x.contiguous(), 3, 256),
    (lambda x: torch.cat([x, x], dim=1).to(memory_format=torch.channels_last)[:, : x.shape[1]], 1024, 64),
    (lambda x: x[:1].expand(x.shape), 5, 1024),
)
SHAPES = (  # b, groups, channels of each, h, w; and the mean
    *((1, 2, 10, 9, 7, 0.0), (2, 3, 20, 5, 5, 0.0), (3, 2, 30, 3, 7, 1.0), (1, 4, 60, 1, 13, 0.0), (2, 2, 80, 1, 1, 0.0)),
    *((1, 4, 12, 17, 32, 30.0), (2, 32, 4, 11, 3, 0.0), (1, 32, 80, 3, 3, 0.0), (3, 8, 1, 13, 3, 0.0)),
)


def check(dtype, times, shape, laid, programs, tile):
    b, groups, width, h, w, offset = shape
    kernels.PROGRAMS, kernels.TILE = programs, tile
    x = laid((torch.randn(b, groups * width, h, w) + offset).to(dtype))
    weight, bias = torch.randn(2, groups * width).to(dtype)
    truth = F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5))
    native = F.silu(F.group_norm(x, groups, weight, bias, 1e-5)).double()
    devices_of.clear()
    found = kernels.group_norm_silu(x, groups, weight, bias, 1e-5)
    assert [one.shape for one in devices_of] == [x.shape]  # Triton launches on the current device, whatever the tensors are on
    assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
    errors = [float((one.double() - truth).pow(2).mean().sqrt()) for one in (found, native)]
    rounded = offset * 2**-24  # the mean, if it is kept in float32
    assert errors[0] <= times * errors[1] + rounded, (dtype, shape, programs, tile, errors)


for i, shape in enumerate(SHAPES):
    for way in LAID:
        check(torch.float32, 2.0, shape, *way)
    check(torch.float16, 1.0, shape, *LAID[i % len(LAID)])
    check(torch.bfloat16, 2.2, shape, *LAID[(i + 1) % len(LAID)])  # the interpreter cuts it off instead of rounding it
print("right")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_round_no_worse_than_torch_s():
    """In Triton's interpreter, which runs them in NumPy: right, though nothing of their speed."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), *sys.path])
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", TRITON], env=variables, capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr[-2000:]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_the_triton_kernels_are_right():
    pytest.importorskip("triton")
    device = torch.device("cuda", torch.cuda.current_device())
    for dtype, b, c, side in ((torch.float32, 2, 320, 63), (torch.float16, 1, 128, 512), (torch.bfloat16, 3, 2560, 9)):
        kernel = normalisation.in_triton(device, dtype)
        x = torch.randn(b, c, side, side, device=device).to(dtype, memory_format=torch.channels_last)
        weight, bias = torch.randn(2, c, device=device).to(dtype)
        truth = F.silu(F.group_norm(x.double(), 32, weight.double(), bias.double(), 1e-5))
        bounds = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
        assert relative_error(kernel(x, 32, weight, bias, 1e-5), truth) < bounds[dtype]
