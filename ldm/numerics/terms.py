"""What numbers alone tell of a fault that is in no part of a network: inputs, the sampler's terms, the picture.

Each function looks at a pair of tensors, or at the tensors around one in a trace, and says in words what it recognises.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from ldm.numerics.compare import arranged, difference
from ldm.numerics.traces import Key, Trace

FACTORS = {0.18215: "the autoencoder's scaling factor", 0.18215**2: "the square of the autoencoder's scaling factor"}
CLOSE = 1e-4  # relative error at which two tensors are taken for the same


def recognised(a: Trace, b: Trace, key: Key) -> list[str]:
    """What is known of b's difference from a at `key`, which both have."""
    of_a, of_b = a.find(key), b.find(key)
    if of_a is None or of_b is None:
        return []
    turned = arranged(a[of_a].shape, b[of_b])
    if turned is None:
        return [f"the shape is {list(b[of_b].shape)}, where it should be {list(a[of_a].shape)}"]
    x, y = a[of_a], turned[0]
    found = list(_of_timesteps(a, b, key)) if key.name in ("unet.t", "sampler.t") else []
    if key.name == "unet.x" and key.call:
        found.append(
            f"all that the network computed before is right: look at guidance and at the sampler's step before call {key.call}"
        )
    if key.name == "sampler.eps":
        found += _of_guidance(a, b, key)
    if key.name in ("unet.context", "text_encoder.final_norm", "text_encoder"):
        found += _of_context(b, x, y)
    return found + list(_of_values(x, y))


def _of_values(x: Tensor, y: Tensor) -> Iterator[str]:
    """Of any two tensors of one shape."""
    if x.dtype == y.dtype == torch.uint8:
        lower = (x.int() - y.int()).unique().tolist()
        if set(lower) == {0, 1}:
            yield "values are cut off where they should be rounded (8 bits)"
        if torch.equal(x.flip(-1), y):
            yield "red and blue are exchanged"
        return
    if not (x.dtype.is_floating_point and y.dtype.is_floating_point):
        return
    for dtype in (torch.bfloat16, torch.float16):
        if _holds(y, dtype) and not _holds(x, dtype):
            yield f"every value is one of {str(dtype).removeprefix('torch.')}: it was computed or kept in that type"
            break
    x, y = x.double(), y.double()
    if x.ndim > 1 and len(x) % 2 == 0 and _same(x.roll(len(x) // 2, 0), y):
        yield "the halves of the batch are exchanged: unconditional and conditional"
    if x.ndim > 1 and x.shape[-1] == x.shape[-2] and _same(x.transpose(-1, -2), y):
        yield "the last two axes are exchanged"
    norm = float((x * x).sum())
    factor = float((x * y).sum()) / norm if norm else 0.0
    if x.numel() > 4 and factor and abs(factor - 1) > CLOSE and _same(x * factor, y):
        named = next(
            (name for value, name in FACTORS.items() if min(abs(factor / value - 1), abs(factor * value - 1)) < 1e-3), ""
        )
        yield f"it is {factor:.6g} times what it should be{f': {named} is missing, or applied once too often' if named else ''}"


def _of_timesteps(a: Trace, b: Trace, key: Key) -> Iterator[str]:
    ours, theirs = ([float(t.flatten()[0]) for _, t in trace.named(key.name)] for trace in (a, b))
    steps = {round(y - x, 6) for x, y in zip(ours, theirs, strict=False)}
    shown = f"t is {_listed(theirs)}, where it should be {_listed(ours)}"
    if len(steps) == 1 and steps != {0}:
        (step,) = steps
        yield f"every timestep is {abs(step):g} {'lower' if step < 0 else 'higher'} than it should be ({shown})"
    elif ours[1 : len(theirs)] == theirs[: len(ours) - 1]:
        yield f"timesteps run one call ahead ({shown})"
    elif theirs[1 : len(ours)] == ours[: len(theirs) - 1]:
        yield f"timesteps run one call behind ({shown})"
    else:
        yield shown


def _listed(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values[:5]) + (", ..." if len(values) > 5 else "")


def _of_guidance(a: Trace, b: Trace, key: Key) -> Iterator[str]:
    """What scale b's guided eps has, from the two halves that its network gave."""
    calls = (key.call or 0, max((key.call or 0) - 1, 0))  # a step that calls twice tells of the first
    ours, theirs = (next((s for call in calls if (s := _scale(trace, key, call)) is not None), None) for trace in (a, b))
    if ours is None:
        return
    if theirs is None:
        yield "it is no guided combination of the network's two halves, uncond + scale (cond - uncond)"
    elif abs(theirs - (1 - ours)) < 1e-3:
        yield "the halves of the batch are exchanged in guidance: cond + scale (uncond - cond)"
    elif abs(theirs - ours) > 1e-3:
        yield f"the guidance scale is {theirs:.4g}, where it should be {ours:.4g}"


def _scale(trace: Trace, key: Key, call: int) -> float | None:
    """What scale makes the guided eps at `key` of the halves at a call; None where none does."""
    halves = trace.find(Key("unet.conv_out", call))
    if halves is None or len(trace[halves]) % 2 or key not in trace:
        return None
    eps = trace[key].double()
    uncond, cond = trace[halves].double().chunk(2)
    step = cond - uncond
    scale = float((step * (eps - uncond)).sum() / (step * step).sum())
    return scale if _same(uncond + scale * step, eps) else None


def _of_context(b: Trace, x: Tensor, y: Tensor) -> Iterator[str]:
    layers = [key for key in b.keys if key.name.startswith("text_encoder.layers.") and key.name.count(".") == 2]
    for back, key in enumerate(reversed(layers)):
        if b[key].shape == y.shape and torch.equal(b[key], y):
            yield (
                "it is the last layer's output: the final norm is missing"
                if back == 0
                else f"it is layer {back + 1} from the end"
            )
            return


def _holds(values: Tensor, dtype: torch.dtype) -> bool:
    return torch.finfo(values.dtype).eps < torch.finfo(dtype).eps and torch.equal(values.to(dtype).to(values.dtype), values)


def _same(x: Tensor, y: Tensor) -> bool:
    return difference(Key(""), x, y, CLOSE).relative <= CLOSE
