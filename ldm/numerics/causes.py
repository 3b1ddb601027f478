"""Well-known causes, tried out: each is done to our own part, which then computes again from the other side's numbers. Where it
suddenly agrees, that is what the other side does.

    try "gelu by tanh" at unet.down.0.attention.block.feed_forward.reduce: error 8.1e-4 -> 1.2e-7

A cause is a name, the parts it may concern, and a change of them that is undone at the end.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from ldm.checkpoint import Components
from ldm.models import clip, unet_blocks
from ldm.numerics import changes
from ldm.numerics.changes import Change
from ldm.numerics.compare import Difference
from ldm.numerics.forced import forced
from ldm.numerics.traces import Key, Trace

AGREES = 1 / 20  # of the error before: what is left where a cause is the right one
EPSILONS = (1e-5, 1e-6, 1e-3, 1e-8, 1e-12, 0.0)


@dataclass(frozen=True)
class Cause:
    """A cause that explains a part's error: in words, and the part's error before and after it was tried."""

    what: str
    before: float
    after: float

    def __str__(self) -> str:
        return f"{self.what} (with that, {self.before:.1e} becomes {self.after:.1e})"


def causes(components: Components, trace: Trace, guilty: Difference) -> list[Cause]:
    """What explains that a part's output in the trace is not what ours makes of the trace's inputs, the best first."""
    component, _, path = guilty.key.name.partition(".")
    module = getattr(components, component, None)
    if not isinstance(module, nn.Module):
        return []
    parts = dict(module.named_modules())
    if path not in parts:
        return []
    stage = Key(
        {"unet": "unet.x", "text_encoder": "text_encoder.ids"}.get(component, f"{component}.latents"),
        guilty.key.call,
        guilty.key.repeat,
    )
    found = []
    for what, change in _candidates(component, path, parts, components):
        with ExitStack() as stack:
            change(stack)
            rows = forced(components, trace, stage, until=guilty.key.name)
        after = next((row.relative for row in rows if row.key == guilty.key), math.inf)
        if after <= guilty.relative * AGREES or (after <= guilty.tolerance and after < guilty.relative / 3):
            found.append(Cause(what, guilty.relative, after))
    return sorted(found, key=lambda cause: cause.after)


def _candidates(component: str, path: str, parts: dict[str, nn.Module], components: Components) -> Iterator[tuple[str, Change]]:
    part = parts[path]
    if isinstance(part, nn.GroupNorm | nn.LayerNorm):
        yield from _of_norm(part)
    if isinstance(part, nn.Linear | nn.Conv2d):
        yield from _of_weights(path, part, parts)
    if isinstance(part, nn.Conv2d):
        yield from _of_convolution(part)
    if path.endswith(("feed_forward.reduce", "mlp.fc2")):
        yield from _of_activation()
    if path.endswith(("attention.output", "attention")):
        yield from _of_attention(parts[path.removesuffix(".output")], components)
    if fnmatchcase(path, "up.*.residual.norm1") or fnmatchcase(path, "up.*.residual.shortcut"):
        yield (
            "the skip connection is joined before the features, not after them",
            changes.patch(torch, "cat", changes.cat_reversed),
        )
    if path.endswith("upsample"):
        for mode in ("bilinear", "bicubic"):
            yield (
                f"upsampling is {mode}, where ours takes the nearest pixel",
                changes.patch(F, "interpolate", partial(changes.interpolate, mode)),
            )
    if path == "time_embedding.linear_1":
        yield from _of_timesteps(part)
    if path.endswith("time_projection"):
        yield "the time projection lacks the SiLU before it", changes.patch(F, "silu", lambda x: x)
    if component == "text_encoder" and path in ("layers.0.norm1", "token_embedding"):
        yield from _of_positions(parts[""])
    if path and not isinstance(part, nn.Linear | nn.Conv2d | nn.GroupNorm | nn.LayerNorm | nn.Embedding):
        yield "the input is not added to the output (no residual connection)", changes.without_residual(part)


# -- What may be wrong with a part ---------------------------------------------------------------------------------------


def _of_norm(part: nn.GroupNorm | nn.LayerNorm) -> Iterator[tuple[str, Change]]:
    kind = type(part).__name__
    for eps in EPSILONS:
        if eps != part.eps:
            yield f"{kind}'s eps is {eps:g}, where ours is {part.eps:g}", changes.set_to(part, "eps", eps)
    yield f"{kind} has no weight and no bias", changes.with_forward(part, lambda x: changes.plain_norm(part, x))
    if isinstance(part, nn.GroupNorm):
        for groups in (1, 8, 16, 64):
            if part.num_channels % groups == 0 and groups != part.num_groups:
                yield (
                    f"GroupNorm has {groups} groups, where ours has {part.num_groups}",
                    changes.set_to(part, "num_groups", groups),
                )


def _of_weights(path: str, part: nn.Linear | nn.Conv2d, parts: dict[str, nn.Module]) -> Iterator[tuple[str, Change]]:
    weight = part.weight
    if weight.ndim == 2 and weight.shape[0] == weight.shape[1]:
        yield "the weight is transposed", changes.with_data(part, "weight", weight.t())
    if weight.ndim == 4 and weight.shape[2] > 1:
        yield "the kernel is flipped (a true convolution)", changes.with_data(part, "weight", weight.flip(2, 3))
        yield "the kernel's height and width are exchanged", changes.with_data(part, "weight", weight.transpose(2, 3))
    if part.bias is not None:
        yield "the bias is missing", changes.with_data(part, "bias", torch.zeros_like(part.bias))
    for other_path, other in parts.items():
        if other is not part and type(other) is type(part) and other.weight.shape == weight.shape and _near(path, other_path):
            yield f"the weights are those of {other_path}", changes.with_data(part, "weight", other.weight)
            yield (
                f"weights and bias are those of {other_path}",
                changes.all_of(*(changes.with_data(part, n, p) for n, p in other._parameters.items() if p is not None)),
            )


def _near(path: str, other: str) -> bool:
    """Whether it is worth a try: parts of the same block, or of the same name in another block."""
    return path.rpartition(".")[0] == other.rpartition(".")[0] or path.rpartition(".")[2] == other.rpartition(".")[2]


def _of_convolution(part: nn.Conv2d) -> Iterator[tuple[str, Change]]:
    if part.kernel_size == (1, 1):
        return
    for mode in ("reflect", "replicate", "circular"):
        yield (
            f"the padding is {mode}, where ours is of zeros",
            changes.with_forward(part, partial(changes.padded, part, mode, part.padding[0], part.padding[0])),
        )
    if part.stride == (2, 2):
        for before, after in ((0, 1), (1, 0), (1, 1)):
            where = {(0, 1): "right and bottom only", (1, 0): "left and top only", (1, 1): "on all sides"}[before, after]
            yield (
                f"the padding is {where}",
                changes.with_forward(part, partial(changes.padded, part, "constant", before, after)),
            )
    yield "the SiLU before it is missing", changes.patch(F, "silu", lambda x: x)
    yield "a ReLU stands where ours has SiLU", changes.patch(F, "silu", F.relu)


def _of_activation() -> Iterator[tuple[str, Change]]:
    forms = {
        "exact gelu": partial(changes.gelu, "none"),
        "gelu by tanh": partial(changes.gelu, "tanh"),
        "quick gelu": clip.quick_gelu,
        "silu": changes.silu,
        "relu": changes.relu,
    }
    for name, form in forms.items():
        yield (
            f"the activation is {name}",
            changes.all_of(changes.patch(F, "gelu", form), changes.patch(clip, "quick_gelu", form)),
        )


def _of_attention(part: Any, components: Components) -> Iterator[tuple[str, Change]]:
    width, heads = part.query.out_features, part.heads
    head = width // heads
    scales = {
        "1 / d": 1 / head,
        "1 (none)": 1.0,
        "1 / sqrt(width)": width**-0.5,
        "sqrt(d)": head**0.5,
        "1 / sqrt(heads)": heads**-0.5,
    }
    for name, scale in scales.items():
        yield f"attention's scale is {name}, where ours is 1 / sqrt(d), d = {head}", changes.with_attention(scale=scale)
    yield "attention is not causal", changes.with_attention(causal=False)
    yield "attention is causal", changes.with_attention(causal=True)
    for count in {width // 8, width // 64, 1, 2 * heads, heads // 2} - {heads, 0}:
        if width % count == 0:
            yield (
                f"attention has {count} heads of {width // count}, where ours has {heads} of {head}",
                changes.set_to(part, "heads", count),
            )
    yield (
        "attention's heads are the last axis (features are split d, heads)",
        changes.set_to(part, "_split", partial(changes.split_last, heads)),
    )
    end = components.tokenizer.end
    yield (
        "padding is masked: tokens after the first end mark are not attended to",
        changes.with_masked_padding(components.text_encoder, end),
    )


def _of_timesteps(part: nn.Linear) -> Iterator[tuple[str, Change]]:
    waves = unet_blocks.timestep_embedding
    for offset in (-1, 1):
        yield (
            f"t is {abs(offset)} {'lower' if offset < 0 else 'higher'} than it says",
            changes.patch(unet_blocks, "timestep_embedding", lambda t, w, o=offset: waves(t + o, w)),
        )
    yield (
        "sines come before cosines",
        changes.patch(unet_blocks, "timestep_embedding", lambda t, w: torch.cat(waves(t, w).chunk(2, -1)[::-1], -1)),
    )
    yield (
        "the angles are computed in float32",
        changes.patch(unet_blocks, "timestep_embedding", lambda t, w: waves(t.float(), w)),
    )
    yield (
        "frequencies end at 1/10000 (divided by half - 1)",
        changes.patch(unet_blocks, "timestep_embedding", changes.shifted_waves),
    )
    yield "t is divided by 1000", changes.patch(unet_blocks, "timestep_embedding", lambda t, w: waves(t / 1000, w))
    yield (
        "sines and cosines alternate",
        changes.patch(
            unet_blocks, "timestep_embedding", lambda t, w: torch.stack(waves(t, w).chunk(2, -1)[::-1], -1).flatten(1)
        ),
    )


def _of_positions(module: Any) -> Iterator[tuple[str, Change]]:
    table = module.position_embedding.weight
    yield "the position embedding is missing", changes.with_data(module.position_embedding, "weight", torch.zeros_like(table))
    yield "positions count from 1", changes.with_data(module.position_embedding, "weight", table.roll(-1, 0))
