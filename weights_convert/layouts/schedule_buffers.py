"""The twelve buffers in which CompVis's DDPM module keeps its noise schedule, and the schedule they were made from.

Ho et al. 2020, "Denoising Diffusion Probabilistic Models", arXiv:2006.11239, eq. 4, 6, 7. All have shape (train_steps,).
"""

from typing import Any

from weights_convert.architecture import Schedule
from weights_convert.containers import TensorFile
from weights_convert.errors import CheckpointError

NAMES = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
HALF_PRECISION_ERROR = 2e-3  # relative, of betas kept in float16 or bfloat16 and back


def betas(schedule: Schedule) -> Any:
    """The variance added at each step, float64 (train_steps,). Cosine: arXiv:2102.09672, eq. 17 and section 3.2."""
    import numpy as np

    if schedule.beta_schedule == "cosine":
        wanted = np.cos((np.arange(schedule.train_steps + 1) / schedule.train_steps + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - wanted[1:] / wanted[:-1], 0.999)
    if schedule.beta_schedule == "linear":
        return np.linspace(schedule.beta_start, schedule.beta_end, schedule.train_steps)
    return np.linspace(schedule.beta_start**0.5, schedule.beta_end**0.5, schedule.train_steps) ** 2


def tensors(schedule: Schedule) -> dict[str, Any]:
    """All twelve, computed in float64 and kept in float32 as CompVis does."""
    import numpy as np
    import torch

    beta = betas(schedule)
    alpha_bar = np.cumprod(1 - beta)
    previous = np.append(1.0, alpha_bar[:-1])
    variance = beta * (1 - previous) / (1 - alpha_bar)  # eq. 7, tilde beta
    values = (
        *(beta, alpha_bar, previous, alpha_bar**0.5, (1 - alpha_bar) ** 0.5, np.log(1 - alpha_bar)),
        *((1 / alpha_bar) ** 0.5, (1 / alpha_bar - 1) ** 0.5, variance, np.log(np.maximum(variance, 1e-20))),
        *(beta * previous**0.5 / (1 - alpha_bar), (1 - previous) * (1 - beta) ** 0.5 / (1 - alpha_bar)),
    )
    return {name: torch.from_numpy(value.astype(np.float32)) for name, value in zip(NAMES, values, strict=True)}


def infer(file: TensorFile) -> Schedule:
    """The schedule a file was trained with: SD v1's where it has no buffers, else the one whose betas it holds."""
    import numpy as np

    if "betas" not in file.specs:
        return Schedule()
    if len(file.specs["betas"].shape) != 1 or not 2 <= file.specs["betas"].shape[0] <= 100_000:
        raise CheckpointError(f"{file.path}: betas has shape {list(file.specs['betas'].shape)}; expected [1000]")
    found = file.tensor("betas").double().numpy()
    first, last, steps = float(found[0]), float(found[-1]), len(found)
    candidates = [Schedule(), Schedule(beta_schedule="cosine", train_steps=steps)]
    if 0 < first < 1 and 0 < last < 1:
        candidates += [
            Schedule(beta_start=first, beta_end=last, train_steps=steps, beta_schedule=k) for k in ("scaled_linear", "linear")
        ]
    for schedule in candidates:
        if schedule.train_steps == steps and np.allclose(betas(schedule), found, rtol=HALF_PRECISION_ERROR, atol=0):
            return schedule
    raise CheckpointError(f"{file.path}: betas from {first:.6g} to {last:.6g} are no linear, scaled-linear or cosine schedule")
