"""The levels of noise that a sampler visits, as data: one `Step` for each of its steps, from much noise to little.

sigma is the ratio of noise to signal, sqrt((1 - alpha_bar) / alpha_bar), as in Karras et al. 2022 (arXiv:2206.00364). Latents
x keep the variance they had in training: x = signal(sigma) (x0 + sigma eps), with signal = sqrt(alpha_bar).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of a sampler: from level sigma, where the network is told t, to level next_sigma.

    `next_t` is what the network would be told there, None at the end of a run, where it is not asked and samplers fall back to
    their first order. A grid's steps follow on one another
    (each next_sigma is the following sigma), except where a convention reproduces an implementation that loses step.
    """

    t: float
    sigma: float
    next_t: float | None
    next_sigma: float


@dataclass(frozen=True, kw_only=True)
class Grid:
    """All steps of a run, and how it begins: with `noise_scale` times N(0, 1), or with an image noised to `start_sigma`.

    Two fields are for what implementations do that begin in the middle of a grid, and are empty otherwise: `trial`, the step
    by which PNDM looks ahead, where that is not its first step; `unseen`, the levels before the first, nearest first, at
    which LMS behaves as if it had asked the network.
    """

    steps: tuple[Step, ...]
    noise_scale: float = 1.0
    start_sigma: float
    trial: Step | None = None
    unseen: tuple[float, ...] = ()

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)


def signal(sigma: float) -> float:
    """sqrt(alpha_bar): the share of the data in x."""
    return 1.0 / math.sqrt(1.0 + sigma * sigma)


def noise_std(sigma: float) -> float:
    """sqrt(1 - alpha_bar): the share of the noise in x."""
    return sigma / math.sqrt(1.0 + sigma * sigma)


def lam(sigma: float) -> float:
    """Half the logarithm of the signal-to-noise ratio (Lu et al. 2022, arXiv:2206.00927); infinite without noise."""
    return math.inf if sigma == 0.0 else -math.log(sigma)
