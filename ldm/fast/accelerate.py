"""`accelerate`: a loaded model -> one that the same pipelines run, and that makes the same pictures sooner.

    model = ldm.fast.accelerate(ldm.load("sd-v1-4.ckpt"))
    ldm.txt2img(model, "a red cube")

The reference keeps every weight as it was. What the quick modules need in another layout they have copies of, the rest they
share; drop the reference to have its memory back.
"""

import dataclasses
from copy import deepcopy
from typing import Any

import torch
from torch import nn

from ldm.checkpoint import DTYPES, REQUIRED, Components
from ldm.fast import memory, native, token_merging
from ldm.fast.attention import ChosenAttention
from ldm.fast.autoencoder import FastAutoencoder
from ldm.fast.deep_cache import CachedUNet
from ldm.fast.plan import Plan
from ldm.fast.unet import FastUNet
from ldm.output.receipt import fingerprint

WIDE = (torch.float32, torch.float64)
WORTH_RELEASING = 1 << 20  # bytes of a weight


@torch.no_grad()
def accelerate(
    components: Components,
    *,
    dtype: torch.dtype | None = None,
    side: int | None = None,
    winograd: str = "auto",
    keep_pages: bool = True,
    kernels: bool = True,
    graph: bool = True,
    compile: bool = False,
    cache_steps: int = 1,
    merge_tokens: float = 0.0,
) -> Components:
    """The model with its UNet and autoencoder rewritten, on the device where it is. Exact but for rounding.

    dtype: of the weights and of what is computed; the model's own where left out.
    side: of the pictures it should be quickest for, in pixels; the size the model was trained at where left out.
    winograd: on a CPU, convolutions in a quarter of the multiplications: "auto" where that is quicker and takes no more memory,
        "all" where it is quicker, which without a C compiler takes twice the memory, or "none".
    keep_pages: on a CPU, have the whole process keep the memory that it frees; see `ldm.fast.memory.keep_pages`.
    kernels: on a GPU, GroupNorm and SiLU in Triton, where that works, and the quickest attention for each shape; on a
        CPU, attention and convolutions in C, where there is a compiler for it (`compiling.py`).
    graph: on a GPU, capture the guided network once for each shape and replay it; see `ldm/fast/graph.py`.
    compile: on a GPU, the UNet by torch's compiler in place of our kernels. The first call takes minutes.

    Approximations, whose pictures are other pictures (`python -m benchmarks.approximations` says how far off):

    cache_steps: compute the whole UNet at each so-manieth step only; see `ldm/fast/deep_cache.py`. Not with a graph.
    merge_tokens: the share of its tokens that the largest maps' self-attention does without; see `ldm/fast/token_merging.py`.

    LoRAs are attached or merged beforehand. Raises ValueError, one line, for what is no model as loaded.
    """
    _check(components, dtype, side, winograd, compile, cache_steps, merge_tokens)
    weight = components.unet.conv_in.weight
    on_cpu, on_cuda = weight.device.type == "cpu", weight.device.type == "cuda"
    dtype, kernels = dtype or weight.dtype, kernels and not compile
    told: dict[str, Any] = {
        "winograd": winograd if on_cpu and (dtype in WIDE or (kernels and native.convolves_in(dtype))) else "none",
        "kernels": kernels and (on_cuda or (on_cpu and (native.attends(dtype) or native.engages(dtype)))),
        "graph": graph and on_cuda and cache_steps == 1,
    }
    others = {"compile": compile, "cache_steps": cache_steps, "merge_tokens": merge_tokens}
    exact = {"compile": False, "cache_steps": 1, "merge_tokens": 0.0}
    told |= {name: value for name, value in others.items() if value != exact[name]}
    # Before pages are let go, since it reads a few of every tensor's.
    known = components.fingerprint or fingerprint({kind: getattr(components, kind) for kind in REQUIRED})
    if on_cpu and keep_pages:
        memory.keep_pages()
    for module in (components.text_encoder, components.unet, components.autoencoder, components.safety):
        for parameter in module.parameters() if module else ():  # what loading read to check it; what is used comes back
            memory.let_go(parameter)
    latents = components.unet.config.sample_size if side is None else side // components.autoencoder.config.downsampling
    attend = ChosenAttention(choose=kernels)
    plan = Plan(dtype=dtype, winograd=winograd, kernels=kernels, attend=attend, merge_tokens=merge_tokens)
    unet: nn.Module = FastUNet(components.unet, plan, side=latents)
    autoencoder = FastAutoencoder(components.autoencoder, plan, side=latents)
    if compile:
        unet.denoise = torch.compile(unet.denoise, mode="max-autotune-no-cudagraphs", dynamic=False)
    if cache_steps > 1:
        unet = CachedUNet(unet, cache_steps)
    if told["graph"]:
        from ldm.fast.graph import GraphedUNet

        unet = GraphedUNet(unet)
    return dataclasses.replace(
        components,
        text_encoder=released_after_use(in_type(components.text_encoder, dtype)),
        unet=unet,
        autoencoder=autoencoder,
        acceleration=told,
        fingerprint=known,
    )


def _check(components, dtype, side, winograd, compile, cache_steps, merge_tokens) -> None:
    if not isinstance(components, Components):
        raise ValueError(f"components is a {type(components).__name__}; expected what ldm.load returns")
    if components.acceleration is not None:
        raise ValueError("the model is accelerated already; give the one that ldm.load returned")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    factor, device = components.autoencoder.config.downsampling, components.unet.conv_in.weight.device
    if side is not None and (side < factor or side % factor):
        raise ValueError(f"side {side}; expected a multiple of {factor}")
    if winograd not in ("auto", "all", "none"):
        raise ValueError(f"winograd {winograd!r}; expected auto, all or none")
    if compile and device.type != "cuda":
        raise ValueError(f"compile is for a GPU, and the model is on {device}, where kernels in C take its place; leave it out")
    if not isinstance(cache_steps, int) or isinstance(cache_steps, bool) or cache_steps < 1:
        raise ValueError(f"cache_steps {cache_steps!r}; expected a whole number from 1, which is exact, on")
    if compile and cache_steps > 1:
        raise ValueError(f"compile and cache_steps {cache_steps}; the compiler takes the whole network: choose one of them")
    if not isinstance(merge_tokens, (int, float)) or not 0 <= merge_tokens <= token_merging.MOST:
        raise ValueError(f"merge_tokens {merge_tokens!r}; expected a share from 0, which is exact, to {token_merging.MOST}")


def in_type(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The module itself where it is of that type, or a copy of it that is; never two copies at a time."""
    if all(parameter.dtype == dtype for parameter in module.parameters()):
        return module
    converted = {id(p): nn.Parameter(memory.converted(p, dtype), requires_grad=False) for p in module.parameters()}
    return deepcopy(module, converted)


def released_after_use(encoder: nn.Module) -> nn.Module:
    """The same text encoder, each of whose parts lets go of its weights' pages, where they are a file's, when it has been used:
    for the rest of a picture they would take room for nothing. The one given stays as it is; the parameters are the same."""

    def release(module: nn.Module, *_) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.nbytes >= WORTH_RELEASING:
                memory.let_go(parameter)

    made = deepcopy(encoder, {id(parameter): parameter for parameter in encoder.parameters()})
    for module in made.modules():
        module.register_forward_hook(release)
    return made
