"""DPM-Solver++ (2M) for the reverse SDE: Lu et al. 2022, arXiv:2211.01095, appendix; the multistep form is k-diffusion's.

As DPM-Solver++ (2M), with the noise in x replaced step by step by fresh noise of the same amount.
"""

from math import exp, expm1, sqrt

from torch import Tensor

from ldm.diffusion.grid import Grid, lam, noise_std, signal
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, predict_x0

NAME = "dpmpp_2m_sde"
SPELLINGS = ("DPM++ 2M SDE", "k_dpmpp_2m_sde", "sample_dpmpp_2m_sde", "sde-dpmsolver++")
PAPER = "arXiv:2211.01095"
ORDER = 1
STOCHASTIC = True


def calls(grid: Grid) -> int:
    return len(grid)


def sample(model: Model, x: Tensor, grid: Grid, *, noise: Noise, after_step: AfterStep = keep) -> Tensor:
    before = None  # (x0, the width of its step in lam)
    for i, step in enumerate(grid):
        eps = model(x, step.t)
        x0 = predict_x0(x, eps, step.sigma)
        h = lam(step.next_sigma) - lam(step.sigma)
        target = x0
        if before is not None and step.next_t is not None:
            x0_before, h_before = before
            target = x0 + (x0 - x0_before) * (h / (2 * h_before))
        fresh = -expm1(-2 * h)  # the share of the variance that is drawn anew
        kept = noise_std(step.next_sigma) / noise_std(step.sigma) * exp(-h)
        x = kept * x + signal(step.next_sigma) * fresh * target
        if step.next_sigma > 0:
            x = x + noise_std(step.next_sigma) * sqrt(fresh) * noise()
        before = (x0, h)
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x
