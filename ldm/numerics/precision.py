"""The precision report: how far every part is from a float64 truth, in each type and with each kernel of attention.

One text, one call of the UNet and one decoding are computed in float64 and kept as a trace. Each variant is then run twice: as
it is, which gives whole errors, and with the truth's numbers as the inputs of every part, which gives what each part adds by
itself (`forced.py`). The same is done with diffusers' modules of the same weights, where it is installed.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ldm.checkpoint import Components
from ldm.numerics.compare import Difference
from ldm.numerics.forced import forcing
from ldm.numerics.traces import Key, Trace, TraceWriter
from ldm.numerics.tracing import Tracer

KINDS = ("text_encoder", "unet", "autoencoder")
LAST = {"text_encoder": "text_encoder.final_norm", "unet": "unet.conv_out", "autoencoder": "autoencoder.decoder.conv_out"}
TRUTH = torch.float64
STAGES = {kind: Key(f"{kind}.out", 0 if kind == "unet" else None) for kind in KINDS}
Modules = dict[str, nn.Module]


@dataclass(frozen=True)
class Variant:
    """A way to compute: type, and what is switched on around it."""

    name: str
    dtype: torch.dtype
    around: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class Report:
    """One component in one variant: the whole error of its last output, all whole errors, and what each part adds."""

    variant: str
    kind: str
    whole: list[Difference]
    added: list[Difference]

    @property
    def last(self) -> float:
        return next(row.relative for row in self.whole if row.key.name == LAST[self.kind])

    @property
    def worst(self) -> Difference:
        return max(self.added, key=lambda row: row.relative)

    @property
    def median(self) -> float:
        return statistics.median(row.relative for row in self.added)


@dataclass(frozen=True)
class Inputs:
    """What every variant is given: token ids (b, n), latents (b, 4, h, w), a timestep."""

    ids: Tensor
    x: Tensor
    t: float

    @classmethod
    def of(cls, components: Components, prompt: str, t: float, size: int | None, seed: int) -> "Inputs":
        """A prompt, and N(0, 1) latents of a picture of `size` pixels (the model's own if None)."""
        config, factor = components.unet.config, components.autoencoder.config.downsampling
        side = config.sample_size if size is None else size // factor
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(1, config.in_channels, side, side, generator=random, dtype=TRUTH)
        return cls(components.tokenizer(prompt).ids, x, t)


def variants(device: torch.device) -> list[Variant]:
    """float32, with every kernel of attention that there is; TF32 on a GPU; bfloat16 and float16."""
    found = [Variant("float32", torch.float32)]
    for backend in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION):
        for dtype in (torch.float32, torch.bfloat16):
            if _works(backend, dtype, device):
                name = f"{_named(dtype)}, attention {backend.name.lower().removesuffix('_attention')}"
                found.append(Variant(name, dtype, lambda backend=backend: sdpa_kernel(backend)))
    if device.type == "cuda":
        found.append(Variant("float32, TF32", torch.float32, partial(tf32, True)))
    found += [Variant("bfloat16", torch.bfloat16), Variant("float16", torch.float16)]
    return sorted(found, key=lambda variant: ["float32", "bfloat16", "float16"].index(variant.name.split(",")[0]))


def _works(backend: SDPBackend, dtype: torch.dtype, device: torch.device) -> bool:
    x = torch.zeros(1, 1, 8, 8, dtype=dtype, device=device)
    try:
        with sdpa_kernel(backend):
            torch.nn.functional.scaled_dot_product_attention(x, x, x)
    except RuntimeError:
        return False
    return True


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Whether a GPU may round float32's factors to TF32. torch has it do so in convolutions, unless told not to."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- The report ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def report(
    load: Callable[[torch.dtype], Components],
    inputs: Callable[[Components], Inputs],
    *,
    peers: Callable[[torch.dtype], Modules] | None = None,
    chosen: list[Variant] | None = None,
) -> Iterator[Report]:
    """Each component in each variant. load: the model in a type; it is asked for one after another, and each let go before the
    next. inputs: made for the model in float64. peers: another implementation's modules of the same weights, by kind."""
    with tempfile.TemporaryDirectory(prefix="ldm-precision-") as folder:
        path = Path(folder) / "truth.trace"
        components = load(TRUTH)
        given, device = inputs(components), components.unet.conv_in.weight.device
        context = _truth(components, given, path)
        truth = Trace(path)
        del components
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            of_type = [variant for variant in (variants(device) if chosen is None else chosen) if variant.dtype == dtype]
            if not of_type:
                continue
            modules: Modules = _modules(load(dtype))
            for variant in of_type:
                yield from _reports(variant.name, modules, given, context, truth, variant.around)
            del modules
            if peers is not None:
                modules = peers(dtype)
                yield from _reports(f"{_named(dtype)}, diffusers", modules, given, context, truth, nullcontext)
                del modules


def _modules(components: Components) -> Modules:
    return {kind: getattr(components, kind) for kind in KINDS}


def _truth(components: Components, inputs: Inputs, path: Path) -> Tensor:
    """Trace the float64 model; the context that its UNet was given."""
    modules = _modules(components)
    with TraceWriter(path) as writer, Tracer(writer, modules):
        context = _run("text_encoder", modules["text_encoder"], inputs, None)
        _run("unet", modules["unet"], inputs, context)
        _run("autoencoder", modules["autoencoder"], inputs, None)
    return context


def _reports(
    name: str, modules: Modules, inputs: Inputs, context: Tensor, truth: Trace, around: Callable[[], AbstractContextManager]
) -> Iterator[Report]:
    for kind in KINDS:
        if kind not in modules:
            continue
        rows: dict[bool, list[Difference]] = {False: [], True: []}
        for replacing, found in rows.items():
            with tf32(False), around(), forcing(modules[kind], kind, truth, STAGES[kind], found, 0.0, replacing=replacing):
                _run(kind, modules[kind], inputs, context)
        yield Report(name, kind, rows[False], rows[True])


def _run(kind: str, module: nn.Module, inputs: Inputs, context: Tensor | None) -> Any:
    """One component, ours or diffusers', on its part of the inputs."""
    weight = next(module.parameters())
    if kind == "text_encoder":
        return module(inputs.ids.to(weight.device))
    x = inputs.x.to(weight)
    if kind == "unet":
        return module(x, torch.tensor([inputs.t], device=weight.device, dtype=TRUTH), context.to(weight))
    return module.decode(x)
