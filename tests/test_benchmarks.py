"""Benchmarks measure what they say, as far as a CPU can show it."""

from types import SimpleNamespace

import torch

from benchmarks import contenders, gpu


def test_a_rung_s_memory_is_that_of_its_use(monkeypatch):
    """Neither what loading took nor what an earlier rung left is in it."""
    told = []
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda name=name: told.append(name))
    for name, size in (("max_memory_allocated", 2e9), ("max_memory_reserved", 3e9)):
        monkeypatch.setattr(torch.cuda, name, lambda size=size: size)
    monkeypatch.setattr(torch._dynamo, "reset", lambda: told.append("compiled"))
    monkeypatch.setattr(gpu, "events", lambda name, call: {name: 1.0})
    names = ("load", "prepare", "unet", "decode")
    contender = SimpleNamespace(**{name: lambda name=name: told.append(name) for name in names})
    contender.widen, contender.picture = lambda batch: None, lambda steps: None
    found = gpu.measured(contender, 1)
    assert told == ["compiled", "empty_cache", "load", "empty_cache", "reset_peak_memory_stats", "prepare"]
    assert (found["peak GB"], found["reserved GB"]) == (2.0, 3.0)


def test_diffusers_is_given_a_timestep_that_is_on_the_device():
    """Of a number it makes a tensor at each call, for which a GPU is waited for."""
    asked = []
    contender = object.__new__(contenders.Diffusers)
    contender.torch, contender.dtype, contender.device = torch, torch.float32, "cpu"
    contender.pipe = SimpleNamespace(
        tokenizer=lambda *_, **__: SimpleNamespace(input_ids=torch.zeros(2, 77, dtype=torch.long)),
        text_encoder=lambda ids: [torch.zeros(2, 77, 8)],
        unet=lambda x, t, **_: asked.append(t) or [x],
    )
    contender.prepare()
    contender.unet()
    contender.unet()
    assert asked[0] is asked[1] and isinstance(asked[0], torch.Tensor) and float(asked[0]) == contenders.T
