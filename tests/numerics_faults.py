"""Faults of the kind that ports have, each planted in a copy of a model: what to change, which tensor is wrong first because of
it, and what is to be said of it."""

import copy
import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn

from ldm import images
from ldm.diffusion import guidance
from ldm.models import attention, clip, unet_blocks

BLOCK = "unet.down.0.attention.block"


@dataclass(frozen=True)
class Fault:
    """plant: changes the copy's components, and may return a context manager to run it under, or other components.

    guilty: the name of the first tensor that is wrong by itself. known: a part of what is said of it.
    """

    name: str
    plant: Callable[[Any], Any]
    guilty: str
    known: str


def part(model: Any, name: str) -> Any:
    component, _, path = name.partition(".")
    return getattr(model, component).get_submodule(path)


def set_to(name: str, **fields: Any) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        for field, value in fields.items():
            setattr(part(model, name), field, value)

    return plant


def data_of(name: str, change: Callable[[torch.Tensor], torch.Tensor], field: str = "weight") -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        tensor = getattr(part(model, name), field).data
        tensor.copy_(change(tensor.clone()))

    return plant


def exchanged(one: str, other: str) -> Callable[[Any], None]:
    """A swapped pair of keys in the table that a port loads by."""

    def plant(model: Any) -> None:
        first, second = part(model, one).weight, part(model, other).weight
        first.data, second.data = second.data, first.data

    return plant


def patched(where: Any, name: str, value: Any) -> Callable[[Any], Any]:
    return lambda model: mock.patch.object(where, name, value)


def forward_of(name: str, make: Callable[[Any], Callable]) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        chosen = part(model, name)
        chosen.forward = make(chosen)

    return plant


def hooked(name: str, hook: Callable, **options: Any) -> Callable[[Any], None]:
    return lambda model: part(model, name).register_forward_hook(hook, **options) and None


def in_half(dtype: torch.dtype) -> Callable[[Any], Callable]:
    def make(module: nn.Module) -> Callable:
        half = copy.deepcopy(module).to(dtype)
        return lambda x: half(x.to(dtype)).to(x.dtype)

    return make


def without_mask(model: Any) -> Any:
    real = attention.attention
    return mock.patch.object(attention, "attention", lambda q, k, v, **options: real(q, k, v))


def scaled_otherwise(model: Any) -> Any:
    real = attention.attention

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
        return real(q * q.shape[-1] ** -0.5, k, v, **options)

    return mock.patch.object(attention, "attention", attend)


def padding_masked(model: Any) -> None:
    real, end = model.text_encoder.forward, model.tokenizer.end

    def forward(ids: torch.Tensor, mask: Any = None, **options: Any) -> torch.Tensor:
        ends = (ids == end).cumsum(dim=1)
        return real(ids, (ends == 0) | ((ends == 1) & (ids == end)), **options)

    model.text_encoder.forward = forward


def one_timestep_late(model: Any) -> None:
    real = model.unet.embed_time
    model.unet.embed_time = lambda t: real(t - 1)


def sines_first(model: Any) -> Any:
    real = unet_blocks.timestep_embedding
    return mock.patch.object(
        unet_blocks, "timestep_embedding", lambda t, width: torch.cat(real(t, width).chunk(2, -1)[::-1], -1)
    )


def halves_exchanged(model: Any) -> Any:
    return mock.patch.object(guidance, "combine", lambda uncond, cond, scale: cond + scale * (uncond - cond))


def truncated(model: Any) -> Any:
    real = images.to_images
    return mock.patch.object(images, "to_images", lambda pixels, truncate=False: real(pixels, truncate=True))


def unscaled(model: Any) -> Any:
    config = dataclasses.replace(model.autoencoder.config, scaling_factor=1.0)
    model.autoencoder.config = config


def without_final_norm(model: Any) -> None:
    model.text_encoder.final_norm = nn.Identity()


def kept_in_half(model: Any) -> None:
    real = model.unet.denoise
    model.unet.denoise = lambda x, *rest: real(x.bfloat16().to(x.dtype), *rest)


def skips_first(model: Any) -> Any:
    real = torch.cat

    def cat(tensors: Any, dim: int = 0) -> torch.Tensor:
        tensors = list(tensors)
        return real(tensors[::-1] if dim == 1 and tensors[0].ndim == 4 else tensors, dim=dim)

    return mock.patch.object(torch, "cat", cat)


