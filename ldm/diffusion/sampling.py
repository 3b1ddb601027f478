"""What every sampler is given and gives: the model, the noise, and the hook after each step."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ldm.diffusion.grid import Step, noise_std, signal

Model = Callable[[Tensor, float], Tensor]  # (x, t) -> eps, both (b, c, h, w); guidance is inside
Noise = Callable[[], Tensor]  # -> N(0, 1), a fresh draw of x's shape each time


@dataclass(frozen=True, kw_only=True)
class Info:
    """What the hook is told after step `index` of `count`: the step, the network's eps at its start, and the image it saw.

    `x0` is the estimate of the finished latents that eps implied.
    """

    index: int
    count: int
    step: Step
    eps: Tensor
    x0: Tensor


AfterStep = Callable[[Tensor, Info], Tensor]  # x after the step -> the x to go on with


def keep(x: Tensor, info: Info) -> Tensor:
    """The hook that does nothing."""
    return x


def noised(x0: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """Data with noise ~ N(0, 1) at level sigma (Ho et al. 2020, arXiv:2006.11239, eq. 4)."""
    return signal(sigma) * x0 + noise_std(sigma) * noise


def predict_x0(x: Tensor, eps: Tensor, sigma: float) -> Tensor:
    """The data in x, were all its noise eps: eq. 4 solved for x_0."""
    return (x - noise_std(sigma) * eps) / signal(sigma)


def move(x: Tensor, eps: Tensor, sigma: float, next_sigma: float) -> Tensor:
    """x at level next_sigma with the same data and the same noise: dx / dsigma = eps in units of the data, exactly so for
    constant eps (Song et al. 2021, arXiv:2010.02502, eq. 12 with eta = 0 and eq. 13)."""
    return (x / signal(sigma) + (next_sigma - sigma) * eps) * signal(next_sigma)
