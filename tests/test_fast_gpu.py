"""`ldm.fast` on a GPU: as far as a CPU can show it, with stand-ins; and, where there is one, there."""

import dataclasses
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

import ldm
from ldm.fast import attention, graph
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


def test_what_cannot_be_captured_is_computed_without_a_graph():
    tiny = ldm.build("tiny", seed=0, dtype=torch.float64)
    fast = FastUNet(tiny.unet, Plan(dtype=torch.float64))
    asked = []

    def refusing(function):
        asked.append(True)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nCUDA kernel errors might ...")

    graphed = GraphedUNet(fast, refusing)
    x, context = seeded.tensor("x", 2, 4, 16, 16).double(), seeded.tensor("context", 2, 77, 32).double()
    with pytest.warns(
        UserWarning, match=r"no CUDA graph of x \[2, 4, 16, 16\] \(CUDA error: .* is capturing\); slower without"
    ):
        found = graphed(x, 500.0, context)
    assert torch.equal(found, fast(x, 500.0, context)) and torch.equal(graphed(x, 20.0, context), fast(x, 20.0, context))
    assert len(asked) == 1 and not graphed.captures


class Streams:
    """torch.cuda's streams and graphs, without a GPU; and devices, of which 0 is the current one."""

    def __init__(self, monkeypatch):
        self.current, self.device, self.told = "before", 0, []
        for name in ("current_stream", "set_stream", "stream", "Stream", "CUDAGraph", "graph", "device_of"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_stream(self):
        return SimpleNamespace(name=self.current, wait_stream=lambda other: None)

    def set_stream(self, stream):
        self.current = stream.name

    def Stream(self):
        return SimpleNamespace(name=f"side, device {self.device}", wait_stream=lambda other: None)

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.told.append(f"replay, device {self.device}"))

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream.name
        try:
            yield
        finally:
            self.current = before

    @contextmanager
    def graph(self, graph, stream):
        """As torch's: when something has failed, ending the capture raises before the stream is set back."""
        before, self.current = self.current, stream.name
        self.told.append(f"capture, {self.current}")
        try:
            yield
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture") from None
        self.current = before

    @contextmanager
    def device_of(self, x):
        before, self.device = self.device, 1
        try:
            yield
        finally:
            self.device = before


def test_a_capture_that_fails_leaves_the_stream_that_was_current(monkeypatch):
    streams, calls = Streams(monkeypatch), []

    def failing():
        calls.append(streams.current)
        if len(calls) > graph.WARM_UP:
            raise RuntimeError("nonzero waits for the device")

    with pytest.raises(RuntimeError, match="previous error during capture"):
        graph.record(failing)
    assert calls == 3 * ["side, device 0"] and streams.current == "before"


def test_graphs_are_captured_and_replayed_on_the_device_of_x(monkeypatch):
    """On which they are not made by themselves: the current device is the first, whatever --device says."""
    streams = Streams(monkeypatch)
    graphed = GraphedUNet(FastUNet(ldm.build("tiny", seed=0).unet, Plan(dtype=torch.float32)))
    graphed(seeded.tensor("x", 1, 4, 8, 8), 500.0, seeded.tensor("context", 1, 77, 32))
    assert streams.told == ["capture, side, device 1", "replay, device 1"] and streams.device == 0


def test_kernels_of_attention_are_timed_with_their_calls_queued_on_their_device(monkeypatch):
    told, streams = [], Streams(monkeypatch)

    class Event:
        def __init__(self, enable_timing):
            self.record = lambda: told.append(f"event, device {streams.device}")
            self.synchronize = lambda: told.append("wait")
            self.elapsed_time = lambda end: 1.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: told.append(f"sleep, device {streams.device}"), raising=False)
    monkeypatch.setattr(attention, "attention", lambda *_: told.append("call"))
    monkeypatch.setattr(attention, "BACKENDS", (SDPBackend.MATH,))
    x = torch.zeros(1, 1, 8, 8)
    assert attention.quickest(x, x, x) == SDPBackend.MATH
    queued = ["sleep, device 1", "event, device 1", *attention.CALLS * ["call"], "event, device 1", "wait"]
    assert told == 3 * ["call"] + queued


