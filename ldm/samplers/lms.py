"""LMS: linear multistep, the Adams-Bashforth method on a grid of any spacing.

From k-diffusion (Crowson 2022). The slope eps(sigma) is taken to be the polynomial through the last four evaluations, and the
flow dx / dsigma = eps of Karras et al. 2022 (arXiv:2206.00364) is integrated along it exactly.
"""

from collections.abc import Sequence

from numpy.polynomial import Polynomial
from torch import Tensor

from ldm.diffusion.grid import Grid
from ldm.diffusion.sampling import AfterStep, Info, Model, Noise, keep, move, predict_x0

NAME = "lms"
SPELLINGS = ("LMS", "k_lms", "LMSDiscreteScheduler", "sample_lms")
PAPER = "arXiv:2206.00364"
ORDER = 2  # the first step is Euler's, and its error stays; after it, 4
HISTORY = 4
STOCHASTIC = False


def calls(grid: Grid) -> int:
    return len(grid)


def sample(model: Model, x: Tensor, grid: Grid, *, noise: Noise, after_step: AfterStep = keep) -> Tensor:
    history: list[tuple[float, Tensor]] = []  # (sigma, eps), newest first
    for i, step in enumerate(grid):
        eps = model(x, step.t)
        x0 = predict_x0(x, eps, step.sigma)
        history = [(step.sigma, eps), *history[: HISTORY - 1]]
        nodes = [*(sigma for sigma, _ in history), *grid.unseen][:HISTORY]
        weights = adams_bashforth(nodes, step.sigma, step.next_sigma)
        slope = sum(weight * past for weight, (_, past) in zip(weights, history, strict=False))  # of unseen levels: nothing
        x = move(x, slope, step.sigma, step.next_sigma)
        x = after_step(x, Info(index=i, count=len(grid), step=step, eps=eps, x0=x0))
    return x


def adams_bashforth(nodes: Sequence[float], start: float, end: float) -> list[float]:
    """The weights of values at `nodes` in the mean, from start to end, of the polynomial through them; they sum to 1.

    Each is the integral of a Lagrange polynomial, over distances from `start` in strides so that the numbers stay tame.
    """
    places = [(node - start) / (end - start) for node in nodes]
    weights = []
    for j, place in enumerate(places):
        others = places[:j] + places[j + 1 :]
        lagrange = Polynomial.fromroots(others) if others else Polynomial([1.0])
        weights.append(float(lagrange.integ()(1.0) / lagrange(place)))
    return weights
