"""What a trace costs: text to image with and without a trace of all blocks' outputs written to disk, in one run.

    python -m benchmarks.trace                     # Stable Diffusion v1's sizes, random weights, 50 steps, 512 x 512
    python -m benchmarks.trace --model tiny --size 64

Prints time, the highest memory and the size on disk, and writes benchmarks/results/trace.json. The run without comes first, so
that what the second adds to the highest memory is the trace's.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path

import torch

import ldm
from ldm.numerics.runs import trace_txt2img
from ldm.numerics.traces import Trace
from ldm.numerics.tracing import BLOCKS

RESULTS = Path(__file__).parent / "results" / "trace.json"
MIB = 2**20


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="sd-v1", help="a preset, with random weights (default sd-v1)")
    options.add_argument("--steps", type=int, default=50)
    options.add_argument("--size", type=int, default=512, metavar="PIXELS")
    options.add_argument("--out", type=Path, default=RESULTS, metavar="FILE")
    args = options.parse_args()
    model = ldm.build(args.model, seed=0)
    fields = {"prompt": "a red cube", "width": args.size, "height": args.size, "seed": 1}
    ldm.txt2img(model, steps=1, **fields)  # what is set up once
    folder = Path(tempfile.mkdtemp(prefix="ldm-trace-"))
    try:
        plain = measured(lambda: ldm.txt2img(model, steps=args.steps, **fields))
        only = (*BLOCKS, "sampler.*", "picture")
        traced = measured(lambda: trace_txt2img(model, path=folder / "run.trace", only=only, steps=args.steps, **fields))
        trace = Trace(folder / "run.trace")
        size = sum(file.stat().st_size for file in (folder / "run.trace").iterdir())
        found = {
            **{"model": args.model, "steps": args.steps, "size": args.size, "torch": torch.__version__},
            **{"threads": torch.get_num_threads(), "seconds_without": plain[0], "seconds_with": traced[0]},
            **{"time_ratio": traced[0] / plain[0], "memory_added_mib": (traced[1] - plain[1]) / MIB},
            **{"memory_without_mib": plain[1] / MIB, "tensors": len(trace.keys), "disk_mib": size / MIB},
        }
    finally:
        shutil.rmtree(folder)
    for name, value in found.items():
        print(f"{name:<20}{value:>14.3f}" if isinstance(value, float) else f"{name:<20}{value!s:>14}")
    args.out.write_text(json.dumps(found, indent=2) + "\n")


def measured(run) -> tuple[float, int]:
    """Seconds, and the highest memory of the process until then, in bytes."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
