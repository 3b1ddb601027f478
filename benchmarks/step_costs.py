"""What a training step of Stable Diffusion v1's UNet costs: operations and bytes, counted; and the time of one here, measured.

    python -m benchmarks.step_costs                   # all of it: under 4 minutes and 12 GB
    python -m benchmarks.step_costs --count-only      # what needs neither weights nor time

Counted: every operation of a forward and a backward pass over tensors without memory (device "meta"), as a GPU would carry
them out: with the fused attention kernels, and under bfloat16 with the casts of torch's autocast for CUDA. FLOPs are those of
products and convolutions, a multiplication and an addition being two (torch's FlopCounterMode). Bytes:

    kept                 alive after the forward pass, other than weights: what the backward pass needs
    forward, backward    the most that is alive at once in either pass, other than weights and their gradients

Each is a part that is the same for any number of pictures (bfloat16: the weights' copies) and a part for each picture; two
counts tell them apart. Measured: forward and backward pass with random weights, one picture, and the FLOP/s that makes.
"""

import argparse
import itertools
import json
import resource
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.load import machine
from ldm.checkpoint import _SkipInitialisation
from ldm.diffusion.schedule import ScheduleConfig
from ldm.models.autoencoder import Autoencoder, AutoencoderConfig
from ldm.models.clip import TextConfig, TextEncoder
from ldm.models.unet import UNet, UNetConfig
from ldm.models.unet_blocks import Recomputable
from ldm.processes import Processes
from ldm.training.denoising import DenoisingLoss

SIZES = (256, 512)  # pixels
DTYPES = ("bfloat16", "float32")
TOKENS = 77
MEASURED = ((64, "float32", False), (256, "float32", False), (256, "float32", True))  # what 12 GB have room for
BATCHES = (4, 16)  # so many that what is alive at most is of the pictures, and not the largest weight
LOW = {F.linear, F.conv2d, torch.conv2d, torch.matmul, Tensor.matmul, Tensor.__matmul__}  # by CUDA's autocast in bfloat16
HIGH = {F.group_norm, F.layer_norm}  # and what in float32, of that which the UNet has


