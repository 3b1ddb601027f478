"""Conventions by name: which grid an implementation walks with which sampler, as data.

The reference implementations disagree on timesteps, on the noise a run begins with, and on where it ends. `CONVENTIONS`
holds what each does, proven against it; "ldm" is our own, right for every number of steps:

    ldm         from the noisiest timestep, in equal strides but for a shorter last step, down to timestep 0, whose noise
                stays in
    diffusers   v1-4's scheduler file, as each of diffusers' schedulers reads it
    kdiffusion  crowsonkb/k-diffusion
    compvis     CompVis/stable-diffusion

One thing of diffusers is not reproduced, as its mistake is not in the grid: its PNDM combines v-predictions of different
levels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ldm.diffusion import spacing as lay
from ldm.diffusion.grid import Grid, Step, noise_std
from ldm.diffusion.schedule import ScheduleConfig, sigmas


def last_steps(grid: Grid, count: int) -> Grid:
    """The last `count` steps, begun at the level of the first of them."""
    steps = grid.steps[len(grid) - count :]
    return replace(grid, steps=steps, start_sigma=steps[0].sigma)


def last_steps_of_plms_list(grid: Grid, count: int) -> Grid:
    """diffusers' PNDM: it cuts its list of timesteps, in which the second stands twice, and so loses the repetition.

    The first step is one too noisy, and after it the network and the schedule are one step ahead of x for the rest. Where
    one step is cut, the repetition is still there, but of what had been the second timestep: the network is told that one
    in the first step, and looks ahead by the second step instead of the first.
    """
    cut = len(grid) - count
    if cut == 0:
        return grid
    if cut == 1:
        first, second = grid.steps[:2]
        told = replace(first, t=second.t, next_t=second.t)
        return replace(grid, steps=(told, *grid.steps[2:]), start_sigma=second.sigma, trial=second)
    steps = (grid.steps[cut - 1], *grid.steps[cut + 1 :])
    return replace(grid, steps=steps, start_sigma=steps[0].sigma)


def last_steps_of_four_levels(grid: Grid, count: int) -> Grid:
    """diffusers' LMS: begun in the middle, it gives its first evaluations the weights they would have after others, which
    there are not, so that the weights of the first three steps do not sum to 1."""
    cut = len(grid) - count
    before = tuple(step.sigma for step in reversed(grid.steps[:cut]))
    return replace(last_steps(grid, count), unseen=before)


def last_steps_from_one_above(grid: Grid, count: int) -> Grid:
    """CompVis: the image is noised to the level above that of the first step. There is none above all steps."""
    if count == len(grid):
        raise ValueError("CompVis's image-to-image has no strength 1; expected less")
    return replace(last_steps(grid, count), start_sigma=grid.steps[len(grid) - count - 1].sigma)


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """How a grid is made.

    spacing: where the timesteps lie.
    end: the last next_sigma: "first" for the noise of timestep 0, "none" for none at all.
    end_t: what the network is told where a sampler asks it at the very end; None where it must not, and where the last step
        is of the first order: it takes away more noise than an extrapolation can be trusted for.
    logarithmic: whether sigma at fractional timesteps is interpolated in its logarithm.
    whole_timesteps: timesteps of a spacing in sigma are made whole.
    full_range: a spacing in sigma runs over the whole schedule, not just over the grid's own levels.
    unit_noise: begin with N(0, 1); otherwise with the share of noise that x has at the first level, a little less.
    cut: which of the steps image-to-image runs, and from which level.
    """

    spacing: lay.Spacing = lay.tapered
    end: str = "first"
    end_t: float | None = None
    logarithmic: bool = True
    whole_timesteps: bool = False
    full_range: bool = False
    unit_noise: bool = True
    cut: Callable[[Grid, int], Grid] = last_steps


_K = GridSpec(spacing=lay.linspace_from_top, end="none", unit_noise=False)
_EULER = replace(_K, spacing=lay.linspace, logarithmic=False)
_LEADING = GridSpec(spacing=lay.leading)
_SOLVER = replace(_EULER, spacing=lay.linspace_rounded, whole_timesteps=True, full_range=True, unit_noise=True)
_COMPVIS = GridSpec(spacing=lay.compvis, end_t=1.0, cut=last_steps_from_one_above)
_LCM = GridSpec(spacing=lay.lcm, end="none")

# Convention -> sampler's NAME -> grid. "" is for every sampler not named.
CONVENTIONS: dict[str, dict[str, GridSpec]] = {
    "ldm": {"": GridSpec(), "lcm": _LCM},
    "diffusers": {
        "pndm": replace(_LEADING, cut=last_steps_of_plms_list),
        "ddim": _LEADING,
        **dict.fromkeys(("euler", "euler_ancestral", "heun"), _EULER),
        "lms": replace(_EULER, cut=last_steps_of_four_levels),
        **dict.fromkeys(("dpmpp_2m", "dpmpp_2m_sde", "unipc"), _SOLVER),
        "ddpm": replace(_LEADING, end="none"),
        "lcm": _LCM,
    },
    "kdiffusion": dict.fromkeys(("euler", "euler_ancestral", "heun", "lms", "dpmpp_2m", "dpmpp_2m_sde"), _K),
    "compvis": dict.fromkeys(("pndm", "ddim"), _COMPVIS),
}

# What a caller may ask for by name instead of the convention's own.
IN_TIME = {
    "tapered": lay.tapered,
    "uniform": lay.uniform,
    "leading": lay.leading,
    "linspace": lay.linspace_from_top,
    "trailing": lay.trailing,
    "compvis": lay.compvis,
}
IN_SIGMA = {"karras": lay.karras, "exponential": lay.exponential}
SPACINGS = (*IN_TIME, *IN_SIGMA)


def make_grid(
    schedule: ScheduleConfig, steps: int, sampler: str, *, convention: str = "ldm", spacing: str | None = None
) -> Grid:
    """The grid of `steps` steps that `convention` walks with `sampler` (its NAME).

    spacing: one of `SPACINGS` instead of the convention's own; the same timesteps under every convention (a single step of
    "linspace" is at the noisiest one). Raises ValueError naming what is allowed.
    """
    chosen = spec(convention, sampler)
    if spacing is not None and spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r}; expected one of {', '.join(SPACINGS)}")
    if spacing in IN_TIME:
        # The leading grid begins with N(0, 1) wherever it is used.
        chosen = replace(chosen, spacing=IN_TIME[spacing], unit_noise=chosen.unit_noise or spacing == "leading")
    return grid_from(sigmas(schedule), steps, chosen, spacing if spacing in IN_SIGMA else None)


def from_image(grid: Grid, strength: float, sampler: str, *, convention: str = "ldm", steps: int | None = None) -> Grid | None:
    """The part of `grid` that image-to-image runs at `strength` in [0, 1]: int(S x strength) steps, None where that is 0.

    (100 x 0.29 is 29 for us; the references take floating-point numbers at their word, and 28.) Its `start_sigma` is the
    level to which the image is noised first. steps: the S that was asked for, where the grid has another number of steps
    (CompVis's).
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength {strength}; expected 0 to 1")
    product = (len(grid) if steps is None else steps) * strength
    count = min(int(round(product, 9) if convention == "ldm" else product), len(grid))
    return spec(convention, sampler).cut(grid, count) if count else None


def spec(convention: str, sampler: str) -> GridSpec:
    """The entry of `CONVENTIONS`."""
    if convention not in CONVENTIONS:
        raise ValueError(f"convention {convention!r}; expected one of {', '.join(CONVENTIONS)}")
    known = CONVENTIONS[convention]
    if sampler not in known and "" not in known:
        raise ValueError(f"convention {convention!r} has no {sampler} sampler; it has {', '.join(known)}")
    return known.get(sampler, known.get(""))


def grid_from(table: Sequence[float], steps: int, asked: GridSpec, in_sigma: str | None = None) -> Grid:
    """The grid on a table of sigma at every trained timestep, its levels laid anew where `in_sigma` names a spacing."""
    if not 1 <= steps <= len(table):
        raise ValueError(f"{steps} steps; expected 1 to {len(table)}")
    timesteps = asked.spacing(len(table), steps)
    levels = [lay.sigma_at(t, table, logarithmic=asked.logarithmic) for t in timesteps]
    end, end_t = (table[0], asked.end_t) if asked.end == "first" else (0.0, None)
    if in_sigma is not None:
        levels, timesteps = _laid_in_sigma(table, levels, end, asked, in_sigma)
    if timesteps[-1] == 0:  # the spacing asks the network at the last level itself; what is left is to remove its noise
        end, end_t = 0.0, None
    if any(after >= before for before, after in pairwise([*levels, end])):
        raise ValueError(f"{steps} steps are too many for this grid: two of its timesteps are the same; try fewer")
    ahead = zip([*timesteps[1:], end_t], [*levels[1:], end], strict=True)
    made = tuple(
        Step(t=t, sigma=sigma, next_t=next_t, next_sigma=next_sigma)
        for t, sigma, (next_t, next_sigma) in zip(timesteps, levels, ahead, strict=True)
    )
    return Grid(steps=made, noise_scale=1.0 if asked.unit_noise else noise_std(levels[0]), start_sigma=levels[0])


def _laid_in_sigma(
    table: Sequence[float], levels: list[float], end: float, asked: GridSpec, name: str
) -> tuple[list[float], list[float]]:
    """As many levels, laid by sigma, and their timesteps. Where the grid ends above zero, its end is the last level's."""
    first, last = (table[-1], table[0]) if asked.full_range else (levels[0], levels[-1])
    if end > 0:
        levels = IN_SIGMA[name](first, end, len(levels) + 1)[:-1]
    else:
        levels = IN_SIGMA[name](first, last, len(levels))
    timesteps = [lay.t_at(sigma, table) for sigma in levels]
    if asked.whole_timesteps:
        # diffusers rounds the timesteps of Karras's levels and cuts those of exponential ones; the first of these is cut too,
        # since its sigmas, in float32, put it a hair below the last timestep.
        top = len(table) - 1.5
        timesteps = [float(round(t) if name == "karras" else math.floor(min(t, top))) for t in timesteps]
    return levels, timesteps
