"""`ldm.fast` on a GPU, as far as a CPU can show it: a graph's stand-in, and Triton's interpreter."""

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ldm
from ldm.fast.accelerate import accelerate
from ldm.fast.graph import CAPTURES, GraphedUNet
from ldm.fast.plan import Plan
from ldm.fast.unet import FastUNet
from tests import seeded
from tests.measure import relative_error

PROMPT = "a red cube on top of a blue sphere"


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def recorded(count):
    """A graph's stand-in: what it records is run again at every replay, on the tensors that it was recorded with."""

    def record(function):
        out = function()
        count.append(out.shape)
        return lambda: out.copy_(function()), out

    return record


def test_a_replay_has_the_numbers_of_a_call_and_a_second_prompt_its_own():
    tiny = ldm.build("tiny", seed=0, dtype=torch.float64)
    count = []
    fast = FastUNet(tiny.unet, Plan(dtype=torch.float64))
    graphed = GraphedUNet(fast, recorded(count))
    x, first = seeded.tensor("x", 2, 4, 16, 16).double(), seeded.tensor("context", 2, 77, 32).double()
    second = torch.flip(first, dims=[0, 1])
    earlier = graphed(x, 500.0, first)
    kept = earlier.clone()
    for context in (first, second):
        projected = graphed.project_context(context)
        for t, given in ((500.0, x), (20.0, 2 * x)):
            found = graphed.denoise(given, graphed.embed_time(t), projected)
            assert relative_error(found, fast(given, t, context)) < 1e-12
    assert len(count) == 1 and torch.equal(earlier, kept)  # a result is the caller's own
    graphed(x[:1], 500.0, first)
    graphed(x, torch.tensor([3.0, 980.0]), first)
    assert len(count) == 3
    for side in range(8, 8 + 2 * CAPTURES, 2):
        graphed(x[..., :side, :8].contiguous(), 1.0, first)
    assert len(graphed.captures) == CAPTURES


def test_pictures_of_a_graph_are_those_without():
    model = ldm.load()
    fast = accelerate(model)
    graphed = dataclasses.replace(fast, unet=GraphedUNet(fast.unet, recorded([])))
    for prompt in (PROMPT, "a green cone left of a purple cylinder"):
        made, truth = (ldm.txt2img(one, prompt, steps=4, seed=3, guidance_interval=(100, 900)) for one in (graphed, fast))
        assert torch.equal(made.latents, truth.latents)


TRITON = """
import torch
import torch.nn.functional as F
from ldm.fast.kernels import group_norm_silu

torch.manual_seed(0)
for dtype, times in ((torch.float32, 1.3), (torch.float16, 1.0)):  # the interpreter cuts bfloat16 off instead of rounding it
    for b, c, h, w, groups, offset in ((2, 20, 9, 7, 2, 0.0), (1, 48, 17, 32, 4, 30.0)):
        x = (torch.randn(b, c, h, w) + offset).to(dtype).to(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, c).to(dtype)
        truth = F.silu(F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5))
        native = F.silu(F.group_norm(x, groups, weight, bias, 1e-5)).double()
        found = group_norm_silu(x, groups, weight, bias, 1e-5)
        assert found.dtype == dtype and found.is_contiguous(memory_format=torch.channels_last)
        errors = [float((one.double() - truth).pow(2).mean().sqrt()) for one in (found, native)]
        assert errors[0] <= times * errors[1], (dtype, (b, c, h, w), errors)
print("right")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
def test_the_triton_kernels_round_no_worse_than_torch_s():
    """In Triton's interpreter, which runs them in NumPy: right, though nothing of their speed."""
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", TRITON], env=variables, capture_output=True, text=True)
    assert done.stdout.strip() == "right", done.stderr[-2000:]
