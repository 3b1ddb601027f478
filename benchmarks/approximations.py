"""What the approximations gain, and how far their pictures are from the exact ones.

    python -m benchmarks.approximations [--model FOLDER] [--count 100] [--steps 25] [--json FILE]

Each is compared with the accelerated model's own pictures of the same prompts and seeds, in one process.

    speed   how many times as many pictures in the same time, one at a time, in turns with exact ones (medians)
    rms     root of the mean square difference of the pictures' values, of 255
    PSNR    of the same, in decibels
    right   with the bundled model: pictures that show what their prompt says, by the judge, with Wilson's 95 % interval

`another seed` is the distance between two pictures that have nothing but the prompt in common, `bfloat16` what that type's
rounding does. With random weights the distances say nothing; the speed is as with real ones.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ldm
from benchmarks.load import machine
from ldm import images
from ldm.checkpoint import bundled_folder
from ldm.evaluation import composition
from ldm.fast import accelerate
from ldm.scenes import judge

# What `accelerate` is told, and what the pipeline is.
WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "exact": ({}, {}),
    "bfloat16": ({"dtype": torch.bfloat16}, {}),
    "guidance above t = 250": ({}, {"guidance_interval": (250, 1000)}),
    "guidance between t = 250 and 750": ({}, {"guidance_interval": (250, 750)}),
    "cache_steps 2": ({"cache_steps": 2}, {}),
    "cache_steps 3": ({"cache_steps": 3}, {}),
    "cache_steps 5": ({"cache_steps": 5}, {}),
    "merge_tokens 0.5": ({"merge_tokens": 0.5}, {}),
    "cache_steps 3, merge_tokens 0.5": ({"cache_steps": 3, "merge_tokens": 0.5}, {}),
    "10 steps of DPM-Solver++": ({}, {"sampler": "dpmpp_2m", "steps": 10}),
    "6 steps of DPM-Solver++": ({}, {"sampler": "dpmpp_2m", "steps": 6}),
    "another seed": ({}, {"seed": 1_000_000}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="default: the bundled model")
    parser.add_argument("--count", type=int, default=100, help="prompts, each a picture")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--rounds", type=int, default=5, help="pictures that are timed")
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="NAME")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    plain = ldm.load(options.model) if options.model else ldm.load()
    cases = composition.cases("seen", options.count)
    referee = None if options.model else judge.load(bundled_folder() / "judge.safetensors")
    found: dict[str, dict[str, Any]] = {}
    prompts = [case.prompt for case in cases]
    common = {"sampler": "ddim", "steps": options.steps, "seed": 0, "safety": "off"}
    exact, expected = accelerate(plain), []
    for name in dict.fromkeys(["exact", *options.only]):
        told, of = WAYS[name]
        model = accelerate(plain, **told) if told else exact
        fields = common | of
        ways = [(exact, common), (model, fields)]
        seconds = timed(ways, prompts[0], options.rounds)
        made = ldm.txt2img(model, prompts, batch_size=50 if referee else 1, **fields).images
        expected = expected or made
        found[name] = {"speed": seconds[0] / seconds[1], "seconds": seconds[1], **distance(made, expected)}
        if referee:
            said = judge.verdicts(referee, torch.cat([images.to_tensor(picture, picture.size) for picture in made]))
            score = composition.score([case.statement for case in cases], said)
            found[name] |= {"right": score.accuracy(), "interval": score.interval()}
        print(row(name, found[name]), flush=True)
        if options.json:
            about = {"machine": machine(), "model": plain.name, "count": options.count, "steps": options.steps}
            options.json.write_text(json.dumps({**about, "ways": found}, indent=2) + "\n")


def timed(ways: list[tuple], prompt: str, rounds: int) -> list[float]:
    """Seconds of one picture in each of the ways (model, fields), the median, in turns."""
    seconds: list[list[float]] = [[] for _ in ways]
    for i in range(rounds + 1):
        for (model, fields), so_far in zip(ways, seconds, strict=True):
            start = time.perf_counter()
            ldm.txt2img(model, prompt, **fields)
            if i > 0:  # the first is to warm up
                so_far.append(time.perf_counter() - start)
    return [statistics.median(so_far) for so_far in seconds]


def distance(made: list, exact: list) -> dict[str, float]:
    """Of two lists of pictures; without a PSNR where they are the same."""
    squares = [
        np.mean((np.asarray(one, dtype=np.float64) - np.asarray(other, dtype=np.float64)) ** 2)
        for one, other in zip(made, exact, strict=True)
    ]
    mean = float(np.mean(squares))
    return {"rms": math.sqrt(mean)} | ({"psnr": 10 * math.log10(255**2 / mean)} if mean else {})


def row(name: str, found: dict[str, Any]) -> str:
    line = f"{name:<36}{found['speed']:>6.2f} x  rms {found['rms']:>6.2f}  PSNR {found.get('psnr', math.inf):>5.1f} dB"
    if "right" in found:
        line += "  right {:.1%} ({:.1%} to {:.1%})".format(found["right"], *found["interval"])
    return line


if __name__ == "__main__":
    main()
