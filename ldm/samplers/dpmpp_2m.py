"""DPM-Solver++ (2M): Lu et al. 2022, "DPM-Solver++: Fast Solver for Guided Sampling", arXiv:2211.01095, algorithm 2.

The data the network sees, x0, changes slowly in lam, half the log signal-to-noise ratio. With x0 linear in lam through the
last two evaluations, the rest of the flow is integrated exactly. The first step and the last take it constant.
"""

from math import expm1

from torch import Tensor

from ldm.diffusion.grid import Grid, lam, noise_std, signal
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, predict_x0

NAME = "dpmpp_2m"
SPELLINGS = ("DPM++ 2M", "k_dpmpp_2m", "DPMSolverMultistepScheduler", "sample_dpmpp_2m", "dpm_solver++")
PAPER = "arXiv:2211.01095"
ORDER = 2
STOCHASTIC = False


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
            target = x0 + (x0 - x0_before) * (h / (2 * h_before))  # line 10: x0 half a step ahead
        kept = noise_std(step.next_sigma) / noise_std(step.sigma)
        x = kept * x - signal(step.next_sigma) * expm1(-h) * target  # line 11
        before = (x0, h)
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x