@pytest.mark.parametrize(
    ("milliseconds", "chosen"),
    [((1.02, 1.0, 1.01), 0), ((1.05, 1.02, 1.0), 1), ((2.0, 1.9, 1.0), 2), ((None, 2.0, 1.99), 1), ((None, None, None), None)],
)
def test_of_kernels_of_attention_that_are_as_quick_it_is_always_the_first(monkeypatch, milliseconds, chosen):
    """Or else chance would choose, anew in each process, and with it a picture's last bits."""
    turn = iter(milliseconds)

    def timed(*_):
        time = next(turn)
        if time is None:
            raise RuntimeError("No available kernel. Aborting execution.")
        return time

    monkeypatch.setattr(attention, "_timed", timed)
    x = torch.zeros(1, 1, 8, 8)
    assert attention.quickest(x, x, x) == (None if chosen is None else attention.BACKENDS[chosen])


# -- With a GPU ------------------------------------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def latents_of(model, **fields):
    return ldm.txt2img(model, PROMPT, steps=4, seed=3, decode=False, **fields).latents.cpu()


@needs_gpu
@pytest.mark.parametrize("merge_tokens", [0.0, 0.5])
def test_on_a_gpu_pictures_are_those_of_a_cpu_and_the_same_again(merge_tokens):
    truth = latents_of(ldm.load())
    fast = accelerate(ldm.load(device="cuda"), merge_tokens=merge_tokens)
    found = latents_of(fast)
    assert fast.unet.captures and not fast.unet.refused
    assert relative_error(found, truth) < (1e-3 if merge_tokens == 0 else 1)
    assert all(torch.equal(latents_of(fast), found) for _ in range(5))


@needs_gpu
def test_on_a_gpu_a_capture_that_fails_leaves_the_device_usable():
    x = torch.ones(8, device="cuda")
    before = torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        graph.record(lambda: x[x > 0])  # whose size the device would have to tell
    assert torch.cuda.current_stream() == before and float((x + 1).sum()) == 16
    replay, out = graph.record(lambda: x + 1)
    replay()
    assert float(out.sum()) == 16


@needs_gpu
def test_on_a_gpu_no_step_waits_for_the_device():
    fast, marks = accelerate(ldm.load(device="cuda")), []
    latents_of(fast)  # captured

    def waiting(x, info):
        marks.append(info)
        torch.cuda.set_sync_debug_mode("error" if len(marks) < 3 else "default")
        return x

    try:
        latents_of(fast, sampler="euler_ancestral", after_step=waiting)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(marks) == 4


@needs_gpu
def test_on_a_gpu_the_compiler_takes_the_network_whole():
    loaded = ldm.load(device="cuda")
    for share in (0.0, 0.5):
        plan = Plan(dtype=torch.float32, winograd="none", kernels=False, merge_tokens=share)
        fast = FastUNet(loaded.unet, plan)
        config = loaded.unet.config
        x = seeded.tensor("x", 2, config.in_channels, config.sample_size, config.sample_size).cuda()
        contexts = fast.project_context(seeded.tensor("context", 2, 77, config.context_width).cuda())
        times = fast.embed_time(500.0)
        compiled = torch.compile(fast.denoise, dynamic=False, fullgraph=True)
        assert relative_error(compiled(x, times, contexts), fast.denoise(x, times, contexts)) < 1e-3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are not two GPUs")
def test_the_second_gpu_computes_what_the_first_does():
    first, second = (latents_of(accelerate(ldm.load(device=device), dtype=torch.float16)) for device in ("cuda:0", "cuda:1"))
    assert relative_error(second, first) < 1e-2