FAULTS = [
    Fault(
        "GroupNorm eps",
        set_to("unet.down.1.residual.norm2", eps=1e-3),
        "unet.down.1.residual.norm2",
        "GroupNorm's eps is 0.001",
    ),
    Fault(
        "GroupNorm eps, of a transformer",
        set_to("unet.up.6.attention.norm", eps=1e-5),
        "unet.up.6.attention.norm",
        "GroupNorm's eps is 1e-05",
    ),
    Fault(
        "LayerNorm eps", set_to("text_encoder.layers.1.norm1", eps=1e-12), "text_encoder.layers.1.norm1", "LayerNorm's eps is"
    ),
    Fault(
        "gelu by tanh",
        patched(F, "gelu", lambda x: _gelu(x, approximate="tanh")),
        f"{BLOCK}.feed_forward.reduce",
        "the activation is gelu by tanh",
    ),
    Fault(
        "gelu for quick gelu",
        patched(clip, "quick_gelu", F.gelu),
        "text_encoder.layers.0.mlp.fc2",
        "the activation is exact gelu",
    ),
    Fault("padding mask", padding_masked, "text_encoder.layers.0.attention.output", "padding is masked"),
    Fault("no causal mask", without_mask, "text_encoder.layers.0.attention.output", "attention is not causal"),
    Fault("attention scale", scaled_otherwise, "text_encoder.layers.0.attention.output", "attention's scale is 1 / d"),
    Fault(
        "heads for their width",
        set_to(f"{BLOCK}.self_attention", heads=2),
        f"{BLOCK}.self_attention.output",
        "attention has 2 heads of 8",
    ),
    Fault(
        "transposed weight",
        data_of(f"{BLOCK}.cross_attention.query", lambda w: w.t()),
        f"{BLOCK}.cross_attention.query",
        "the weight is transposed",
    ),
    Fault(
        "swapped pair of keys",
        exchanged(f"{BLOCK}.cross_attention.key", f"{BLOCK}.cross_attention.value"),
        f"{BLOCK}.cross_attention.key",
        "the weights are those of down.0.attention.block.cross_attention.value",
    ),
    Fault(
        "swapped blocks",
        exchanged("unet.up.3.attention.proj_in", "unet.up.4.attention.proj_in"),
        "unet.up.3.attention.proj_in",
        "the weights are those of up.4.attention.proj_in",
    ),
    Fault(
        "padding of a downsampling",
        forward_of("unet.down.2.downsample", lambda m: lambda x: F.conv2d(F.pad(x, (0, 1, 0, 1)), m.weight, m.bias, 2)),
        "unet.down.2.downsample",
        "the padding is right and bottom only",
    ),
    Fault(
        "padding mode",
        set_to(
            "autoencoder.decoder.up.1.residual.0.conv1", padding_mode="reflect", _reversed_padding_repeated_twice=[1, 1, 1, 1]
        ),
        "autoencoder.decoder.up.1.residual.0.conv1",
        "the padding is reflect",
    ),
    Fault("timestep off by one", one_timestep_late, "unet.t", "every timestep is 1 lower"),
    Fault("sines before cosines", sines_first, "unet.time_embedding.linear_1", "sines come before cosines"),
    Fault(
        "one layer in bfloat16",
        forward_of("unet.middle.residual_1.conv1", in_half(torch.bfloat16)),
        "unet.middle.residual_1.conv1",
        "every value is one of bfloat16",
    ),
    Fault(
        "one layer in float16",
        forward_of("autoencoder.decoder.conv_in", in_half(torch.float16)),
        "autoencoder.decoder.conv_in",
        "every value is one of float16",
    ),
    Fault("latents kept in bfloat16", kept_in_half, "unet.x", "every value is one of bfloat16"),
    Fault(
        "upsampling",
        patched(F, "interpolate", lambda x, **options: _interpolate(x, **{**options, "mode": "bilinear"})),
        "unet.up.2.upsample",
        "upsampling is bilinear",
    ),
    Fault(
        "skip connections first", skips_first, "unet.up.0.residual.norm1", "the skip connection is joined before the features"
    ),
    Fault(
        "missing bias",
        data_of("unet.up.4.residual.conv2", torch.zeros_like, "bias"),
        "unet.up.4.residual.conv2",
        "the bias is missing",
    ),
    Fault(
        "missing residual connection",
        hooked("unet.down.3.attention.block", lambda module, args, out: out - args[0]),
        "unet.down.3.attention.block",
        "the input is not added to the output",
    ),
    Fault("missing final norm", without_final_norm, "text_encoder", "the final norm is missing"),
    Fault("halves exchanged in guidance", halves_exchanged, "sampler.eps", "the halves of the batch are exchanged in guidance"),
    Fault("scaling factor", unscaled, "autoencoder.latents", "the autoencoder's scaling factor is missing"),
    Fault("8 bits by truncation", truncated, "picture", "values are cut off where they should be rounded"),
]
_gelu, _interpolate = F.gelu, F.interpolate


@contextmanager
def planted(fault: Fault | None, model: Any) -> Iterator[Any]:
    """A copy of the model with the fault in it, to be run while this holds."""
    copied = dataclasses.replace(
        model, **{kind: copy.deepcopy(getattr(model, kind)) for kind in ("text_encoder", "unet", "autoencoder")}
    )
    around = fault.plant(copied) if fault else None
    with nullcontext() if around is None else around:
        yield copied
