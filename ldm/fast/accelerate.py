"""`accelerate`: a loaded model -> one that the same pipelines run, and that makes the same pictures sooner.

    model = ldm.fast.accelerate(ldm.load("sd-v1-4.ckpt"))
    ldm.txt2img(model, "a red cube")

The reference keeps every weight as it was. What the quick modules need in another layout they have copies of, the rest they
share; drop the reference to have its memory back.
"""

import dataclasses
from copy import deepcopy

import torch
from torch import nn

from ldm.checkpoint import DTYPES, REQUIRED, Components
from ldm.fast import memory, native
from ldm.fast.attention import ChosenAttention
from ldm.fast.autoencoder import FastAutoencoder
from ldm.fast.plan import Plan
from ldm.fast.unet import FastUNet
from ldm.output.receipt import fingerprint

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
) -> Components:
    """The model with its UNet and autoencoder rewritten, on the device where it is. Exact but for rounding.

    dtype: of the weights and of what is computed; the model's own where left out.
    side: of the pictures it should be quickest for, in pixels; the size the model was trained at where left out.
    winograd: in float32 on a CPU, convolutions in a quarter of the multiplications: "auto" where that is quicker and takes no more
        memory, "all" where it is quicker, which without a C compiler takes twice the memory, or "none".
    keep_pages: on a CPU, have the whole process keep the memory that it frees; see `ldm.fast.memory.keep_pages`.
    kernels: on a GPU, GroupNorm and SiLU in Triton, where that is installed, and the quickest attention for each shape; on a
        CPU, attention and float32 convolutions in C, where there is a compiler for it (`compiling.py`).
    graph: on a GPU, capture the guided network once for each shape and replay it; see `ldm/fast/graph.py`.
    LoRAs are attached or merged beforehand. Raises ValueError, one line, for what is no model as loaded.
    """
    if not isinstance(components, Components):
        raise ValueError(f"components is a {type(components).__name__}; expected what ldm.load returns")
    if components.acceleration is not None:
        raise ValueError("the model is accelerated already; give the one that ldm.load returned")
    weight = components.unet.conv_in.weight
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype}; expected one of {', '.join(map(str, DTYPES))}")
    factor = components.autoencoder.config.downsampling
    if side is not None and (side < factor or side % factor):
        raise ValueError(f"side {side}; expected a multiple of {factor}")
    on_cpu, on_cuda = weight.device.type == "cpu", weight.device.type == "cuda"
    if winograd not in ("auto", "all", "none"):
        raise ValueError(f"winograd {winograd!r}; expected auto, all or none")
    told = {
        "winograd": winograd if on_cpu and dtype == torch.float32 else "none",
        "kernels": kernels and (on_cuda or (on_cpu and native.attends(dtype))),
        "graph": graph and on_cuda,
    }
    if on_cpu and keep_pages:
        memory.keep_pages()
    for module in (components.text_encoder, components.unet, components.autoencoder, components.safety):
        for parameter in module.parameters() if module else ():  # what loading read to check it; what is used comes back
            memory.let_go(parameter)
    latents = components.unet.config.sample_size if side is None else side // factor
    plan = Plan(dtype=dtype, winograd=winograd, kernels=kernels, attend=ChosenAttention(choose=kernels))
    unet: nn.Module = FastUNet(components.unet, plan, side=latents)
    autoencoder = FastAutoencoder(components.autoencoder, plan, side=latents)
    if told["graph"]:
        from ldm.fast.graph import GraphedUNet

        unet = GraphedUNet(unet)
    return dataclasses.replace(
        components,
        text_encoder=released_after_use(in_type(components.text_encoder, dtype)),
        unet=unet,
        autoencoder=autoencoder,
        acceleration=told,
        fingerprint=components.fingerprint or fingerprint({kind: getattr(components, kind) for kind in REQUIRED}),
    )


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
