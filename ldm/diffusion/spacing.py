"""Where a grid's timesteps lie, by name, and the noise at timesteps between the trained ones.

Each spacing is a function (train_steps T, steps S) -> S timesteps from much noise to little. Which of them an
implementation uses for which sampler is in `conventions.py`. leading, linspace and trailing are those of Lin et al. 2023
(arXiv:2305.08891, table 2).
"""

import bisect
import math
from collections.abc import Callable, Sequence

Spacing = Callable[[int, int], list[float]]


def tapered(train_steps: int, steps: int) -> list[float]:
    """From the noisiest timestep in equal strides, with a shorter last step to timestep 0: 4 T / S^2, at most T / S.

    sigma goes as sqrt(t) near the end, so that a whole stride there takes away most of what is left in one step. With the
    shorter one the exact oracle finds a third to nine tenths of the error of `uniform` at 10 to 50 steps, with every sampler.
    """
    last = (train_steps - 1) / steps * min(1.0, 4.0 / steps)
    return [last + (train_steps - 1 - last) * (1 - i / max(steps - 1, 1)) for i in range(steps)] if steps > 1 else [last]


def uniform(train_steps: int, steps: int) -> list[float]:
    """From the noisiest timestep down to, but without, timestep 0, in equal strides: right for every number of steps."""
    return [(train_steps - 1) * (1 - i / steps) for i in range(steps)]


def leading(train_steps: int, steps: int) -> list[float]:
    """Multiples of T // S, plus one: what v1-4's own scheduler file asks for. Misses much of the noise where S > T / 2."""
    stride = train_steps // steps
    if (steps - 1) * stride + 1 >= train_steps:
        raise ValueError(f"the leading grid has no {steps} steps of {train_steps}: it would ask for timestep {train_steps}")
    return [float(i * stride + 1) for i in reversed(range(steps))]


def linspace(train_steps: int, steps: int) -> list[float]:
    """From the noisiest timestep to timestep 0, both called; a single step is at timestep 0."""
    return [i * (train_steps - 1) / max(steps - 1, 1) for i in reversed(range(steps))]


def linspace_from_top(train_steps: int, steps: int) -> list[float]:
    """The same with a single step at the noisiest timestep, as k-diffusion has it."""
    return linspace(train_steps, steps) if steps > 1 else [train_steps - 1.0]


def linspace_rounded(train_steps: int, steps: int) -> list[float]:
    """As `uniform`, rounded to whole timesteps: diffusers' multistep solvers."""
    return [float(round_half_even((train_steps - 1) * i / steps)) for i in reversed(range(1, steps + 1))]


def trailing(train_steps: int, steps: int) -> list[float]:
    """From T - 1 down in strides of T / S, rounded. The stride is as inexact as numpy's arange has it: that settles halves."""
    stride = (train_steps - train_steps / steps) - train_steps
    return [float(round(train_steps + i * stride) - 1) for i in range(steps)]


def compvis(train_steps: int, steps: int) -> list[float]:
    """Every (T // S)-th timestep, plus one: for most S another number of steps than asked for, for some none at all."""
    timesteps = [float(t + 1) for t in range(0, train_steps, train_steps // steps)] if steps <= train_steps else []
    if not timesteps or timesteps[-1] >= train_steps:
        raise ValueError(f"CompVis's grid has no {steps} steps of {train_steps}: it would ask for timestep {train_steps}")
    return timesteps[::-1]


def lcm(train_steps: int, steps: int, original_steps: int = 50) -> list[float]:
    """A choice among the 50 timesteps that latent consistency models are distilled on (arXiv:2310.04378, section 4.3)."""
    if steps > original_steps:
        raise ValueError(f"{steps} steps; a latent consistency model was distilled on {original_steps}")
    stride = train_steps // original_steps
    trained = [float(i * stride - 1) for i in range(original_steps, 0, -1)]
    return [trained[i * original_steps // steps] for i in range(steps)]


def round_half_even(value: float) -> int:
    """numpy's rounding, which is also Python's, after removing what float arithmetic adds to a half."""
    return round(round(value, 9))


# -- Between the trained timesteps


def sigma_at(t: float, sigmas: Sequence[float], *, logarithmic: bool) -> float:
    """sigma at a fractional timestep, interpolated in log sigma (k-diffusion) or in sigma (diffusers)."""
    low = min(int(t), len(sigmas) - 2)
    part = t - low
    if logarithmic:
        return math.exp((1 - part) * math.log(sigmas[low]) + part * math.log(sigmas[low + 1]))
    return (1 - part) * sigmas[low] + part * sigmas[low + 1]


def t_at(sigma: float, sigmas: Sequence[float]) -> float:
    """The timestep whose log-interpolated sigma this is, held within the trained ones."""
    low = min(max(bisect.bisect_right(sigmas, sigma) - 1, 0), len(sigmas) - 2)
    below, above = math.log(sigmas[low]), math.log(sigmas[low + 1])
    part = (math.log(sigma) - below) / (above - below)
    return low + min(max(part, 0.0), 1.0)


# -- Spacings in sigma


def karras(first: float, last: float, count: int, rho: float = 7.0) -> list[float]:
    """`count` levels from sigma `first` to `last`, equidistant in sigma^(1/7) (arXiv:2206.00364, eq. 5)."""
    high, low = first ** (1 / rho), last ** (1 / rho)
    return [(high + i / max(count - 1, 1) * (low - high)) ** rho for i in range(count)]


def exponential(first: float, last: float, count: int) -> list[float]:
    """`count` levels from sigma `first` to `last`, equidistant in log sigma."""
    high, low = math.log(first), math.log(last)
    return [math.exp(high + i / max(count - 1, 1) * (low - high)) for i in range(count)]
