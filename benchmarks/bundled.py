"""A picture of the bundled model, 25 DDIM steps, beside diffusers' and transformers' classes with the same weights.

    python -m benchmarks.bundled [--json FILE]

All in one process and in turns; from the prompt's tokens to the picture. `processes` are whole ones, from the command line.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import ldm
from benchmarks.load import machine
from ldm import images
from ldm.fast import accelerate
from ldm.numerics import peers

PROMPT = "a red cube on top of a blue sphere"
STEPS, GUIDANCE = 25, 3.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = ldm.load()
    fields = {"steps": STEPS, "sampler": "ddim", "guidance_scale": GUIDANCE, "seed": 1}
    theirs = Diffusers(model)
    ways = {
        "diffusers": theirs,
        "diffusers, channels_last": theirs.channels_last,
        "ldm, as it is read": lambda: ldm.txt2img(model, PROMPT, **fields).images[0],
    }
    seconds = measured(ways, options.rounds)
    fast = accelerate(model)  # from here on the process keeps its pages, the peers' too
    ways["ldm, accelerated"] = lambda: ldm.txt2img(fast, PROMPT, **fields).images[0]
    kept = measured(ways, options.rounds)
    with tempfile.TemporaryDirectory() as folder:
        processes = {
            "ldm txt2img": process("-m", "ldm", "txt2img", PROMPT, "--out", folder, "-q"),
            "ldm txt2img --fast": process("-m", "ldm", "txt2img", PROMPT, "--out", folder, "-q", "--fast"),
        }
    found = {"seconds": seconds, "seconds, pages kept": kept, "processes": processes}
    for title, values in found.items():
        print(title)
        for name, value in values.items():
            print(f"    {name:<30}{value:>8.3f}")
    best = min(value for values in (seconds, kept) for name, value in values.items() if name.startswith("diffusers"))
    print(f"the quickest of diffusers takes {best / kept['ldm, accelerated']:.2f} times as long as ours accelerated")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **found}, indent=2) + "\n")


class Diffusers:
    """Their loop over their modules with our weights."""

    def __init__(self, model):
        from diffusers import DDIMScheduler

        self.model = model
        self.parts = peers.builder(lambda dtype: model)(torch.float32)
        self.others = peers.builder(lambda dtype: model)(torch.float32)
        for kind in ("unet", "autoencoder"):
            self.others[kind].to(memory_format=torch.channels_last)
        self.scheduler = DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, set_alpha_to_one=False
        )

    def __call__(self):
        return self._picture(self.parts)

    def channels_last(self):
        return self._picture(self.others)

    @torch.no_grad()
    def _picture(self, parts):
        model, scheduler, random = self.model, self.scheduler, torch.Generator().manual_seed(1)
        ids = torch.cat([model.tokenizer(text).ids for text in ("", PROMPT)])
        context = parts["text_encoder"](ids)[0]
        side = model.unet.config.sample_size
        x = torch.randn(1, 4, side, side, generator=random)
        scheduler.set_timesteps(STEPS)
        for t in scheduler.timesteps:
            uncond, cond = parts["unet"](torch.cat([x, x]), t, encoder_hidden_states=context, return_dict=False)[0].chunk(2)
            x = scheduler.step(uncond + GUIDANCE * (cond - uncond), t, x, return_dict=False)[0]
        pixels = parts["autoencoder"].decode(x / model.autoencoder.config.scaling_factor, return_dict=False)[0]
        return images.to_images(pixels)[0]


def measured(ways: dict, rounds: int) -> dict[str, float]:
    for way in ways.values():
        way()
    seconds = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def process(*arguments: str) -> float:
    """Seconds of a whole one, the median of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
