"""The noise schedule: how much of the data and how much noise there is at each training timestep.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239. x_t = sqrt(alpha_bar_t) x_0 +
sqrt(1 - alpha_bar_t) eps (eq. 4), alpha_bar_t the product of 1 - beta up to t. Tables of shape (train_steps,), float64.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """SD v1's schedule.

    beta_schedule: "scaled_linear" (linear in sqrt(beta)), "linear", or "cosine", which has no start and end of its own.
    prediction: what the UNet was trained to return, "epsilon" or "v_prediction" (see `guidance.eps_from_v`).
    """

    beta_schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    train_steps: int = 1000
    prediction: str = "epsilon"

    def __post_init__(self):
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r}; expected {' or '.join(PREDICTIONS)}")


def betas(config: ScheduleConfig) -> Tensor:
    """beta_t, the variance of the noise added at step t."""
    start, end, steps = config.beta_start, config.beta_end, config.train_steps
    if config.beta_schedule == "linear":
        return torch.linspace(start, end, steps, dtype=torch.float64)
    if config.beta_schedule == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, steps, dtype=torch.float64) ** 2
    if config.beta_schedule == "cosine":
        return _cosine_betas(steps)
    raise ValueError(f"beta_schedule {config.beta_schedule!r}; expected 'scaled_linear', 'linear' or 'cosine'")


def _cosine_betas(steps: int) -> Tensor:
    """Nichol & Dhariwal 2021, "Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672, eq. 17, with the offset
    0.008 and the bound 0.999 on beta that its section 3.2 gives."""
    wanted = [math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)]
    return torch.tensor([min(1 - wanted[i + 1] / wanted[i], 0.999) for i in range(steps)], dtype=torch.float64)


def alpha_bar(config: ScheduleConfig) -> Tensor:
    """alpha_bar_t, the share of the data's variance left at t (eq. 4)."""
    return torch.cumprod(1.0 - betas(config), dim=0)


def sigmas(config: ScheduleConfig) -> tuple[float, ...]:
    """sigma_t = sqrt((1 - alpha_bar_t) / alpha_bar_t), the ratio of noise to data at every trained timestep."""
    remaining = alpha_bar(config)
    return tuple(((1 - remaining) / remaining).sqrt().tolist())
