"""UniPC: Zhao et al. 2023, "UniPC: A Unified Predictor-Corrector Framework for Fast Sampling", arXiv:2302.04867.

Order 2, B2(h), predicting x0. What the network sees at a new level first corrects the step that led there, then predicts the
next one: one call a step all the same. (What a hook has changed in x, the corrector takes in part for the network's view.)
Letters as in the paper: h the stride in lam, r the place of the older evaluation in strides, B = e^-h - 1.
"""

from math import expm1
from typing import NamedTuple

from torch import Tensor

from ldm.diffusion.grid import Grid, Step, lam, noise_std, signal
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, predict_x0

NAME = "unipc"
SPELLINGS = ("UniPC", "UniPCMultistepScheduler", "uni_pc", "uni_pc_bh2")
PAPER = "arXiv:2302.04867"
ORDER = 2
STOCHASTIC = False


class Past(NamedTuple):
    """An evaluation: where it was, and the data seen there."""

    lam: float
    x0: Tensor


class Taken(NamedTuple):
    """A step taken, to be corrected once the next evaluation is in: where x was before it, and the evaluations it used."""

    step: Step
    x: Tensor
    pasts: list[Past]


def calls(grid: Grid) -> int:
    return len(grid)


def sample(model: Model, x: Tensor, grid: Grid, *, noise: Noise, after_step: AfterStep = keep) -> Tensor:
    taken: Taken | None = None
    pasts: list[Past] = []  # newest first
    for i, step in enumerate(grid):
        eps = model(x, step.t)
        x0 = predict_x0(x, eps, step.sigma)
        if taken is not None:
            x = x + (_correct(taken, x0) - _predict(taken))  # as a difference: the hook may have changed x
        pasts = [Past(lam(step.sigma), x0), *pasts[:1]]
        used = pasts if step.next_t is not None else pasts[:1]
        taken = Taken(step, x, used)
        x = _predict(taken)
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x


def _predict(taken: Taken) -> Tensor:
    """eq. 3 with p = 2, whose one coefficient is 1/2 for B2 (theorem 3.1)."""
    slope = 0.5 * _difference(taken) if len(taken.pasts) == 2 else 0.0
    return _step(taken, slope)


def _correct(taken: Taken, x0: Tensor) -> Tensor:
    """The same step with the data seen at its end (eq. 3, UniC)."""
    newest = x0 - taken.pasts[0].x0
    if len(taken.pasts) == 1:
        return _step(taken, 0.5 * newest)
    h, r = _stride(taken.step), _place(taken)
    phi_2 = expm1(-h) / -h - 1.0  # h times the paper's phi functions of -h
    phi_3 = phi_2 / -h - 0.5
    b_1, b_2 = phi_2 / expm1(-h), 2.0 * phi_3 / expm1(-h)
    older = (b_1 - b_2) / (1.0 - r)  # the 2 x 2 system R rho = b of eq. 5
    return _step(taken, older * _difference(taken) + (b_1 - older) * newest)


def _step(taken: Taken, slope: Tensor | float) -> Tensor:
    """The first-order step, and B times what the slope of x0 adds."""
    step, shrink = taken.step, expm1(-_stride(taken.step))
    kept = noise_std(step.next_sigma) / noise_std(step.sigma)
    return kept * taken.x - signal(step.next_sigma) * shrink * (taken.pasts[0].x0 + slope)


def _difference(taken: Taken) -> Tensor:
    """D_1 / r: the change of x0 a stride, from the evaluation before the step."""
    newest, older = taken.pasts
    return (older.x0 - newest.x0) / _place(taken)


def _place(taken: Taken) -> float:
    newest, older = taken.pasts
    return (older.lam - newest.lam) / _stride(taken.step)


def _stride(step: Step) -> float:
    return lam(step.next_sigma) - lam(step.sigma)
