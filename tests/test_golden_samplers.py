"""Samplers against k-diffusion and CompVis/stable-diffusion: the latents after every step, as these computed them once, in
float64, with the same stand-in for a network. Nothing of theirs need be installed.

Made by `tests/references/make_samplers.py`; commits, and what each tensor is, in `tests/references/manifest.json`.
"""

import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ldm.diffusion.conventions import from_image, make_grid
from ldm.diffusion.grid import noise_std, signal
from ldm.diffusion.schedule import ScheduleConfig
from ldm.samplers import all_samplers
from tests.measure import relative_error
from tests.references.make_samplers import network

FILE = Path(__file__).parent / "references" / "samplers.safetensors"
TOLERANCE = 1e-9
COMPVIS = {"ddim": ("ddim", {}), "ddim_eta_1": ("ddim", {"eta": 1.0}), "plms": ("pndm", {})}
SPACINGS = {"default": None, "karras": "karras", "exponential": "exponential"}

with safe_open(FILE, "pt") as opened:
    NAMES = tuple(opened.keys())


def cases(pattern):
    """What the groups of `pattern` matched, for every tensor of that name."""
    found = [match.groups() for match in (re.fullmatch(pattern, name) for name in NAMES) if match]
    return sorted(found, key=lambda groups: [int(g) if g.isdigit() else g for g in groups[::-1]])


K_CASES = cases(r"kdiffusion/(\w+)/(\d+)/((?!sigmas)\w+)")
COMPVIS_CASES = cases(r"compvis/(ddim|ddim_eta_1|plms)/(\d+)")
IMAGE_CASES = cases(r"compvis/img2img/(\d+)/([\d.]+)")


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(FILE)


def run(sampler, x, grid, draws, **options):
    """x after every step, and the timesteps that the network was told."""
    trace, timesteps, turn = [], [], iter(draws)

    def model(x, t):
        timesteps.append(t)
        return network(x, t)

    def keep(x, info):
        trace.append(x)
        return x

    all_samplers()[sampler].sample(model, x, grid, noise=lambda: next(turn), after_step=keep, **options)
    return torch.stack(trace), torch.tensor(timesteps, dtype=torch.float64)


def compare(found, timesteps, golden, name):
    assert relative_error(timesteps, golden[f"{name}/timesteps"]) < TOLERANCE
    assert len(found) == len(golden[name])
    for i, (a, b) in enumerate(zip(found, golden[name], strict=True)):
        assert relative_error(a, b) < TOLERANCE, f"step {i} of {len(found)}"


# -- k-diffusion


def k_grid(spacing, steps, sampler):
    return make_grid(ScheduleConfig(), int(steps), sampler, convention="kdiffusion", spacing=SPACINGS[spacing])


@pytest.mark.parametrize(("spacing", "steps", "sampler"), K_CASES)
def test_every_step_is_k_diffusions(golden, spacing, steps, sampler):
    """x and the timesteps, in order, of every call; k-diffusion keeps x / signal."""
    grid = k_grid(spacing, steps, sampler)
    found, timesteps = run(sampler, golden["x_T"] * grid.noise_scale, grid, golden["noise"])
    in_data_units = torch.stack([x / signal(step.next_sigma) for x, step in zip(found, grid, strict=True)])
    compare(in_data_units, timesteps, golden, f"kdiffusion/{spacing}/{steps}/{sampler}")


@pytest.mark.parametrize(("spacing", "steps"), cases(r"kdiffusion/(\w+)/(\d+)/sigmas"))
def test_every_sigma_is_k_diffusions(golden, spacing, steps):
    sigmas = golden[f"kdiffusion/{spacing}/{steps}/sigmas"]
    for sampler in {sampler for *_, sampler in K_CASES}:
        grid = k_grid(spacing, steps, sampler)
        ours = [*(step.sigma for step in grid), grid.steps[-1].next_sigma]
        assert ours == pytest.approx(sigmas.tolist(), rel=TOLERANCE, abs=0)
        assert grid.noise_scale == pytest.approx(float(sigmas[0]) * signal(grid.start_sigma), rel=TOLERANCE)


# -- CompVis


def compvis_grid(steps, sampler):
    return make_grid(ScheduleConfig(), int(steps), sampler, convention="compvis")


@pytest.mark.parametrize(("method", "steps"), COMPVIS_CASES)
def test_every_step_is_compviss(golden, method, steps):
    sampler, options = COMPVIS[method]
    found, timesteps = run(sampler, golden["x_T"], compvis_grid(steps, sampler), golden["noise"], **options)
    compare(found, timesteps, golden, f"compvis/{method}/{steps}")


@pytest.mark.parametrize(("steps", "strength"), IMAGE_CASES)
def test_every_step_of_image_to_image_is_compviss(golden, steps, strength):
    """From the noised image on, at int(S x strength) of the S steps asked for, whatever number the grid has."""
    name, whole = f"compvis/img2img/{steps}/{strength}", compvis_grid(steps, "ddim")
    grid = from_image(whole, float(strength), "ddim", convention="compvis", steps=int(steps))
    start = signal(grid.start_sigma) * golden["image"] + noise_std(grid.start_sigma) * golden["noise"][0]
    assert relative_error(start, golden[f"{name}/start"]) < TOLERANCE
    compare(*run("ddim", start, grid, []), golden, name)


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_compvis_runs_as_many_steps_as_it_did_and_raises_where_it_did(golden, sampler):
    for steps, count in enumerate(golden["compvis/steps_run"].tolist(), start=1):
        if count == 0:
            with pytest.raises(ValueError, match=f"CompVis's grid has no {steps} steps"):
                compvis_grid(steps, sampler)
        else:
            assert len(compvis_grid(steps, sampler)) == count


def test_inpainting_was_recorded_as_the_manifest_says(golden):
    """The trajectory is for a test of the pipeline; here, that what was recorded fits together."""
    told = {name.rpartition("/")[2]: golden[name] for name in NAMES if name.startswith("compvis/inpaint/")}
    grid, mask, image = compvis_grid(7, "ddim"), told["mask"], told["image"]
    x, draws = told["x_T"], iter(told["draws"])
    for i, step in enumerate(grid):
        noised = signal(step.sigma) * image + noise_std(step.sigma) * next(draws)
        assert relative_error(mask * noised + (1 - mask) * x, told["blended"][i]) < TOLERANCE
        next(draws)  # drawn by the DDIM step, and multiplied by an eta of 0
        x = told["latents"][i]
    assert next(draws, None) is None and step.t == told["timesteps"][-1] == 1


def test_every_golden_trajectory_is_used(golden):
    used = {"x_T", "image", "noise", "compvis/steps_run"}
    used |= {f"kdiffusion/{spacing}/{steps}/sigmas" for spacing, steps, _ in K_CASES}
    runs = [("kdiffusion", *case) for case in K_CASES] + [("compvis", *case) for case in COMPVIS_CASES]
    runs += [("compvis", "img2img", *case) for case in IMAGE_CASES]
    used |= {"/".join(case) for case in runs} | {"/".join((*case, "timesteps")) for case in runs}
    used |= {"/".join(("compvis", "img2img", *case, "start")) for case in IMAGE_CASES}
    assert {name for name in NAMES if not name.startswith("compvis/inpaint/")} == used
    assert (len(K_CASES), len(COMPVIS_CASES), len(IMAGE_CASES)) == (6 * 6 - 1 + 6 * 6, 3 * 6, 3)
