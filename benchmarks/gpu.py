"""How long things take on a GPU, rung by rung, beside diffusers, in one process: `python -m benchmarks.gpu [--json FILE]`.

Stable Diffusion v1's sizes with random weights, 512 x 512, guidance on, float16. A call is one guided step; times are CUDA
events', median and 90th percentile, at batches of 1, 4 and 16 pictures. `picture` is text to image at batch 1: 50 DDIM steps
with decoding and without a safety checker, from the call to the picture in the host's memory. `peak GB` is what tensors took at
the most once the model was loaded, `reserved GB` with what the allocator held beside them. Nothing is in float32, but what
would be is said: whether convolutions and products may round to TF32, which is as torch has it.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import contenders
from benchmarks.load import machine, make_model

BATCHES = (1, 4, 16)
TFLOP = 1.607  # of a guided step of one picture


class Rung(contenders.LdmFast):
    def __init__(self, options: dict, *given):
        super().__init__(*given)
        self.accelerated = options


class Compiled(contenders.Diffusers):
    """diffusers as its documentation has it quickest."""

    channels_last = True

    def load(self) -> None:
        super().load()
        self.pipe.unet = torch.compile(self.pipe.unet, mode="max-autotune", fullgraph=True)
        self.pipe.vae.decode = torch.compile(self.pipe.vae.decode, mode="max-autotune", fullgraph=True)


LADDER: dict[str, Callable] = {
    "diffusers": contenders.Diffusers,
    "diffusers, channels_last": contenders.DiffusersChannelsLast,
    "diffusers, channels_last, compiled": Compiled,
    "ldm, as it is read": contenders.Ldm,
    "ldm, rewritten": lambda *given: Rung({"kernels": False, "graph": False}, *given),
    "ldm, + Triton and chosen attention": lambda *given: Rung({"graph": False}, *given),
    "ldm, + graph": lambda *given: Rung({}, *given),
    "ldm, rewritten, compiled, in a graph": lambda *given: Rung({"compile": True}, *given),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a full-size diffusers folder; default: make one of random weights")
    parser.add_argument("--only", nargs="+", choices=LADDER, default=list(LADDER), metavar="NAME")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("there is no GPU here; for a CPU: python -m benchmarks.speed")
    torch.set_grad_enabled(False)
    may = {"convolutions": torch.backends.cudnn.allow_tf32, "products": torch.backends.cuda.matmul.allow_tf32}
    print("TF32 in float32's " + ", ".join(f"{kind}: {'yes' if allowed else 'no'}" for kind, allowed in may.items()))
    found = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.model or make_model(Path(temporary))
        for name in options.only:
            found[name] = measured(LADDER[name](folder, "float16", "cuda"), options.steps)
            print(f"{name:<40}" + "".join(f"{key} {value:.2f}  " for key, value in found[name].items()), flush=True)
            if options.json:
                about = {"device": torch.cuda.get_device_name(), "machine": machine(), "steps": options.steps, "tf32": may}
                options.json.write_text(json.dumps({**about, "milliseconds": found}, indent=2) + "\n")


def measured(contender, steps: int) -> dict[str, float]:
    """Milliseconds of everything, and GB of the device's memory at the highest, without what loading and earlier rungs took."""
    torch._dynamo.reset()  # which holds on to what it compiled
    let_go()
    contender.load()
    let_go()
    torch.cuda.reset_peak_memory_stats()
    contender.prepare()
    found = {}
    for batch in BATCHES:
        contender.widen(batch)
        found |= events(f"step, batch {batch}", contender.unet)
        found[f"share of 800 TFLOP/s, batch {batch}"] = TFLOP * batch / found[f"step, batch {batch}"] / 0.8
    contender.widen(1)
    found |= events("decode", contender.decode)
    contender.picture(steps)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        contender.picture(steps)
        seconds.append(time.perf_counter() - start)
    peaks = {"peak GB": torch.cuda.max_memory_allocated() / 1e9, "reserved GB": torch.cuda.max_memory_reserved() / 1e9}
    return {**found, "picture": 1000 * statistics.median(seconds), **peaks}


def let_go() -> None:
    """Of the device's memory that nothing needs any more."""
    gc.collect()
    torch.cuda.empty_cache()


def events(name: str, call: Callable[[], object], count: int = 30) -> dict[str, float]:
    for _ in range(5):
        call()
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for begin, end in marks:
        begin.record()
        call()
        end.record()
    torch.cuda.synchronize()
    milliseconds = sorted(begin.elapsed_time(end) for begin, end in marks)
    return {name: statistics.median(milliseconds), f"{name}, p90": milliseconds[int(0.9 * count)]}


if __name__ == "__main__":
    main()
