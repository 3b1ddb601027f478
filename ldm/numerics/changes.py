"""What the well-known causes do to our own parts, to try them out. Each change is entered on an `ExitStack`, which undoes it.

A part's attribute is put beside it and taken away again; a parameter is exchanged, never written to.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.models import attention
from ldm.models.attention import softmax_attention

Change = Callable[[ExitStack], None]


def all_of(*changes: Change) -> Change:
    def change(stack: ExitStack) -> None:
        for one in changes:
            one(stack)

    return change


def patch(where: Any, name: str, value: Any) -> Change:
    return lambda stack: stack.enter_context(mock.patch.object(where, name, value))


@contextmanager
def _value(part: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module, put beside it for a while."""
    there, before = name in vars(part), vars(part).get(name)
    object.__setattr__(part, name, value)
    try:
        yield
    finally:
        if there:
            object.__setattr__(part, name, before)
        else:
            object.__delattr__(part, name)


def set_to(part: nn.Module, name: str, value: Any) -> Change:
    return lambda stack: stack.enter_context(_value(part, name, value))


def with_forward(part: nn.Module, forward: Callable[..., Tensor]) -> Change:
    return set_to(part, "forward", forward)


@contextmanager
def _parameter(part: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """A parameter of a module, exchanged for a while; the tensor itself is never written to."""
    held = part._parameters[name]
    part._parameters[name] = nn.Parameter(value.detach().contiguous(), requires_grad=False)
    try:
        yield
    finally:
        part._parameters[name] = held


def with_data(part: nn.Module, name: str, value: Tensor) -> Change:
    return lambda stack: stack.enter_context(_parameter(part, name, value))


def with_attention(scale: float | None = None, causal: bool | None = None) -> Change:
    def attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if causal is not None:
            options = {"causal": causal} if causal else {}
        if scale is not None:
            query = query * (scale * math.sqrt(query.shape[-1]))
        return softmax_attention(query, key, value, **options)

    return patch(attention, "attention", attend)


def with_masked_padding(encoder: nn.Module, end: int) -> Change:
    """Where the text encoder is asked: with a mask of what comes after the first end mark."""

    def masked(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        ids = args[0]
        ends = (ids == end).cumsum(dim=1)
        return (ids, (ends == 0) | ((ends == 1) & (ids == end))), kwargs

    return lambda stack: stack.callback(encoder.register_forward_pre_hook(masked, with_kwargs=True).remove)


def without_residual(part: nn.Module) -> Change:
    hook = lambda _, args, out: out - args[0] if args and isinstance(args[0], Tensor) and args[0].shape == out.shape else out  # noqa: E731
    return lambda stack: stack.callback(part.register_forward_hook(hook, prepend=True).remove)


# -- The other forms -----------------------------------------------------------------------------------------------------

_real_gelu, _real_interpolate, _real_cat = F.gelu, F.interpolate, torch.cat


def gelu(approximate: str, x: Tensor) -> Tensor:
    return _real_gelu(x, approximate=approximate)


def silu(x: Tensor) -> Tensor:
    return x * x.sigmoid()


def relu(x: Tensor) -> Tensor:
    return x.clamp(min=0)


def interpolate(mode: str, x: Tensor, /, **options: Any) -> Tensor:
    return _real_interpolate(x, **{**options, "mode": mode})


def cat_reversed(tensors: list[Tensor], dim: int = 0) -> Tensor:
    return _real_cat(list(tensors)[::-1], dim=dim)


def padded(part: nn.Conv2d, mode: str, before: int, after: int, x: Tensor) -> Tensor:
    return F.conv2d(F.pad(x, (before, after, before, after), mode=mode), part.weight, part.bias, part.stride)


def plain_norm(part: nn.GroupNorm | nn.LayerNorm, x: Tensor) -> Tensor:
    if isinstance(part, nn.GroupNorm):
        return F.group_norm(x, part.num_groups, eps=part.eps)
    return F.layer_norm(x, part.normalized_shape, eps=part.eps)


def split_last(heads: int, x: Tensor) -> Tensor:
    return x.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2)


def shifted_waves(t: Tensor, width: int) -> Tensor:
    half = width // 2
    frequencies = 10_000.0 ** (-torch.arange(half, dtype=t.dtype, device=t.device) / (half - 1))
    angles = t[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
