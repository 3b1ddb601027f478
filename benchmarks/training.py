"""Training speed, lever by lever, beside diffusers' UNet trained as its example does: pictures a second.

    python -m benchmarks.training                              # the bundled model's sizes
    python -m benchmarks.training --model sd-v1 --batch 16     # Stable Diffusion v1's, 512 x 512: for a GPU

One process, the ways in turn, random weights and pictures. A step is all of it: noise, forward and backward pass, optimiser,
moving average; without the cache also text encoder and autoencoder. `floor` is the arithmetic of a cached step at the best rate
of a matrix product or a convolution of the quickest type, measured in the same run.
"""

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import ldm
from benchmarks.ceilings import ceilings
from benchmarks.load import machine
from ldm.checkpoint import Components
from ldm.diffusion.schedule import alpha_bar
from ldm.models.unet import UNet
from ldm.numerics import peers
from ldm.processes import Processes
from ldm.training.denoising import DenoisingLoss
from ldm.training.optimiser import MovingAverage, Optimiser, OptimiserConfig


@dataclass(frozen=True, kw_only=True)
class Levers:
    cached: bool = False  # latents and text states from before
    fused: bool = False  # AdamW and moving average in a few kernels for all weights
    measured: bool = False  # layout and attention as `Processes` found them quicker
    dtype: str = "float32"
    compile: bool = False


LADDER = {
    "ldm, plainly": Levers(),
    "+ cached latents and texts": Levers(cached=True),
    "+ fused AdamW, foreach EMA": Levers(cached=True, fused=True),
    "+ measured layout and attention": Levers(cached=True, fused=True, measured=True),
    "+ bfloat16 autocast": Levers(cached=True, fused=True, measured=True, dtype="bfloat16"),
    "+ compiled": Levers(cached=True, fused=True, measured=True, dtype="bfloat16", compile=True),
    "float32, compiled": Levers(cached=True, fused=True, measured=True, compile=True),
}


class Batch:
    """What every way is given."""

    def __init__(self, model: Components, size: int, device: torch.device):
        self.size, self.device, self.model = size, device, model
        side, factor = model.unet.config.sample_size, model.autoencoder.config.downsampling
        random = torch.Generator().manual_seed(0)
        self.pictures = torch.rand(size, 3, side * factor, side * factor, generator=random).to(device) * 2 - 1
        self.ids = torch.cat([model.tokenizer(f"picture {i}").ids for i in range(size)]).to(device)
        self.noise = torch.randn(size, 4, side, side, generator=random).to(device)
        self.t = torch.randint(1000, (size,), generator=random).to(device)
        self.encoded = self.encode()

    @torch.no_grad()
    def encode(self) -> tuple[torch.Tensor, torch.Tensor]:
        model = self.model
        latents = model.autoencoder.encode(self.pictures).sample(self.noise) * model.autoencoder.config.scaling_factor
        return latents, model.text_encoder(self.ids)


def ours(batch: Batch, levers: Levers) -> Callable[[], None]:
    processes = Processes(rank=0, count=1, device=batch.device)
    unet = UNet(batch.model.unet.config).to(batch.device, memory_format=processes.layout if levers.measured else None)
    loss_of = DenoisingLoss(unet, batch.model.schedule, 0.0)
    if levers.compile:
        loss_of = torch.compile(loss_of)
    optimiser, average = Optimiser(unet, OptimiserConfig(), 10**6), MovingAverage(unet, 0.9999)
    plain = torch.optim.AdamW(unet.parameters(), 1e-4, foreach=False)

    def step() -> None:
        latents, context = batch.encoded if levers.cached else batch.encode()
        attention = processes.attention() if levers.measured else nullcontext()
        with processes.precision(levers.dtype), attention:
            loss = loss_of(latents, batch.t, batch.noise, context)
        loss.backward()
        if levers.fused:
            optimiser.step(0)
            average.update(0)
            return
        plain.step()
        plain.zero_grad()
        with torch.no_grad():
            for name, parameter in average.current.items():
                average.average[name].lerp_(parameter, 1e-4)

    return step


def diffusers(batch: Batch, *, cached: bool) -> Callable[[], None] | None:
    """Its modules in the loop of its examples; None where it is not installed."""
    fresh = dataclasses.replace(batch.model, unet=UNet(batch.model.unet.config).to(batch.device))
    build = peers.builder(lambda dtype: fresh)
    if build is None:
        return None
    from diffusers.training_utils import EMAModel

    unet = build(torch.float32)["unet"].train()
    optimiser, average = torch.optim.AdamW(unet.parameters(), 1e-4), EMAModel(unet.parameters(), decay=0.9999)
    remaining = alpha_bar(batch.model.schedule).float().to(batch.device)

    def step() -> None:
        latents, context = batch.encoded if cached else batch.encode()
        kept = remaining[batch.t][:, None, None, None]
        x = kept.sqrt() * latents + (1 - kept).sqrt() * batch.noise
        F.mse_loss(unet(x, batch.t, encoder_hidden_states=context, return_dict=False)[0], batch.noise).backward()
        optimiser.step()
        optimiser.zero_grad()
        average.step(unet.parameters())

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="bundled", help="bundled, or a preset (default bundled)")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=LADDER, default=list(LADDER), metavar="NAME")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = ldm.load(device=device) if options.model == "bundled" else ldm.build(options.model, seed=0, device=device)
    batch = Batch(model, options.batch, device)
    ways = {f"diffusers{', cached' * cached}": diffusers(batch, cached=cached) for cached in (False, True)}
    chosen = [name for name in options.only if has_bfloat16(device) or LADDER[name].dtype != "bfloat16"]
    ways |= {name: ours(batch, LADDER[name]) for name in chosen}
    seconds: dict[str, list[float]] = {name: [] for name, way in ways.items() if way}
    for name in seconds:
        start = time.perf_counter()
        timed(ways[name], device)
        print(f"{name}: first step {time.perf_counter() - start:.1f} s", flush=True)
    for _ in range(options.rounds):
        for name, values in seconds.items():
            values.append(timed(ways[name], device))
    rates = {name: options.batch / statistics.median(values) for name, values in seconds.items()}
    types = [torch.float32, torch.bfloat16] if has_bfloat16(device) else [torch.float32]
    found = [ceilings(dtype, device) for dtype in types]
    best = max(one[kind] for one in found for kind in ("matmul", "convolution"))
    with FlopCounterMode(display=False) as counter:
        ours(batch, LADDER["+ cached latents and texts"])()
    floor = best * 1e12 / (counter.get_total_flops() / options.batch)
    for name, rate in rates.items():
        print(f"{name:<36}{rate:>9.2f} pictures a second {rate / floor:>7.1%} of the floor")
    print(f"{'floor':<36}{floor:>9.2f} at {best:.2f} TFLOP/s")
    if options.json:
        found = {"machine": machine(), "model": options.model, "batch": options.batch, "device": str(device)}
        options.json.write_text(json.dumps({**found, "pictures a second": rates, "floor": floor}, indent=2) + "\n")


def has_bfloat16(device: torch.device) -> bool:
    """Whether it computes in bfloat16, rather than making as if: then a step takes minutes."""
    return device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def timed(step: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
