"""Known answers: numbers that the real Stable Diffusion v1 checkpoints are published to give, and whether a model gives them.

The figures (`known_answers.json`) are those of diffusers' integration tests, computed there on other hardware. They hold for
the real weights alone. No test here has those: what the tests prove is the protocol, which on random weights gives what
diffusers gives (`tests/test_known_answers.py`).
"""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ldm.checkpoint import Components
from ldm.diffusion.schedule import sigmas
from ldm.models.unet import UNet, up_rows
from ldm.pipelines import autoencoding
from ldm.pipelines.run import prepare
from weights_convert.known_files import KNOWN

VERSIONS = ("v1-1", "v1-2", "v1-3", "v1-4", "v1-5")
CALLED = re.compile(r"(?:stable-diffusion-v-?|sd-v)(1-[1-5])(?!\d)", re.IGNORECASE)
SAMPLERS = {"pndm": "pndm", "ddim": "ddim", "lms": "lms", "dpm++ 2m": "dpmpp_2m"}  # by how the figures' own words begin


@dataclass(frozen=True)
class Case:
    """A published answer. after_call: of the latents after that callback of diffusers' rather than of the picture. freeu: the
    scales s1, s2, b1, b2. smallest_sigma: whether the last step ends at the schedule's smallest sigma, not at 0."""

    name: str
    version: str
    sampler: str
    steps: int
    dtype: torch.dtype
    values: tuple[float, ...]
    tolerance: float
    after_call: int | None = None
    freeu: Mapping[str, float] | None = None
    smallest_sigma: bool = False


@dataclass(frozen=True)
class Answer:
    """verdict: "pass", "fail" or "not applicable"; why: in words."""

    case: Case
    verdict: str
    why: str


@dataclass(frozen=True)
class Recognised:
    """version: "v1-4", or None for none of the known. certain: whether a hash tells, and not a name. how: in words."""

    version: str | None
    certain: bool
    how: str


def protocol() -> dict[str, Any]:
    return json.loads(files("ldm.numerics").joinpath("known_answers.json").read_text())["protocol"]


def cases() -> list[Case]:
    """All that are known."""
    text = json.loads(files("ldm.numerics").joinpath("known_answers.json").read_text())
    return [_case(entry, text["protocol"]["steps"]) for entry in text["cases"]]


def _case(entry: Mapping[str, Any], steps: int) -> Case:
    return Case(
        name=entry["name"],
        version=entry["checkpoint"].removeprefix("CompVis/stable-diffusion-"),
        sampler=next(ours for words, ours in SAMPLERS.items() if entry["sampler"].startswith(words)),
        steps=entry.get("steps", steps),
        dtype=getattr(torch, entry.get("dtype", "float32")),
        values=tuple(entry["values"]),
        tolerance=entry["tolerance"],
        after_call=entry.get("after_callback_step"),
        freeu=entry.get("freeu"),
        smallest_sigma="sigma_min" in entry["sampler"],
    )


# -- Which model it is -----------------------------------------------------------------------------------------------------


def recognise(source: str | Path) -> Recognised:
    """Tell a published checkpoint by its file's hash; or, of what was converted from one, by what it calls itself."""
    path = Path(source).expanduser()
    if path.is_file():
        import hashlib

        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 in KNOWN:
            return Recognised(KNOWN[sha256].version, True, f"its SHA-256 is that of {KNOWN[sha256].name}")
    names = [(f"it is called {path.name}", path.name)]
    for file in ("model_index.json", "unet/config.json"):
        try:
            said = json.loads((path / file).read_bytes()).get("_name_or_path")
        except (OSError, ValueError, AttributeError):
            continue
        names.append((f"{file} says that it came from {said}", str(said)))
    for how, name in names:
        if found := CALLED.search(name):
            return Recognised(f"v{found[1]}", False, f"{how}; its numbers prove or refute it")
    return Recognised(None, False, "neither its hash nor what it calls itself is of a published checkpoint")


# -- What it answers -------------------------------------------------------------------------------------------------------