class AsOnCUDA(TorchFunctionMode):
    """For tensors on the device "meta": fused attention, and where dtype is "bfloat16" the casts of CUDA's autocast.

    caching: keep a weight's copy for the next use, as autocast does until its context is left.
    """

    def __init__(self, dtype: str, *, caching: bool, high: set[Any] = HIGH):
        super().__init__()
        self.low, self.high, self.caching = dtype == "bfloat16", high, caching
        self.copies: dict[Tensor, Tensor] = {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.scaled_dot_product_attention:
            query, key, value = (self._cast(x, torch.bfloat16) if self.low else x for x in args)
            if self.low:
                return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
            return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[0]
        if self.low and function in LOW | self.high:
            dtype = torch.bfloat16 if function in LOW else torch.float32
            args = [self._cast(x, dtype) for x in args]
            kwargs = {name: self._cast(x, dtype) for name, x in kwargs.items()}
        return function(*args, **kwargs)

    def _cast(self, x: Any, dtype: torch.dtype) -> Any:
        if not isinstance(x, Tensor) or x.dtype == dtype:
            return x
        if not (self.caching and x.is_leaf and x.requires_grad and dtype == torch.bfloat16):
            return x.to(dtype)
        if x not in self.copies:
            self.copies[x] = x.to(dtype)
        return self.copies[x]


class Alive(TorchDispatchMode):
    """Bytes of the memory that operations have made and that is still in use: now, and at most so far."""

    def __init__(self, known: list[Tensor]):
        super().__init__()
        self.seen = {id(x.untyped_storage()): x.untyped_storage() for x in known}  # weights and gradients: not counted
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in tree_iter(made):
            if isinstance(x, Tensor) and id(x.untyped_storage()) not in self.seen:
                self._add(x.untyped_storage())
        self.peak = max(self.peak, self.now)
        return made

    def _add(self, storage: torch.UntypedStorage) -> None:
        place, size = id(storage), storage.nbytes()
        self.seen[place] = None
        self.now += size

        def gone() -> None:
            del self.seen[place]
            self.now -= size

        weakref.finalize(storage, gone)


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """Of one micro-batch, as above."""

    kept: int
    forward: int
    backward: int


class Step:
    """A micro-batch of `batch` pictures size x size, its loss, and its gradients, which are added to those there are."""

    def __init__(self, size: int, batch: int, dtype: str, *, checkpointing: bool, config: UNetConfig, high: set[Any] = HIGH):
        self.as_on_cuda = partial(AsOnCUDA, dtype, high=high)
        with torch.device("meta"), _SkipInitialisation():
            self.unet = UNet(config)
            self.loss_of = DenoisingLoss(self.unet, ScheduleConfig(), 0.0)
            self.x0 = torch.empty(batch, self.unet.config.in_channels, size // 8, size // 8)
            self.t, self.context = (
                torch.empty(batch, dtype=torch.int64),
                torch.empty(batch, TOKENS, self.unet.config.context_width),
            )
        for weight in self.unet.parameters():
            weight.grad = torch.empty_like(weight)
        self.unet.checkpoint_gradients(checkpointing)

    @property
    def known(self) -> list[Tensor]:
        """What is there before."""
        weights = list(self.unet.parameters())
        return [*weights, *(weight.grad for weight in weights), *self.loss_of.buffers(), self.x0, self.t, self.context]

    def forward(self) -> Tensor:
        with self.as_on_cuda(caching=True):
            return self.loss_of(self.x0, self.t, self.x0, self.context)

    def backward(self, loss: Tensor) -> None:
        for block in self.unet.modules():
            if isinstance(block, Recomputable):  # computed again in the backward pass, on which no mode of functions has a hold
                block.forward = within(self.as_on_cuda(caching=False), block.forward)
        loss.backward()


def memory(
    size: int, batch: int, dtype: str, *, checkpointing: bool, config: UNetConfig | None = None, high: set[Any] = HIGH
) -> Bytes:
    """high: what autocast does in float32."""
    step = Step(size, batch, dtype, checkpointing=checkpointing, config=config or UNetConfig(), high=high)
    with Alive(step.known) as alive:
        loss = step.forward()
        kept, forward = alive.now, alive.peak
        alive.peak = kept
        step.backward(loss)
    return Bytes(kept=kept, forward=forward, backward=alive.peak)


def flops(size: int, *, checkpointing: bool) -> dict[str, int]:
    """Of one picture; the backward pass with what is computed a second time.

    A count of its own: torch's counter holds on to tensors that are computed again.
    """
    step = Step(size, 1, "float32", checkpointing=checkpointing, config=UNetConfig())
    with FlopCounterMode(display=False) as forward:
        loss = step.forward()
    with FlopCounterMode(display=False) as backward:
        step.backward(loss)
    return {"forward": forward.get_total_flops(), "backward": backward.get_total_flops()}


def within(mode: TorchFunctionMode, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def call(*args: Any) -> Tensor:
        with mode:
            return function(*args)

    return call


@torch.no_grad()
def encoders(size: int) -> dict[str, int]:
    """FLOPs of making one picture's latents, and one caption's states."""
    found = {}
    with torch.device("meta"):
        runs = {
            "autoencoder": (Autoencoder(AutoencoderConfig()).encode, torch.empty(1, 3, size, size)),
            "text encoder": (TextEncoder(TextConfig()), torch.empty(1, TOKENS, dtype=torch.int64)),
        }
    for name, (encode, given) in runs.items():
        with FlopCounterMode(display=False) as counter:
            encode(given)
        found[name] = counter.get_total_flops()
    return found


def counts() -> list[dict[str, Any]]:
    """A row for every size, type and way."""
    rows = []
    for size, checkpointing in itertools.product(SIZES, (False, True)):
        work = flops(size, checkpointing=checkpointing)
        for dtype in DTYPES:
            few, more = (memory(size, batch, dtype, checkpointing=checkpointing) for batch in BATCHES)
            row = {"size": size, "dtype": dtype, "checkpointing": checkpointing, "flops": work, "bytes": {}}
            for name in ("kept", "forward", "backward"):
                each = (getattr(more, name) - getattr(few, name)) // (BATCHES[1] - BATCHES[0])
                row["bytes"][name] = {"fixed": getattr(few, name) - BATCHES[0] * each, "each": each}
            rows.append(row)
            print(line(rows[-1]), flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    work = " + ".join(f"{flops / 1e12:.3f}" for flops in row["flops"].values())
    parts = [f"{name} {part['fixed'] / 1e9:.2f} + {part['each'] / 1e9:.3f} GB" for name, part in row["bytes"].items()]
    return f"{row['size']} px {row['dtype']:<9}{'recomputing' * row['checkpointing']:<13}{work} TFLOP; {', '.join(parts)}"


def measured(size: int, *, dtype: str, checkpointing: bool, rounds: int, unet: UNet) -> dict[str, Any]:
    """Of a forward and a backward pass over one picture on this CPU: seconds on the clock, those that its processors spent on
    it (which other work does not lengthen much), and the rate for either."""
    processes = Processes(rank=0, count=1, device=torch.device("cpu"))
    loss_of = DenoisingLoss(unet, ScheduleConfig(), 0.0)
    unet.checkpoint_gradients(checkpointing)
    x0, noise = torch.randn(2, 1, 4, size // 8, size // 8)
    t, context, seconds, busy = torch.tensor([500]), torch.randn(1, TOKENS, 768), [], []
    for _ in range(rounds + 1):
        start, begun = time.perf_counter(), time.process_time()
        with processes.precision(dtype), processes.attention():
            loss = loss_of(x0, t, noise, context)
        loss.backward()
        seconds.append(time.perf_counter() - start)
        busy.append(time.process_time() - begun)
    work = sum(flops(size, checkpointing=checkpointing).values())
    middle, spent = statistics.median(seconds[1:]), statistics.median(busy[1:])
    rates = {"TFLOP/s": work / middle / 1e12, "TFLOP a processor's second": work / spent / 1e12}
    told = f"{middle:.1f} s, {spent:.1f} of processors, {', '.join(f'{rate:.4f} {name}' for name, rate in rates.items())}"
    print(f"{size} px {dtype}{', recomputing' * checkpointing}: {told}", flush=True)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    about = {"size": size, "dtype": dtype, "checkpointing": checkpointing, "flops": work, **rates}
    return {**about, "seconds": seconds[1:], "processor seconds": busy[1:], "resident GB at most": resident}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count-only", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with torch.device("meta"):
        parameters = sum(p.numel() for p in UNet(UNetConfig()).parameters())
    state = {"parameters": parameters, "bytes": dict.fromkeys(("weights", "gradients", "average"), 4 * parameters)}
    state["bytes"]["AdamW"] = 8 * parameters
    found = {"machine": machine(), "state": state, "encoders": {size: encoders(size) for size in SIZES}, "counted": counts()}
    if not options.count_only:
        torch.manual_seed(0)
        unet, found["measured"] = UNet(UNetConfig()), []
        for size, dtype, checkpointing in MEASURED:
            case = {"dtype": dtype, "checkpointing": checkpointing, "rounds": options.rounds}
            found["measured"].append(measured(size, unet=unet, **case))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
