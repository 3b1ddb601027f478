"""Classifier-free guidance: Ho & Salimans 2022, "Classifier-Free Diffusion Guidance", arXiv:2207.12598.

The network is asked twice, without and with the prompt, and the difference is exaggerated. Both halves go through it in one
batch, the unconditional first. `guided` makes of a network, two contexts and a scale the `model(x, t) -> eps` that samplers
ask; what does not change from step to step, the contexts' keys and values, it computes once.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm.diffusion.grid import Grid, noise_std, signal
from ldm.diffusion.sampling import Model

Widen = Callable[[Tensor], Tensor]  # x (b, c, h, w) -> the network's whole input (b, c + extra, h, w)


def combine(uncond: Tensor, cond: Tensor, scale: float) -> Tensor:
    """eq. 6, with the scale counted as Stable Diffusion does: 1 is the prompt alone (the paper's w is scale - 1)."""
    return uncond + scale * (cond - uncond)


def guided(
    unet: Any,
    uncond: Tensor,
    cond: Tensor,
    scale: float,
    *,
    interval: tuple[float, float] | None = None,
    widen: Widen | None = None,
    v_levels: Mapping[float, float] | None = None,
) -> Model:
    """The model of latents (b, c, h, w) under contexts uncond and cond, (b, n, d) each.

    scale: 1 is the prompt alone and 0 the negative prompt alone; both ask the network for one half only.
    interval: the timesteps (lowest, highest) at which guidance acts; at the others the prompt stands alone (Kynkäänniemi et
        al. 2024, arXiv:2404.07724, section 3). widen: what an inpainting model wants beside x.
    v_levels: for a network of v-predictions, its sigma at each timestep it may be asked (see `levels_of`).
    x keeps its own type; the network computes in that of its weights, which must not change while the model is in use.
    """
    weight = unet.conv_in.weight
    halves = {1.0: [cond], 0.0: [uncond]}
    lowest, highest = interval or (float("-inf"), float("inf"))
    cache: dict[float, Any] = {}

    def ask(x: Tensor, t: float, scale: float) -> Tensor:
        contexts = halves.get(scale, [uncond, cond])
        keys_values = cache.get(scale)
        if keys_values is None:
            keys_values = unet.project_context(torch.cat(contexts).to(weight))
            if not torch.is_grad_enabled():  # a graph is good for one backward pass only
                cache[scale] = keys_values
        wide = (widen(x) if widen else x).to(weight)
        out = unet.denoise(wide, unet.embed_time(t), keys_values).to(x)  # of x once for each context
        return out if len(contexts) == 1 else combine(*out.chunk(2), scale)

    def model(x: Tensor, t: float) -> Tensor:
        out = ask(x, t, scale if lowest <= t <= highest else 1.0)
        return out if v_levels is None else eps_from_v(out, x, v_levels[t])

    return model


def eps_from_v(v: Tensor, x: Tensor, sigma: float) -> Tensor:
    """The eps that v = signal eps - noise_std x0 stands for (Salimans & Ho 2022, arXiv:2202.00512, appendix D)."""
    return signal(sigma) * v + noise_std(sigma) * x


def levels_of(grid: Grid) -> dict[float, float]:
    """sigma at every timestep that a sampler may ask for on this grid.

    Where several levels have one timestep (diffusers' rounded Karras grids, and its image-to-image), it is the last of them.
    """
    ahead = {step.next_t: step.next_sigma for step in grid if step.next_t is not None}
    return {step.t: step.sigma for step in grid} | ahead
