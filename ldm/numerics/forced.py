"""Whose error is it: what a part adds, and what it was given already wrong.

Our model is run with the other side's numbers in the place of its own: every part that the trace has computes from what the
other side's parts before it computed, is compared with what that side's own part made of the same, and hands that on. What is
left of a difference is what the part itself, or the arithmetic between it and the parts before it, adds.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from ldm.checkpoint import Components
from ldm.numerics.compare import Difference, arranged, difference
from ldm.numerics.traces import Key, Trace
from ldm.numerics.tracing import names_of

# By the type that most of the trace's tensors have: what rounding alone makes of one part, relative to the largest value.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6, torch.float16: 5e-3, torch.bfloat16: 4e-2}
NORMS = 0.3  # times that: norms add up nothing that could cancel
# Times that, of the layer after the sinusoids of t: the references take the angles in float32, whose error grows with t to some
# 1e-5. A timestep that is wrong by a thousandth is beyond it.
SINUSOIDS = 20.0, "unet.time_embedding.linear_1"


@torch.no_grad()
def added(
    components: Components, trace: Trace, *, tolerance: float | None = None, calls: list[int] | None = None
) -> list[Difference]:
    """For every part of ours that the trace has: how far what it makes of the trace's own numbers is from the trace.

    In the order of execution: text encoder, the network's calls (all, or `calls`), decoder. What a trace has no inputs of is
    left out: `text_encoder.ids`, `unet.x`, `unet.t` and `unet.context`, `autoencoder.latents`.
    """
    rows: list[Difference] = []
    for part in stages(trace, calls):
        rows += forced(components, trace, part, tolerance)
    return rows


def stages(trace: Trace, calls: list[int] | None = None) -> list[Key]:
    """The runs of a component that the trace has the inputs of, named by one of the inputs."""
    found = [key for key in trace.keys if key.name == "text_encoder.ids"]
    for call in range(trace.calls) if calls is None else calls:
        inputs = [trace.find(Key(f"unet.{name}", call)) for name in ("x", "t", "context")]
        if all(inputs):
            found.append(Key("unet.x", call))
    return found + [key for key in trace.keys if key.name == "autoencoder.latents"]


@torch.no_grad()
def forced(
    components: Components, trace: Trace, stage: Key, tolerance: float | None = None, *, until: str | None = None
) -> list[Difference]:
    """One of `stages`, forced. until: the last part to be run."""
    component = stage.name.partition(".")[0]
    module = getattr(components, component)
    weight = next(module.parameters())

    def given(name: str) -> Tensor:
        key = trace.find(Key(f"{component}.{name}", stage.call, stage.repeat))
        assert key is not None
        value = trace[key]
        return value.to(weight.device, weight.dtype if value.dtype.is_floating_point and name != "t" else value.dtype)

    rows: list[Difference] = []
    with forcing(module, component, trace, stage, rows, tolerance, until), suppress(_Reached):
        if component == "text_encoder":
            module(given("ids"))
        elif component == "unet":
            module(given("x"), given("t").reshape(-1), given("context"))
        else:
            module.decode(given("latents"))
    return rows


def _leeway(module: nn.Module, name: str) -> float:
    if isinstance(module, nn.GroupNorm | nn.LayerNorm):
        return NORMS
    return SINUSOIDS[0] if name == SINUSOIDS[1] else 1.0


class _Reached(Exception):
    """There is nothing more to run."""


@contextmanager
def forcing(
    module: nn.Module,
    component: str,
    trace: Trace,
    stage: Key,
    rows: list[Difference],
    tolerance: float | None = None,
    until: str | None = None,
    *,
    replacing: bool = True,
) -> Iterator[None]:
    """While it holds, each part of the module puts its difference from the trace into `rows`, and returns the trace's.

    replacing: if not, it returns its own, so that differences are whole and not only what the part adds.
    """
    hooks, usual, parts = [], TOLERANCES[trace.dtype], dict(module.named_modules())
    for path, ours in names_of(component, module)[0].items():
        part, name = parts[path], f"{component}.{ours}" if ours else component
        key = trace.find(Key(name, stage.call, stage.repeat))
        if key is None:
            continue

        def replace(module: nn.Module, args: tuple, out: Any, key: Key = key, name: str = name) -> Any:
            if isinstance(out, tuple):  # of others' attention, whose first is the output
                return (replace(module, args, out[0], key, name), *out[1:])
            recorded = trace[key]
            held = usual * _leeway(module, name) if tolerance is None else tolerance
            rows.append(difference(Key(name, stage.call, stage.repeat), out, recorded, held))
            if name == until:
                raise _Reached
            turned = arranged(out.shape, recorded) if replacing else None
            return out if turned is None else turned[0].to(out).contiguous()

        hooks.append(part.register_forward_hook(replace))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
