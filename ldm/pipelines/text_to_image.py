"""Text to image: noise, denoised under a prompt, decoded.

Rombach et al. 2022, "High-Resolution Image Synthesis with Latent Diffusion Models", arXiv:2112.10752.
"""

from typing import Any

import torch
from torch import Tensor

from ldm.checkpoint import Components
from ldm.diffusion.sampling import AfterStep, keep
from ldm.pipelines.result import Result, finish
from ldm.pipelines.run import check_noise, check_plain, prepare


@torch.no_grad()
def txt2img(
    components: Components,
    prompt: str | list[str],
    *,
    width: int | None = None,
    height: int | None = None,
    noise: Tensor | None = None,
    after_step: AfterStep = keep,
    **settings: Any,
) -> Result:
    """Make pictures of a prompt, `num_images` of each of several prompts.

    width, height: in pixels, multiples of 8; the size the model was trained at where left out.
    noise: N(0, 1) to begin with instead of drawing it, (n, 4, height / 8, width / 8).
    after_step: the hook (x, info) -> x after each step of a batch, for previews, progress or a change of course; to
        cancel, raise any exception in it. What it changes, no receipt knows of.
    settings: negative_prompt, steps, guidance_scale, sampler, seed, num_images and so on; see `Settings`.
    Raises ValueError, one line, where a field is out of range.
    """
    check_plain(components)
    run = prepare(components, prompt, (width, height), settings)
    check_noise(run, noise)
    parts = []
    for batch in run.batches():
        x = run.grid.noise_scale * run.start(batch, noise)
        parts.append(run.sample(batch, x, run.grid, after_step))
    return finish(run, parts, "txt2img", run.grid, noise)