def verify(components: Components, recognised: Recognised) -> Iterator[Answer]:
    """Every case in turn, with its verdict."""
    dtype = components.unet.conv_in.weight.dtype
    for case in cases():
        if recognised.version != case.version:
            of = "a model that is not known" if recognised.version is None else recognised.version
            yield Answer(case, "not applicable", f"published for {case.version}; this is {of}")
        elif dtype != case.dtype:
            wanted = str(case.dtype).removeprefix("torch.")
            yield Answer(case, "not applicable", f"published for {wanted}; load the model with --dtype {wanted}")
        else:
            found = answer(components, case)
            apart = max(abs(a - b) for a, b in zip(found, case.values, strict=True))
            verdict = "pass" if apart <= case.tolerance else "fail"
            yield Answer(case, verdict, f"largest difference {apart:.2g}, tolerance {case.tolerance:g}")


@torch.no_grad()
def answer(components: Components, case: Case, *, size: int | None = None, seed: int = 0) -> list[float]:
    """What a model gives: nine numbers, of the picture in [0, 1] or of the latents. size: of the picture, 512 if left out."""
    result = whole(components, case, size=size, seed=seed)
    return result[0, -3:, -3:, -1].flatten().tolist()


@torch.no_grad()
def whole(components: Components, case: Case, *, size: int | None = None, seed: int = 0) -> Tensor:
    """The tensor that the nine numbers are cut out of: the picture (1, H, W, 3) in [0, 1], or the latents (1, 4, h, w)."""
    stated = protocol()
    side = stated["height"] if size is None else size
    fields = {"guidance_scale": stated["guidance_scale"], "steps": case.steps, "sampler": case.sampler, "seed": 0}
    run = prepare(components, stated["prompt"], (side, side), fields | {"convention": "diffusers", "safety": "off"})
    grid = run.grid
    if case.smallest_sigma:
        last = replace(grid.steps[-1], next_sigma=float(sigmas(components.schedule)[0]))
        grid = replace(grid, steps=(*grid.steps[:-1], last))
    noise = np.random.RandomState(seed).standard_normal((1, *run.latent_shape))
    noise = torch.from_numpy(noise).to(components.unet.conv_in.weight.dtype)  # cast as the figures' own were
    seen: list[Tensor] = []

    def after_step(x: Tensor, info: Any) -> Tensor:
        seen.append(x)
        return x

    (batch,) = run.batches()
    with freeu(components.unet, **case.freeu) if case.freeu else nullcontext():
        x = run.sample(batch, grid.noise_scale * run.start(batch, noise), grid, after_step)
    if case.after_call is not None:  # diffusers counts PNDM's trial as a step of its own
        return seen[case.after_call - 1]
    pixels = autoencoding.decode(components.autoencoder, x)
    return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


@contextmanager
def freeu(unet: UNet, *, s1: float, s2: float, b1: float, b2: float) -> Iterator[None]:
    """FreeU while it holds (Si et al. 2023, arXiv:2309.11497, section 3.3): on the two coarsest levels of the way up, the first
    half of the features is multiplied by b, and the low frequencies of the skip connection by s."""
    rows, hooks = up_rows(unet.config), []
    coarsest = max(row.level for row in rows)
    scales = {coarsest: (b1, s1), coarsest - 1: (b2, s2)}
    for row, block in zip(rows, unet.up, strict=True):
        if row.level not in scales:
            continue
        backbone, skip = scales[row.level]

        def change(_: Any, args: tuple, width: int = row.in_channels, b: float = backbone, s: float = skip) -> tuple:
            x, kept = args[0].split([width, args[0].shape[1] - width], dim=1)
            x = torch.cat([x[:, : width // 2] * b, x[:, width // 2 :], _damped(kept, s)], dim=1)
            return (x, *args[1:])

        hooks.append(block.register_forward_pre_hook(change))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _damped(x: Tensor, scale: float) -> Tensor:
    """x with its lowest frequencies, those of the middle 2 x 2 of the shifted spectrum, times `scale` (eq. 7)."""
    spectrum = torch.fft.fftshift(torch.fft.fftn(x.float(), dim=(-2, -1)), dim=(-2, -1))
    h, w = (side // 2 for side in x.shape[-2:])
    mask = torch.ones_like(spectrum.real)
    mask[..., h - 1 : h + 1, w - 1 : w + 1] = scale
    damped = torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1))
    return damped.real.to(x.dtype)
